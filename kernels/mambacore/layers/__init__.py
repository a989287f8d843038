"""Layers that follow `(sequence, state) -> (sequence, state)`."""

import mambacore.layers.mamba2_step
import mambacore.layers.mamba3_step  # noqa: F401  both register the operators that blocks call
from mambacore.layers.attention import AttentionMixer, AttentionState
from mambacore.layers.bidirectional import BidirectionalBlock, BidirectionalMixer, BidirectionalStack
from mambacore.layers.embedding import ContextEmbedding
from mambacore.layers.equivariant import EquivariantEmbedding, EquivariantStack
from mambacore.layers.feed_forward import GatedFeedForward
from mambacore.layers.gru import GRUMixer, GRUState
from mambacore.layers.linear_attention import LinearAttentionMixer, LinearAttentionState
from mambacore.layers.mamba2 import Mamba2Mixer, Mamba2State
from mambacore.layers.mamba3 import Mamba3Mixer, Mamba3State
from mambacore.layers.mixer import (
    MIXERS,
    Mixer,
    build_mixer,
    mixer_options,
    parameters_without_decay,
    register_mixer,
)
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.pooling import POOLINGS, LastPooling, MeanPooling, PoolingState
from mambacore.layers.retention import RetentionMixer, RetentionState
from mambacore.layers.rwkv import RWKVMixer, RWKVState
from mambacore.layers.s4d import S4DMixer, S4DState
from mambacore.layers.selective import SelectiveMixer, SelectiveState
from mambacore.layers.stack import ResidualBlock, ResidualStack

__all__ = [
    "MIXERS",
    "POOLINGS",
    "AttentionMixer",
    "AttentionState",
    "BidirectionalBlock",
    "BidirectionalMixer",
    "BidirectionalStack",
    "ContextEmbedding",
    "EquivariantEmbedding",
    "EquivariantStack",
    "GRUMixer",
    "GRUState",
    "GatedFeedForward",
    "LastPooling",
    "LinearAttentionMixer",
    "LinearAttentionState",
    "Mamba2Mixer",
    "Mamba2State",
    "Mamba3Mixer",
    "Mamba3State",
    "MeanPooling",
    "Mixer",
    "PoolingState",
    "RWKVMixer",
    "RWKVState",
    "ResidualBlock",
    "ResidualStack",
    "RetentionMixer",
    "RetentionState",
    "RootMeanSquareNorm",
    "S4DMixer",
    "S4DState",
    "SelectiveMixer",
    "SelectiveState",
    "build_mixer",
    "mixer_options",
    "parameters_without_decay",
    "register_mixer",
]
