"""The arguments of the dual scan, listed once for all of its implementations (as `mambacore.scan.arguments`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mambacore.scan.arguments import operator_schema


class SsdArguments(NamedTuple):
    """What a backend is given, checked; rows are positions, each `rank` times (`mambacore.ssd.reference`)."""

    inputs: Tensor  # (batch, rows, heads, head_width)
    log_decay: Tensor  # (batch, length, heads), in the compute dtype, as are all weights and states
    input_matrix: Tensor  # (batch, rows, groups, state_size), in the inputs' dtype
    output_matrix: Tensor  # as `input_matrix`
    input_weight: Tensor  # (batch, length, heads)
    own_weight: Tensor | None  # (batch, length, heads); None for `input_weight`
    skip_weight: Tensor | None  # (heads,)
    initial_state: Tensor | None  # (batch, heads, head_width, state_size); None for zeros
    resets: Tensor | None  # (batch, length), boolean: where the state that arrives counts as zero
    reverse: bool

    @property
    def length(self) -> int:
        """Positions."""
        return self.log_decay.shape[1]

    @property
    def rank(self) -> int:
        """Rows of a position."""
        return self.inputs.shape[1] // self.length if self.length else 1

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, heads, groups, head_width and state_size."""
        batch, _, heads, head_width = self.inputs.shape
        return batch, heads, *self.input_matrix.shape[2:], head_width  # type: ignore[return-value]


class SsdGradients(NamedTuple):
    """Gradients of the tensors of `SsdArguments` in their order; those of absent ones are empty tensors."""

    inputs: Tensor
    log_decay: Tensor
    input_matrix: Tensor
    output_matrix: Tensor
    input_weight: Tensor
    own_weight: Tensor
    skip_weight: Tensor
    initial_state: Tensor  # (batch, heads, head_width, state_size), also when the initial state was absent


FORWARD_SCHEMA, BACKWARD_SCHEMA = operator_schema(SsdArguments, SsdGradients)
