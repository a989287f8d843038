"""Plots of clips, and a page with players for them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure  # not pyplot: no window system and no global state
from torch import Tensor

from audiomamba.data.writing import encoded
from mambapipelines.pages.html import Player, Section, Table, page

DOTS_PER_INCH = 80
# Samples in a frame of the spectrogram, about 32 ms at 16 kHz, and the quietest level shown under the loudest.
FRAME_SECONDS = 0.032
DYNAMIC_RANGE_DB = 80.0
# More points than this are not visible in a plot.
MOST_POINTS = 4000


def clip_picture(samples: Tensor, sample_rate_hz: int) -> bytes:
    """Waveform above spectrogram of (length,) samples, as PNG."""
    values = samples.double().numpy()
    figure = Figure(figsize=(4.0, 2.6), dpi=DOTS_PER_INCH, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.6])
    seconds = len(values) / sample_rate_hz
    _draw_envelope(above, values, seconds)
    above.set_ylim(-1, 1)
    above.set_yticks([])
    levels = spectrogram_db(values, max(16, round(FRAME_SECONDS * sample_rate_hz)))
    below.imshow(
        levels,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, sample_rate_hz / 2000),
        vmin=-DYNAMIC_RANGE_DB,
        vmax=0,
        cmap="magma",
    )
    below.set_xlim(0, seconds)
    below.set_xlabel("s", loc="right")
    below.set_ylabel("kHz")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def spectrogram_db(samples: npt.NDArray[np.float64], frame: int) -> npt.NDArray[np.float64]:
    """(frequencies, frames): power of half-overlapping Hann frames in dB under a full-scale sine."""
    hop = frame // 2
    padded = np.pad(samples, (0, max(0, frame - len(samples))))
    # However long the clip is, no more frames than a plot can show.
    count = min(1 + (len(padded) - frame) // hop, MOST_POINTS)
    starts = np.linspace(0, len(padded) - frame, count).astype(int)
    window = np.hanning(frame)
    frames = np.stack([padded[start : start + frame] for start in starts]) * window
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2 / (window.sum() / 2) ** 2
    return 10 * np.log10(np.maximum(power, 1e-12)).T


def clip_page(
    title: str,
    clips: Sequence[Tensor],
    sample_rate_hz: int,
    captions: Sequence[str],
    table: Table | None = None,
    introduction: Sequence[str] = (),
) -> str:
    """A page that opens offline: a player with waveform and spectrogram for each clip, and a table."""
    players = [
        Player(encoded(clip, sample_rate_hz), caption, png=clip_picture(clip, sample_rate_hz))
        for clip, caption in zip(clips, captions, strict=True)
    ]
    sections = [Section("", tuple(introduction)), Section("Clips", tuple(players))]
    if table is not None:
        sections.append(Section("Figures", (table,)))
    return page(title, sections)


def _draw_envelope(axes, values: npt.NDArray[np.float64], seconds: float) -> None:
    """Plot the waveform, or the minimum and maximum of each interval of a long one."""
    if len(values) <= MOST_POINTS:
        axes.plot(np.arange(len(values)) / max(1, len(values)) * seconds, values, linewidth=0.5, color="#0072b2")
        return
    stretch = -(-len(values) // (MOST_POINTS // 2))
    filled = np.pad(values, (0, -len(values) % stretch), mode="edge").reshape(-1, stretch)
    times = (np.arange(len(filled)) + 0.5) * stretch / len(values) * seconds
    axes.fill_between(times, filled.min(1), filled.max(1), linewidth=0.3, color="#0072b2")
