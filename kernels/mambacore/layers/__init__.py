"""Layers that follow ``(sequence, state) -> (sequence, state)``."""

from mambacore.layers.embedding import ContextEmbedding
from mambacore.layers.mixer import MIXERS, Mixer, build_mixer, mixer_options, register_mixer
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.pooling import POOLINGS, LastPooling, MeanPooling, PoolingState
from mambacore.layers.selective import SelectiveMixer, SelectiveState
from mambacore.layers.stack import ResidualBlock, ResidualStack

__all__ = [
    "MIXERS",
    "POOLINGS",
    "ContextEmbedding",
    "LastPooling",
    "MeanPooling",
    "Mixer",
    "PoolingState",
    "ResidualBlock",
    "ResidualStack",
    "RootMeanSquareNorm",
    "SelectiveMixer",
    "SelectiveState",
    "build_mixer",
    "mixer_options",
    "register_mixer",
]
