"""A second classifier of clips that shares neither features nor training clips with the first.

It guards against clips that score well with one classifier without sounding right. It uses mel-frequency cepstral
coefficients (Davis & Mermelstein 1980) in ten parts of a clip and a regularised linear discriminant analysis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from audiomamba.data.extras import audio_package
from audiomamba.data.preparation import ClipPreparation
from audiomamba.data.waveforms import cut_or_pad

COEFFICIENTS: Final = 13
PARTS: Final = 10
BANDS: Final = 26
TRIMMED_DB: Final = 35.0
"""Frames this far below the loudest one are silence, which is trimmed at both ends."""

SHORTEST_SECONDS: Final = 0.1
FEWEST_PER_CLASS: Final = 5


class SecondOpinion:
    """A classifier based on cepstral coefficients.

    Args:
        clips: training clips, (samples,) each.
        labels: their labels.
        sample_rate_hz: rate of all clips.
    """

    def __init__(self, clips: Iterable[Tensor], labels: Sequence[str], sample_rate_hz: int) -> None:
        self.sample_rate_hz = sample_rate_hz
        frame = round(0.025 * sample_rate_hz)
        self._cepstra = audio_package("torchaudio.transforms").MFCC(
            sample_rate_hz,
            COEFFICIENTS,
            melkwargs={"n_fft": 2 * frame, "win_length": frame, "hop_length": frame // 2, "n_mels": BANDS},
        )
        self._model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        self._model.fit(np.stack([self._features(clip) for clip in clips]), list(labels))

    def labels(self, clips: Iterable[Tensor]) -> list[str]:
        """Return the predicted labels of (samples,) clips."""
        return [str(label) for label in self._model.predict(np.stack([self._features(clip) for clip in clips]))]

    @torch.no_grad()
    def _features(self, clip: Tensor) -> npt.NDArray[np.float64]:
        """Return the mean coefficients in equal parts of the sound, without loudness, and its duration."""
        trimming = ClipPreparation(trim_db=TRIMMED_DB)
        sound = trimming.prepared(clip.float(), self.sample_rate_hz)[0].flip(0)
        sound = trimming.prepared(sound, self.sample_rate_hz)[0].flip(0)
        sound = sound * (0.1 / float(sound.square().mean().sqrt().clamp(min=1e-6)))
        # A frame needs neighbours; shorter sounds are not words.
        cepstra = self._cepstra(cut_or_pad(sound, max(sound.shape[0], round(SHORTEST_SECONDS * self.sample_rate_hz))))
        spread = cepstra.std(dim=1, keepdim=True)
        parts = [part.mean(dim=1) for part in torch.tensor_split(_at_least(cepstra, PARTS), PARTS, dim=1)]
        duration = torch.tensor([np.log(sound.shape[0] / self.sample_rate_hz)])
        return torch.cat([*parts, spread.squeeze(1), duration.float()]).double().numpy()


def _at_least(frames: Tensor, count: int) -> Tensor:
    """Repeat frames of (coefficients, frames) if there are fewer than parts."""
    missing = count - frames.shape[1]
    return frames if missing <= 0 else frames.repeat_interleave(-(-count // frames.shape[1]), dim=1)
