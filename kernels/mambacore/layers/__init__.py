"""Layers that follow ``(sequence, state) -> (sequence, state)``."""

from mambacore.layers.embedding import ContextEmbedding
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.pooling import POOLINGS, LastPooling, MeanPooling, PoolingState
from mambacore.layers.selective import SelectiveMixer, SelectiveState
from mambacore.layers.stack import ResidualBlock, ResidualStack

__all__ = [
    "POOLINGS",
    "ContextEmbedding",
    "LastPooling",
    "MeanPooling",
    "PoolingState",
    "ResidualBlock",
    "ResidualStack",
    "RootMeanSquareNorm",
    "SelectiveMixer",
    "SelectiveState",
]
