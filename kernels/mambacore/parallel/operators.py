"""The core's operators over a sequence that may lie on several ranks; outside of `context_parallel`, as they are."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambacore.backends import compute_dtype, state_dtype
from mambacore.convolution import causal_convolution
from mambacore.devices import widened
from mambacore.parallel.context import active_ranks
from mambacore.parallel.exchange import history_over_ranks, recurrence_over_ranks
from mambacore.scan import selective_scan
from mambacore.scan.reference import positive_step_size
from mambacore.ssd import ssd_scan


def convolution_over_ranks(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mambacore.causal_convolution` of this rank's stretch: outputs, and the whole sequence's final state.

    Arguments and errors are those of the operator; `initial_state` is that before the whole sequence.
    """
    ranks = active_ranks()
    convolution = functools.partial(
        causal_convolution, inputs, weight, bias, silu=silu, reverse=reverse, sequence_starts=sequence_starts
    )
    history = weight.shape[-1] - 1
    if ranks is None or history == 0:
        outputs, outgoing = convolution(initial_state=initial_state, return_final_state=True)
        return outputs, outgoing
    incoming, outgoing = history_over_ranks(ranks, inputs, history, initial_state, reverse, sequence_starts)
    outputs, _ = convolution(initial_state=incoming, return_final_state=True)
    return outputs, outgoing


def scan_over_ranks(
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None = None,
    gate: Tensor | None = None,
    step_bias: Tensor | None = None,
    step_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mambacore.selective_scan` of this rank's stretch: outputs, and the whole sequence's final state.

    Arguments and errors are those of the operator; `initial_state` is that before the whole sequence. Over several
    ranks the scan runs twice, forward and backward: once for the state that a rank hands on, once for the outputs.
    """

    scan = functools.partial(
        selective_scan, inputs, step_size, state_matrix, input_matrix, output_matrix, step_bias=step_bias,
        step_softplus=step_softplus, reverse=reverse, return_final_state=True, sequence_starts=sequence_starts,
    )  # fmt: skip

    def run(initial: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, state = scan(skip_weight=skip_weight, gate=gate, initial_state=initial)
        return outputs, state

    def final_state(initial: Tensor | None) -> Tensor:
        return scan(initial_state=initial)[1]

    def total_decay() -> Tensor:
        # exp(Delta A) over all positions is exp(A * sum of Delta); in float64, since phases grow with the length.
        step = positive_step_size(step_size.to(compute_dtype(inputs.dtype)), step_bias, step_softplus)
        exponent = widened(step).sum(1).unsqueeze(-1) * state_matrix
        return torch.exp(exponent).to(state_dtype(inputs.dtype, state_matrix.is_complex()))

    return recurrence_over_ranks(run, final_state, total_decay, initial_state, sequence_starts, reverse)


def ssd_over_ranks(
    inputs: Tensor,
    log_decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    input_weight: Tensor | None = None,
    own_weight: Tensor | None = None,
    skip_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    sequence_starts: Tensor | None = None,
    entering: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mambacore.ssd_scan` of this rank's stretch: outputs, and the whole sequence's final state.

    Arguments and errors are those of the operator; `initial_state` is that before the whole sequence. `entering`, of
    its shape, is added to the state that arrives at this rank's stretch.
    """

    def run(initial: Tensor | None) -> tuple[Tensor, Tensor]:
        if entering is not None:
            initial = entering if initial is None else initial + entering
        outputs, state = ssd_scan(
            inputs, log_decay, input_matrix, output_matrix, input_weight, own_weight, skip_weight, initial, reverse,
            True, sequence_starts,
        )  # fmt: skip
        return outputs, state

    def total_decay() -> Tensor:
        total = torch.exp(widened(log_decay).sum(1))
        return total.to(compute_dtype(inputs.dtype))[..., None, None]

    return recurrence_over_ranks(
        run, lambda initial: run(initial)[1], total_decay, initial_state, sequence_starts, reverse
    )
