"""How likely clips are under a waveform model, clip by clip, in memory that does not grow with their length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from audiomamba.datasets import clip_example
from audiomamba.models import WaveformModel
from audiomamba.quantisers import Quantiser

PIECE_SAMPLES = 65_536


class ClipLikelihood(NamedTuple):
    """The negative log-likelihood of a clip."""

    samples: int
    nats: float  # of all samples together


@torch.no_grad()
def clip_likelihoods(
    model: WaveformModel, clips: list[torch.Tensor], quantiser: Quantiser, piece_samples: int = PIECE_SAMPLES
) -> list[ClipLikelihood]:
    """What clips cost a model in evaluation mode, every sample given all before it (padding is not counted).

    Args:
        clips: (length,) classes each, padded together to the longest, so of like lengths at best.
        quantiser: the model's.
        piece_samples: samples, over all clips, that go through the model at once; the states between pieces are handed
            on, so the result does not depend on it.
    """
    longest = max(clip.shape[0] for clip in clips)
    examples = [clip_example(clip, quantiser, longest) for clip in clips]
    inputs = torch.stack([example.inputs for example in examples])
    targets = torch.stack([example.targets for example in examples])
    totals = torch.zeros(len(clips), dtype=torch.float64)
    state, piece = None, max(1, piece_samples // len(clips))
    for read, wanted in zip(inputs.split(piece, dim=1), targets.split(piece, dim=1), strict=True):
        logits, state = model(read, state)
        nats = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        totals += nats.double().sum(dim=1)
    return [ClipLikelihood(clip.shape[0], float(total)) for clip, total in zip(clips, totals, strict=True)]
