"""Checkpoints of other projects: load them, and save models so that those projects can load them."""

from mambacore.checkpoints.folders import load, recognise, save_caduceus, save_mamba_ssm, save_transformers

__all__ = ["load", "recognise", "save_caduceus", "save_mamba_ssm", "save_transformers"]
