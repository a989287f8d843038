"""Raw waveforms on the shared core: reading, quantisers, clips, multi-scale models, and generation.

voice = audiomamba.load("digits")
clips = voice.generate(clips=4, seconds=1.0, seed=0)
audiomamba.write_waveform("zero.wav", clips.samples[0], voice.quantiser.sample_rate_hz)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audiomamba.data.waveforms import read_waveform
    from audiomamba.data.writing import write_waveform
    from audiomamba.generation import GeneratedClips, WaveformGenerator, load

__all__ = ["GeneratedClips", "WaveformGenerator", "load", "read_waveform", "write_waveform"]

_HOMES = {
    "GeneratedClips": "audiomamba.generation",
    "WaveformGenerator": "audiomamba.generation",
    "load": "audiomamba.generation",
    "read_waveform": "audiomamba.data.waveforms",
    "write_waveform": "audiomamba.data.writing",
}


def __getattr__(name: str) -> Any:
    """Import a name on first access, because importing torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'audiomamba' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
