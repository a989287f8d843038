"""The scan of the mamba-ssm package as an optional backend for CUDA tensors.

It is imported when it is first asked for: by name (`use_backend("mamba_ssm")`), by `backends()`, or because CUDA
tensors come. Its absence, or a build that cannot be imported (the package on the index needs a compiled CUDA extension
even to be imported), is a reason to use another backend, never an error by itself.

Features that its operator lacks (state resets, initial states, gradients of final states, reverse scans, float64) are
left to the other backends, or are an error if this one is requested by name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambacore.scan.arguments import ScanArguments

# The kernel's own limit (selective_scan.cpp: "selective_scan only supports state dimension <= 256").
LARGEST_STATE_SIZE = 256


@functools.cache
def scan_function() -> tuple[Callable[..., Any] | None, str]:
    """mamba-ssm's `selective_scan_fn` and `""`, or None and the reason why it cannot be used."""
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        return module.selective_scan_fn, ""
    except ModuleNotFoundError as error:
        if error.name == "mamba_ssm":
            return None, "mamba-ssm is not installed (pip install 'genomamba[cuda]')"
        return None, f"mamba-ssm cannot be imported: {error}"
    except Exception as error:  # a broken extension raises whatever it likes: OSError, AttributeError, ...
        return None, f"mamba-ssm cannot be imported: {error}"


def refusal(arguments: ScanArguments) -> str:
    """Return why its operator does not support these arguments, or `""`."""
    cannot = {
        "start from a state": arguments.initial_state is not None,
        "reset states between records": arguments.resets is not None,
        "walk in reverse": arguments.reverse,
        "compute in float64": arguments.inputs.dtype == torch.float64,
        f"keep more than {LARGEST_STATE_SIZE} states": arguments.state_size > LARGEST_STATE_SIZE,
        "scan an empty sequence": arguments.inputs.numel() == 0,
    }
    return next((what for what, holds in cannot.items() if holds), "")


def scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Outputs (batch, length, channels) and the final state through mamba-ssm's operator.

    Its layout is (batch, channels, length) and (batch, groups, state_size, length). It drops the final state's
    gradient; here, a gradient that reaches the final state raises a RuntimeError.
    """
    function, reason = scan_function()
    if function is None:
        raise RuntimeError(f"the mamba_ssm backend was requested but cannot be used: {reason}")
    outputs, state = function(
        _channels_first(arguments.inputs),
        _channels_first(arguments.step_size),
        arguments.state_matrix,
        _states_first(arguments.input_matrix, arguments.inputs.dtype),
        _states_first(arguments.output_matrix, arguments.inputs.dtype),
        arguments.skip_weight,
        None if arguments.gate is None else _channels_first(arguments.gate),
        arguments.step_bias,
        arguments.step_softplus,
        return_last_state=True,
    )
    state = state.detach()
    return outputs.transpose(1, 2), _NoGradient.apply(state, outputs) if outputs.requires_grad else state


class _NoGradient(torch.autograd.Function):
    """Returns a state as if it depended on the outputs, and raises if its gradient is needed."""

    @staticmethod
    def forward(ctx, state, outputs):
        return state.clone()

    @staticmethod
    def backward(ctx, grad_state):
        raise RuntimeError("mamba-ssm has no gradient for the final state; use another backend to train across states")


def _channels_first(sequence: Tensor) -> Tensor:
    return sequence.transpose(1, 2).contiguous()


def _states_first(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in its layout: fixed ones as they are, complex ones with both parts along the length."""
    if matrix.dim() == 2:
        return matrix
    if matrix.is_complex():
        numbers = torch.view_as_real(matrix.resolve_conj().permute(0, 2, 3, 1).contiguous())
        return numbers.flatten(-2).contiguous()
    return matrix.permute(0, 2, 3, 1).to(dtype).contiguous()
