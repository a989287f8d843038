"""Adapter from tensors to the native library's state space dual scan (kernels/native/ssd_kernel.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacore.backends import ELEMENT_TYPES
from mambacore.layout import channels_contiguous, optional_contiguous
from mambacore.native_library import Heads, Library, Ssd
from mambacore.scan.native import as_pointer
from mambacore.ssd.arguments import SsdArguments, SsdGradients
from mambacore.ssd.chunked import boundary_shape, chunk_positions

# Below so many products of numbers a second thread takes longer to start than it saves.
_PRODUCTS_PER_THREAD = 1 << 20


def as_heads(tensor: Tensor) -> Heads:
    """Describe a (batch, rows, heads, width) tensor with contiguous widths to the library."""
    return Heads(tensor.data_ptr(), *tensor.stride()[:3])


def head_ranges(tasks: int, heads_of_group: int, threads: int) -> int:
    """Into how many stretches the heads of a group are cut: no more than it takes to have a task for every thread."""
    fitting = [count for count in range(1, heads_of_group + 1) if heads_of_group % count == 0]
    return next((count for count in fitting if tasks * count >= threads), heads_of_group)


class _Call:
    """The C structure together with the tensors it points to, which must live as long as it does."""

    def __init__(self, arguments: SsdArguments) -> None:
        inputs, rank, length = arguments.inputs, arguments.rank, arguments.length
        self.sequences = [
            channels_contiguous(tensor) for tensor in (inputs, arguments.input_matrix, arguments.output_matrix)
        ]
        self.numbers = [
            optional_contiguous(tensor)
            for tensor in (
                arguments.log_decay, arguments.input_weight, arguments.own_weight, arguments.skip_weight,
                arguments.resets,
            )
        ]  # fmt: skip
        batch, heads, groups, state_size, head_width = arguments.sizes
        products = inputs.numel() * (state_size + 1)
        threads = max(1, min(torch.get_num_threads(), products // _PRODUCTS_PER_THREAD))
        self.scan = Ssd(
            batch=batch, length=length, heads=heads, groups=groups, head_width=head_width, state_size=state_size,
            rank=rank, chunk=min(chunk_positions(rank), length),
            ranges=head_ranges(batch * groups, heads // groups, threads),
            element=ELEMENT_TYPES[inputs.dtype], reverse=arguments.reverse, threads=threads,
            **dict(zip(("inputs", "input_matrix", "output_matrix"), map(as_heads, self.sequences), strict=True)),
            **dict(
                zip(
                    ("log_decay", "input_weight", "own_weight", "skip_weight", "resets"),
                    map(as_pointer, self.numbers),
                    strict=True,
                )
            ),
        )  # fmt: skip


def forward(native: Library, arguments: SsdArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `mambacore.ssd.chunked.forward`, of a sequence that is not empty."""
    call, inputs, log_decay = _Call(arguments), arguments.inputs, arguments.log_decay
    scan = call.scan
    outputs = inputs.new_empty(inputs.shape)
    final_state = log_decay.new_empty(scan.batch, scan.heads, scan.head_width, scan.state_size)
    boundaries = log_decay.new_empty(
        boundary_shape(
            scan.batch, scan.length if keep_boundaries else 0, scan.heads, scan.head_width, scan.state_size, scan.rank
        )
    )
    initial_state = optional_contiguous(arguments.initial_state)
    scan.initial_state, scan.outputs = as_pointer(initial_state), as_heads(outputs)
    scan.final_state = as_pointer(final_state)
    scan.boundary_states = as_pointer(boundaries) if keep_boundaries else None
    native.ssd_forward(scan)
    return outputs, final_state, boundaries


def backward(
    native: Library,
    grad_outputs: Tensor,
    grad_final_state: Tensor | None,
    arguments: SsdArguments,
    boundary_states: Tensor,
) -> SsdGradients:
    """As `mambacore.ssd.chunked.backward`, of a sequence that is not empty."""
    call, inputs, log_decay = _Call(arguments), arguments.inputs, arguments.log_decay
    scan, own_weight = call.scan, arguments.own_weight
    grad_outputs, boundary_states = channels_contiguous(grad_outputs), boundary_states.contiguous()
    grad_final_state = optional_contiguous(grad_final_state)
    grad_inputs = inputs.new_empty(inputs.shape)
    grad_log_decay, grad_input_weight = log_decay.new_empty(log_decay.shape), log_decay.new_empty(log_decay.shape)
    grad_own_weight = log_decay.new_empty(0 if own_weight is None else log_decay.shape)
    partial = (scan.ranges, *arguments.input_matrix.shape)
    grad_input_matrix, grad_output_matrix = log_decay.new_empty(partial), log_decay.new_empty(partial)
    grad_skip_weight = log_decay.new_empty(scan.batch, scan.heads)
    grad_initial_state = log_decay.new_empty(scan.batch, scan.heads, scan.head_width, scan.state_size)
    scan.grad_outputs, scan.grad_inputs = as_heads(grad_outputs), as_heads(grad_inputs)
    scan.boundary_states, scan.grad_final_state = as_pointer(boundary_states), as_pointer(grad_final_state)
    scan.grad_log_decay, scan.grad_input_weight = as_pointer(grad_log_decay), as_pointer(grad_input_weight)
    scan.grad_own_weight = None if own_weight is None else as_pointer(grad_own_weight)
    scan.grad_input_matrix, scan.grad_output_matrix = as_pointer(grad_input_matrix), as_pointer(grad_output_matrix)
    scan.grad_skip_weight, scan.grad_initial_state = as_pointer(grad_skip_weight), as_pointer(grad_initial_state)
    native.ssd_backward(scan)
    return SsdGradients(
        grad_inputs,
        grad_log_decay,
        grad_input_matrix.sum(0).to(inputs.dtype),
        grad_output_matrix.sum(0).to(inputs.dtype),
        grad_input_weight,
        grad_own_weight,
        log_decay.new_empty(0) if arguments.skip_weight is None else grad_skip_weight.sum(0),
        grad_initial_state,
    )
