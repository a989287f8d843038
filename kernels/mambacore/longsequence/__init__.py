"""Exact training on sequences of any length in bounded memory: backpropagation piece by piece.

    from mambacore.longsequence import backward_in_pieces, next_token_cross_entropy

    result = backward_in_pieces(model, tokens, next_token_cross_entropy(tokens), piece_length=4096)
    optimizer.step()

`.grad` is then that of a backward pass over the whole sequence, without truncation.
"""

from mambacore.longsequence.distributed import average_gradients
from mambacore.longsequence.losses import (
    PooledLoss,
    TokenCrossEntropy,
    next_token_cross_entropy,
    next_token_targets,
    pooled_cross_entropy,
)
from mambacore.longsequence.pieces import PIECE_LENGTH, backward_in_pieces
from mambacore.longsequence.reference import LongSequenceResult, backward_at_once

__all__ = [
    "PIECE_LENGTH",
    "LongSequenceResult",
    "PooledLoss",
    "TokenCrossEntropy",
    "average_gradients",
    "backward_at_once",
    "backward_in_pieces",
    "next_token_cross_entropy",
    "next_token_targets",
    "pooled_cross_entropy",
]
