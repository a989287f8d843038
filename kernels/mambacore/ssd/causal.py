"""What is not finite reaches no earlier position of a dual scan (`mambacore.non_finite`), whatever backend computes."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from mambacore.non_finite import cleaned, spoiled_since, taint_of
from mambacore.ssd.arguments import SsdArguments

Forward = Callable[[SsdArguments, bool], tuple[Tensor, Tensor, Tensor]]


def forward(compute: Forward, arguments: SsdArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `mambacore.ssd.chunked.forward`, by way of `compute`, which multiplies whole chunks.

    Where what a head writes into its state is not finite, its outputs are NaN from that position on, and its final
    state, to the end of the record. An output matrix or `own_weight` concerns its own position alone.
    """
    inputs, log_decay, input_matrix = arguments[:3]
    input_weight = arguments.input_weight
    # A sum is not finite where one of its terms is not, and takes a small part of the time of the scan.
    written = (inputs, log_decay, input_matrix, input_weight)
    if arguments.length == 1 or all(math.isfinite(float(tensor.sum())) for tensor in written):
        return compute(arguments, keep_boundaries)
    reverse, resets = arguments.reverse, arguments.resets
    batch, length, heads = log_decay.shape
    of_groups = taint_of(input_matrix.unflatten(1, (length, -1)), (2, 4)).reshape(batch, length, -1)
    taint = taint_of(inputs.unflatten(1, (length, -1)), (2, 4)).reshape(batch, length, heads).to(log_decay.dtype)
    taint = taint + of_groups.to(log_decay.dtype).repeat_interleave(heads // of_groups.shape[2], dim=2)
    taint, of_weight = taint + (log_decay - log_decay), input_weight - input_weight
    if reverse:
        taint, of_weight = taint.flip(1), of_weight.flip(1)
    record = None
    if resets is not None:
        record = (resets.flip(1) if reverse else resets).cumsum(1).unsqueeze(2).expand_as(taint)
    spoiled = after = spoiled_since(taint + of_weight, record, 1)
    if arguments.own_weight is not None:  # the other weight only shows in the outputs from the next position on
        late = spoiled_since(of_weight, record, 1).roll(1, 1)
        late[:, :1] = 0
        if record is not None:
            late[:, 1:].masked_fill_(record[:, 1:] != record[:, :-1], 0.0)
        spoiled = spoiled_since(taint, record, 1) + late
    finite = arguments._replace(
        inputs=cleaned(inputs), log_decay=cleaned(log_decay), input_matrix=cleaned(input_matrix),
        input_weight=cleaned(input_weight),
    )  # fmt: skip
    outputs, final_state, boundaries = compute(finite, keep_boundaries)
    final_state = final_state + after[:, -1, :, None, None]
    spoiled = (spoiled.flip(1) if reverse else spoiled).repeat_interleave(arguments.rank, dim=1)
    return outputs + spoiled.unsqueeze(-1).to(outputs.dtype), final_state, boundaries
