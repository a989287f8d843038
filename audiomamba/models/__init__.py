"""Models of waveforms that follow ``(tokens, state) -> (logits, state)``."""

from audiomamba.models.configuration import StageConfig, WaveformModelConfig
from audiomamba.models.folder import load_waveform_model, save_waveform_model
from audiomamba.models.recipes import RECIPES, ArchitectureRecipe, architecture
from audiomamba.models.waveform_model import WaveformModel, WaveformState

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
