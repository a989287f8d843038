"""Loading checkpoints of other projects, and saving models in their formats."""

from mambacore.checkpoints.folders import load, recognise, save_caduceus, save_mamba_ssm, save_transformers

__all__ = ["load", "recognise", "save_caduceus", "save_mamba_ssm", "save_transformers"]
