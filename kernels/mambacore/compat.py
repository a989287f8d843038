"""The functions of `mamba_ssm` and `causal_conv1d`, under their names and with their layouts, on this core's operators.

    from mambacore.compat import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn, selective_state_update

Code written for those packages then runs on any device, including gradients. Their names and orders of
dimensions are used only in this module: b is the batch, d the channels, l the length, n the state size, g the groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.convolution import causal_convolution
from mambacore.errors import InputError
from mambacore.layers.norm import root_mean_square_norm
from mambacore.layers.selective import as_complex
from mambacore.scan import selective_scan

ACTIVATIONS = (None, "silu", "swish")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,  # noqa: N803  the published names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_fn` (see `mambacore.selective_scan` for the equations).

    Args:
        u: (b, d, l).
        delta: (b, d, l).
        A: (d, n), real or complex.
        B: (d, n), (b, n, l) or (b, g, n, l). With a complex A, the last dimension of the latter two interleaves real
            and imaginary parts: its size is 2 l.
        C: like B.
        D: (d,).
        z: (b, d, l), the gate.
        delta_bias: (d,).
        delta_softplus: apply softplus to the step size.
        return_last_state: also return the state after the last position.

    Returns:
        (b, d, l) in the dtype of u and, if requested, the state (b, d, n).

    Raises:
        InputError: if a tensor is not as above.
    """
    if u.dim() != 3:
        raise InputError(f"u must be (batch, channels, length) but has shape {tuple(u.shape)}")
    complex_state, length = A.is_complex(), u.shape[2]
    found = selective_scan(
        u.transpose(1, 2),
        _length_second("delta", delta, u),
        A,
        _matrix("B", B, complex_state, length),
        _matrix("C", C, complex_state, length),
        D,
        None if z is None else _length_second("z", z, u),
        delta_bias,
        delta_softplus,
        return_final_state=return_last_state,
    )
    if isinstance(found, Tensor):
        return found.transpose(1, 2)
    outputs, state = found
    return outputs.transpose(1, 2), state


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,  # noqa: N803
    B: Tensor | None = None,  # noqa: N803
    C: Tensor | None = None,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,  # noqa: N803
    C_proj_bias: Tensor | None = None,  # noqa: N803
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`mamba_ssm.ops.selective_scan_interface.mamba_inner_fn`: a Mamba block after its input projection.

    Args:
        xz: (b, 2 d, l), the inputs and the gate.
        conv1d_weight: (d, 1, width).
        conv1d_bias: (d,).
        x_proj_weight: (step_rank + 2 n, d) for the step size, B and C; with a complex A, 4 n instead of 2 n.
        delta_proj_weight: (d, step_rank).
        out_proj_weight: (model_width, d).
        out_proj_bias: (model_width,).
        A, B, C, D, delta_bias, delta_softplus: see `selective_scan_fn`. B and C are computed from the inputs if None.
        B_proj_bias, C_proj_bias: (n,), added to the computed B and C.
        checkpoint_lvl: ignored; in the published kernel it selects what is recomputed.
        b_rms_weight, c_rms_weight, dt_rms_weight: root-mean-square norms of B, C and the low-rank step.
        b_c_dt_rms_eps: their epsilon.

    Returns:
        (b, l, model_width).

    Raises:
        InputError: if a tensor is not as above.
    """
    if xz.dim() != 3 or xz.shape[1] % 2 or conv1d_weight.dim() != 3 or conv1d_weight.shape[1] != 1:
        raise InputError(
            "xz must be (batch, 2 * channels, length) and conv1d_weight (channels, 1, width) but they have shapes "
            f"{tuple(xz.shape)} and {tuple(conv1d_weight.shape)}"
        )
    inputs, gate = xz.transpose(1, 2).chunk(2, dim=-1)
    convolved = causal_convolution(inputs, conv1d_weight.squeeze(1), conv1d_bias, silu=True)
    assert isinstance(convolved, Tensor)  # no state was requested
    numbers = A.shape[-1] * (2 if A.is_complex() else 1)
    rank = delta_proj_weight.shape[1]
    if x_proj_weight.shape[0] != rank + 2 * numbers:
        raise InputError(
            f"x_proj_weight must have {rank} + 2 * {numbers} rows, for the step size, B and C, but has "
            f"{x_proj_weight.shape[0]}"
        )
    selected = F.linear(convolved, x_proj_weight)
    step, into, out_of = selected.split([rank, numbers, numbers], dim=-1)
    if dt_rms_weight is not None:
        step = root_mean_square_norm(step, dt_rms_weight, b_c_dt_rms_eps)
    matrices = []
    for given, computed, bias, norm in (
        (B, into, B_proj_bias, b_rms_weight),
        (C, out_of, C_proj_bias, c_rms_weight),
    ):
        if given is not None:
            matrices.append(_matrix("B and C", given, A.is_complex(), xz.shape[2]))
            continue
        matrix = computed if bias is None else computed + bias.to(computed.dtype)
        if norm is not None:
            matrix = root_mean_square_norm(matrix, norm, b_c_dt_rms_eps)
        matrices.append(as_complex(matrix) if A.is_complex() else matrix)
    outputs = selective_scan(
        convolved, F.linear(step, delta_proj_weight), A, matrices[0], matrices[1], D, gate, delta_bias, delta_softplus
    )
    assert isinstance(outputs, Tensor)
    return F.linear(outputs, out_proj_weight, out_proj_bias)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d.causal_conv1d_fn`.

    Args:
        x: (b, d, l).
        weight: (d, width).
        bias: (d,).
        seq_idx: (b, l), integers: positions with the same number belong to one record, and no tap reaches into another.
            Negative numbers mark padding, whose outputs are zero.
        initial_states: (b, d, width - 1), the inputs before the first; not together with seq_idx.
        return_final_states: also return the last width - 1 inputs, (b, d, width - 1).
        final_states_out: (b, d, width - 1), output tensor for these.
        activation: None, "silu" or "swish", which is the same.

    Returns:
        (b, d, l) and, if requested, the final states.

    Raises:
        InputError: if a tensor is not as above, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be None, 'silu' or 'swish' but is {activation!r}")
    if x.dim() != 3:
        raise InputError(f"x must be (batch, channels, length) but has shape {tuple(x.shape)}")
    if seq_idx is not None and initial_states is not None:
        raise InputError("initial_states precede the first record but seq_idx begins a new one; give only one of them")
    starts = None if seq_idx is None else _starts(seq_idx, x)
    outputs, state = causal_convolution(
        x.transpose(1, 2),
        weight,
        bias,
        silu=activation is not None,
        initial_state=None if initial_states is None else initial_states.transpose(1, 2),
        return_final_state=True,
        sequence_starts=starts,
    )
    outputs, state = outputs.transpose(1, 2), state.transpose(1, 2)
    if seq_idx is not None:
        outputs = outputs.masked_fill(seq_idx.unsqueeze(1) < 0, 0.0)
    if final_states_out is not None:
        if final_states_out.shape != state.shape:
            raise InputError(
                f"final_states_out must have shape {tuple(state.shape)} but has {tuple(final_states_out.shape)}"
            )
        state = final_states_out.copy_(state)
    return (outputs, state) if return_final_states else outputs


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`mamba_ssm.ops.triton.selective_state_update.selective_state_update`: one position, the state in place.

    Args:
        state: (b, d, n), or (b, heads, d, n) with a dimension of heads in all other tensors as well. Modified in place.
        x: (b, d).
        dt: (b, d).
        A: (d, n).
        B: (b, n), or (b, g, n) with heads, g of which divide the heads.
        C: like B.
        D: (d,).
        z: (b, d), the gate.
        dt_bias: (d,).
        dt_softplus: apply softplus to the step size.
        state_batch_indices: (b,), distinct integers: the rows of a larger state that belong to these sequences.

    Returns:
        As `x`.

    Raises:
        InputError: if a tensor is not as above.
    """
    if state.dim() not in (3, 4) or x.dim() != state.dim() - 1:
        raise InputError(
            "state must be (batch, channels, state_size) beside x (batch, channels), or both with heads after the "
            f"batch, but they have shapes {tuple(state.shape)} and {tuple(x.shape)}"
        )
    rows = state if state_batch_indices is None else state[state_batch_indices.long()]
    if rows.shape[:-1] != x.shape:
        raise InputError(f"x must have shape {tuple(rows.shape[:-1])} to fit the state but has {tuple(x.shape)}")

    def per_channel(tensor: Tensor | None, kept: int) -> Tensor | None:
        """Flatten heads and their channels to one dimension after `kept` others."""
        return tensor if tensor is None or state.dim() == 3 else tensor.flatten(kept, kept + 1)

    inputs, step, gate = (
        None if tensor is None else tensor.unsqueeze(1)
        for tensor in (per_channel(x, 1), per_channel(dt, 1), per_channel(z, 1))
    )
    decay_rates, held = per_channel(A, 0), per_channel(rows, 1)
    assert inputs is not None and step is not None and decay_rates is not None and held is not None  # all were given
    outputs, new = selective_scan(
        inputs,
        step,
        decay_rates,
        B.unsqueeze(1),
        C.unsqueeze(1),
        per_channel(D, 0),
        gate,
        per_channel(dt_bias, 0),
        dt_softplus,
        initial_state=held,
        return_final_state=True,
    )
    new = new.view(rows.shape).to(state.dtype)
    with torch.no_grad():
        if state_batch_indices is None:
            state.copy_(new)
        else:
            state[state_batch_indices.long()] = new
    return outputs.view(x.shape)


