"""The arguments of a scan, listed once for all of its implementations."""

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor


class ScanArguments(NamedTuple):
    """Arguments of every implementation of the scan, checked and converted (`mambacore.scan.operator`).

    `inputs`, `step_size` and `gate` have one dtype; everything else is in the compute dtype over it or, of a complex
    state, the complex numbers over that. For the GPU's kernels the two matrices may be in any dtype that these read.
    """

    inputs: Tensor  # (batch, length, channels)
    step_size: Tensor  # (batch, length, channels)
    state_matrix: Tensor  # (channels, state_size)
    input_matrix: Tensor  # (batch, length, groups, state_size), or (channels, state_size)
    output_matrix: Tensor  # (batch, length, groups, state_size), or (channels, state_size)
    skip_weight: Tensor | None  # (channels,)
    gate: Tensor | None  # (batch, length, channels)
    step_bias: Tensor | None  # (channels,)
    initial_state: Tensor | None  # (batch, channels, state_size)
    resets: Tensor | None  # (batch, length), boolean: where the state that arrives counts as zero
    step_softplus: bool
    reverse: bool

    @property
    def state_size(self) -> int:
        """States per channel; complex ones count once."""
        return self.state_matrix.shape[1]

    @property
    def is_complex(self) -> bool:
        """Whether states are complex numbers."""
        return self.state_matrix.is_complex()

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype; states may be its complex counterpart."""
        return self.state_matrix.dtype.to_real()


class ScanGradients(NamedTuple):
    """Gradients of the tensors of `ScanArguments` in their order; those of absent ones are empty tensors."""

    inputs: Tensor
    step_size: Tensor
    state_matrix: Tensor
    input_matrix: Tensor
    output_matrix: Tensor
    skip_weight: Tensor
    gate: Tensor
    step_bias: Tensor
    initial_state: Tensor  # (batch, channels, state_size), also when the initial state was absent


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool"}


def operator_schema(arguments: type, gradients: type) -> tuple[str, str]:
    """Forward and backward of lists of arguments and gradients, in the language of PyTorch's operator schemas."""
    listed = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())
    results = ", ".join(["Tensor"] * len(get_type_hints(gradients)))
    return (
        f"({listed}, bool keep_boundaries) -> (Tensor, Tensor, Tensor)",
        f"(Tensor grad_outputs, Tensor? grad_final_state, {listed}, Tensor boundary_states) -> ({results})",
    )


FORWARD_SCHEMA, BACKWARD_SCHEMA = operator_schema(ScanArguments, ScanGradients)
