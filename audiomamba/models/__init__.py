"""Models of waveforms that follow `(tokens, state) -> (logits, state)`."""

from audiomamba.models.architectures import ARCHITECTURES, PublishedArchitecture, architecture
from audiomamba.models.configuration import StageConfig, WaveformModelConfig
from audiomamba.models.waveform_model import WaveformModel, WaveformState, load_waveform_model, save_waveform_model

__all__ = [
    "ARCHITECTURES",
    "PublishedArchitecture",
    "StageConfig",
    "WaveformModel",
    "WaveformModelConfig",
    "WaveformState",
    "architecture",
    "load_waveform_model",
    "save_waveform_model",
]