def _length_second(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape != like.shape:
        raise InputError(f"{name} must have the shape {tuple(like.shape)} of u but has {tuple(tensor.shape)}")
    return tensor.transpose(1, 2)


def _matrix(name: str, matrix: Tensor, complex_state: bool, length: int) -> Tensor:
    """Convert B or C to the core's layout: (batch, length, groups, state_size), or unchanged if time-invariant."""
    if matrix.dim() == 2:
        return matrix
    if matrix.dim() not in (3, 4):
        raise InputError(
            f"{name} must be (channels, state_size), (batch, state_size, length) or (batch, groups, state_size, "
            f"length) but has shape {tuple(matrix.shape)}"
        )
    if complex_state and not matrix.is_complex():
        if matrix.shape[-1] != 2 * length:
            raise InputError(
                f"{name} must have {2 * length} numbers along the length, real and imaginary parts interleaved, not "
                f"{matrix.shape[-1]}"
            )
        matrix = as_complex(matrix)
    return matrix.transpose(1, 2) if matrix.dim() == 3 else matrix.permute(0, 3, 1, 2)


def _starts(seq_idx: Tensor, inputs: Tensor) -> Tensor:
    """Return where records begin in (batch, channels, length) inputs: (batch, length), boolean."""
    if seq_idx.shape != (inputs.shape[0], inputs.shape[2]) or seq_idx.is_floating_point():
        raise InputError(
            f"seq_idx must be integers of shape {(inputs.shape[0], inputs.shape[2])} but is {seq_idx.dtype} of shape "
            f"{tuple(seq_idx.shape)}"
        )
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts
