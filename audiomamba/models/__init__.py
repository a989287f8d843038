"""Models of waveforms that follow ``(tokens, state) -> (logits, state)``."""

from audiomamba.models.architectures import RECIPES, ArchitectureRecipe, architecture
from audiomamba.models.configuration import StageConfig, WaveformModelConfig
from audiomamba.models.waveform_model import WaveformModel, WaveformState, load_waveform_model, save_waveform_model

__all__ = [
    "RECIPES",
    "ArchitectureRecipe",
    "StageConfig",
    "WaveformModel",
    "WaveformModelConfig",
    "WaveformState",
    "architecture",
    "load_waveform_model",
    "save_waveform_model",
]
