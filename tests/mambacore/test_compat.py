"""The published functions equal their published definitions, written out position by position in float64."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from mambacore.compat import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn, selective_state_update
from mambacore.errors import InputError
from tolerances import FLOAT64, relative_error

BATCH, CHANNELS, STATES, LENGTH, RANK, MODEL = 2, 6, 3, 17, 2, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_turn(pairs):
    """(..., 2 l) numbers as (..., l) complex ones."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())


def per_channel(matrix, is_complex, u):
    """B or C as (b, d, n, l)."""
    batch, channels, length = u.shape
    if matrix.dim() == 2:
        return matrix[None, :, :, None].expand(batch, -1, -1, length)
    matrix = in_turn(matrix) if is_complex else matrix
    if matrix.dim() == 3:
        return matrix[:, None].expand(-1, channels, -1, -1)
    return matrix.repeat_interleave(channels // matrix.shape[1], dim=1)


def scan_by_hand(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):  # noqa: N803
    """h = exp(Delta A) h + Delta B u, y = C h (twice its real part if complex), + D u, times silu(z)."""
    batch, channels, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    matrices = [per_channel(matrix, A.is_complex(), u) for matrix in (B, C)]
    state = torch.zeros(batch, channels, A.shape[1], dtype=A.dtype) if state is None else state
    outputs = []
    for position in range(length):
        step = delta[:, :, position, None]
        state = torch.exp(step * A) * state + step * matrices[0][..., position] * u[:, :, position, None]
        read = (matrices[1][..., position] * state).sum(-1)
        outputs.append(2 * read.real if A.is_complex() else read)
    y = torch.stack(outputs, dim=-1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def scan_arguments(kind):
    numbers = 2 * LENGTH if "complex" in kind else LENGTH
    decay = -normal(CHANNELS, STATES, seed=3).exp()
    arguments = {
        "u": normal(BATCH, CHANNELS, LENGTH),
        "delta": normal(BATCH, CHANNELS, LENGTH, seed=2),
        "A": torch.complex(decay, normal(CHANNELS, STATES, seed=4)) if "complex" in kind else decay,
        "B": normal(BATCH, STATES, numbers, seed=5),
        "C": normal(BATCH, STATES, numbers, seed=6),
        "D": normal(CHANNELS, seed=7),
        "z": normal(BATCH, CHANNELS, LENGTH, seed=8),
        "delta_bias": normal(CHANNELS, seed=9),
    }
    if "groups" in kind:
        arguments |= {name: normal(BATCH, 3, STATES, numbers, seed=10 + len(name)) for name in ("B", "C")}
    if "fixed" in kind:
        arguments |= {"B": normal(CHANNELS, STATES, seed=5).to(arguments["A"].dtype)}
    if "bare" in kind:
        arguments |= {"D": None, "z": None, "delta_bias": None}
    return arguments


@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize(
    "kind", ["real", "bare", "groups", "fixed", "complex", "complex groups", "complex fixed", "complex bare"]
)
def test_the_scan_is_the_published_one_with_gradients(kind, delta_softplus):
    arguments = scan_arguments(kind)
    leaves = [tensor.requires_grad_() for tensor in arguments.values() if tensor is not None]
    found, state = selective_scan_fn(**arguments, delta_softplus=delta_softplus, return_last_state=True)
    expected, expected_state = scan_by_hand(**arguments, delta_softplus=delta_softplus)
    assert relative_error(found, expected) < FLOAT64 and relative_error(state, expected_state) < FLOAT64
    assert torch.equal(selective_scan_fn(**arguments, delta_softplus=delta_softplus), found)
    weights = normal(*found.shape, seed=20)
    gradients = [torch.autograd.grad((one * weights).sum(), leaves) for one in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 10 * FLOAT64


@pytest.mark.parametrize("kind", ["published", "given B and C", "norms and biases", "complex"])
def test_the_block_is_the_published_one(kind):
    numbers = STATES * (2 if kind == "complex" else 1)
    arguments = {
        "xz": normal(BATCH, 2 * CHANNELS, LENGTH),
        "conv1d_weight": normal(CHANNELS, 1, 4, seed=1),
        "conv1d_bias": normal(CHANNELS, seed=2),
        "x_proj_weight": normal(RANK + 2 * numbers, CHANNELS, seed=3),
        "delta_proj_weight": normal(CHANNELS, RANK, seed=4),
        "out_proj_weight": normal(MODEL, CHANNELS, seed=5),
        "out_proj_bias": normal(MODEL, seed=6),
        "A": scan_arguments(kind)["A"],
        "D": normal(CHANNELS, seed=7),
        "delta_bias": normal(CHANNELS, seed=8),
    }
    if kind == "given B and C":
        arguments |= {"B": normal(BATCH, STATES, LENGTH, seed=9), "C": normal(CHANNELS, STATES, seed=10)}
    if kind == "norms and biases":
        arguments |= {
            "B_proj_bias": normal(STATES, seed=11), "C_proj_bias": normal(STATES, seed=12),
            "b_rms_weight": normal(STATES, seed=13), "c_rms_weight": normal(STATES, seed=14),
            "dt_rms_weight": normal(RANK, seed=15),
        }  # fmt: skip

    def normed(matrix, weight):
        return matrix if weight is None else matrix * (matrix.square().mean(-1, True) + 1e-6).rsqrt() * weight

    x, z = arguments["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), arguments["conv1d_weight"], arguments["conv1d_bias"], groups=CHANNELS))
    selected = torch.einsum("bdl,ed->ble", x, arguments["x_proj_weight"])
    low_rank = normed(selected[..., :RANK], arguments.get("dt_rms_weight"))
    matrices = {}
    for name, first in (("B", RANK), ("C", RANK + numbers)):
        matrix = selected[..., first : first + numbers]
        if f"{name}_proj_bias" in arguments:
            matrix = matrix + arguments[f"{name}_proj_bias"]
        matrix = normed(matrix, arguments.get(f"{name.lower()}_rms_weight"))
        matrix = matrix.unflatten(-1, (STATES, -1)).permute(0, 2, 1, 3).flatten(2)
        matrices[name] = arguments.get(name, matrix)
    delta = torch.einsum("dr,blr->bdl", arguments["delta_proj_weight"], low_rank)
    y, _ = scan_by_hand(
        x, delta, arguments["A"], **matrices, D=arguments["D"], z=z, delta_bias=arguments["delta_bias"],
        delta_softplus=True,
    )  # fmt: skip
    expected = F.linear(y.transpose(1, 2), arguments["out_proj_weight"], arguments["out_proj_bias"])
    assert relative_error(mamba_inner_fn(**arguments), expected) < 10 * FLOAT64


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_convolution_is_the_published_one(width, activation):
    x, weight, bias = normal(BATCH, CHANNELS, LENGTH), normal(CHANNELS, width, seed=1), normal(CHANNELS, seed=2)
    before = normal(BATCH, CHANNELS, width - 1, seed=3)
    extended = torch.cat([before, x], dim=-1)
    expected = F.conv1d(extended, weight[:, None], bias, groups=CHANNELS)
    expected = expected if activation is None else F.silu(expected)
    room = torch.empty(BATCH, CHANNELS, width - 1, dtype=torch.float64)
    found, state = causal_conv1d_fn(
        x, weight, bias, None, before, return_final_states=True, final_states_out=room, activation=activation
    )
    assert relative_error(found, expected) < FLOAT64
    assert torch.equal(state, extended[..., LENGTH:]) and torch.equal(room, state)
    assert torch.equal(causal_conv1d_fn(x, weight, bias, initial_states=before, activation=activation), found)


def test_no_tap_of_the_convolution_reaches_into_another_record():
    x, weight = normal(BATCH, CHANNELS, LENGTH), normal(CHANNELS, 4, seed=1)
    seq_idx = torch.tensor([[0] * 5 + [1] * 10 + [-1] * 2, [3] * 17], dtype=torch.int32)
    found = causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    alone = [(0, 0, 5), (0, 5, 15), (1, 0, 17)]
    for row, begin, end in alone:
        expected = causal_conv1d_fn(x[row : row + 1, :, begin:end], weight)
        assert relative_error(found[row : row + 1, :, begin:end], expected) < FLOAT64
    assert (found[0, :, 15:] == 0).all()


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("indices", [None, [3, 0]])
@pytest.mark.parametrize("dt_softplus", [False, True])
def test_one_position_is_the_published_one_and_writes_the_state(heads, indices, dt_softplus):
    of_heads = () if heads is None else (heads,)
    groups = () if heads is None else (2,)
    state = normal(5 if indices else BATCH, *of_heads, CHANNELS, STATES)
    before = state.clone()
    arguments = {
        "x": normal(BATCH, *of_heads, CHANNELS, seed=1), "dt": normal(BATCH, *of_heads, CHANNELS, seed=2),
        "A": -normal(*of_heads, CHANNELS, STATES, seed=3).exp(), "B": normal(BATCH, *groups, STATES, seed=4),
        "C": normal(BATCH, *groups, STATES, seed=5), "D": normal(*of_heads, CHANNELS, seed=6),
        "z": normal(BATCH, *of_heads, CHANNELS, seed=7), "dt_bias": normal(*of_heads, CHANNELS, seed=8),
    }  # fmt: skip
    rows = None if indices is None else torch.tensor(indices, dtype=torch.int32)
    found = selective_state_update(state, **arguments, dt_softplus=dt_softplus, state_batch_indices=rows)
    step = arguments["dt"] + arguments["dt_bias"]
    step = (F.softplus(step) if dt_softplus else step).unsqueeze(-1)
    into, out_of = arguments["B"], arguments["C"]
    if heads is not None:
        into, out_of = (matrix.repeat_interleave(heads // 2, dim=1) for matrix in (into, out_of))
    held = before if indices is None else before[indices]
    new = torch.exp(step * arguments["A"]) * held + step * into.unsqueeze(-2) * arguments["x"].unsqueeze(-1)
    expected = (new * out_of.unsqueeze(-2)).sum(-1) + arguments["D"] * arguments["x"]
    assert relative_error(found, expected * F.silu(arguments["z"])) < FLOAT64
    assert relative_error(state if indices is None else state[indices], new) < FLOAT64
    if indices is not None:
        others = [1, 2, 4]
        assert torch.equal(state[others], before[others])


def test_a_state_of_fewer_bits_is_updated_in_its_own_dtype():
    state = torch.zeros(BATCH, CHANNELS, STATES, dtype=torch.bfloat16)
    x = normal(BATCH, CHANNELS).bfloat16()
    matrix = normal(BATCH, STATES, seed=1).bfloat16()
    outputs = selective_state_update(state, x, x.abs(), -torch.ones(CHANNELS, STATES), matrix, matrix)
    assert outputs.dtype == state.dtype == torch.bfloat16 and state.abs().max() > 0


def test_signatures_are_the_published_ones():
    assert list(inspect.signature(selective_scan_fn).parameters) == [
        "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state",
    ]  # fmt: skip
    assert list(inspect.signature(mamba_inner_fn).parameters)[:14] == [
        "xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "out_proj_bias",
        "A", "B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias",
    ]  # fmt: skip
    assert list(inspect.signature(causal_conv1d_fn).parameters) == [
        "x", "weight", "bias", "seq_idx", "initial_states", "return_final_states", "final_states_out", "activation",
    ]  # fmt: skip
    assert list(inspect.signature(selective_state_update).parameters) == [
        "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "state_batch_indices",
    ]  # fmt: skip


SCAN = scan_arguments("real")
ONE_RECORD = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
CONVOLUTION = {"x": normal(BATCH, CHANNELS, LENGTH), "weight": normal(CHANNELS, 4)}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (selective_scan_fn, SCAN | {"u": SCAN["u"][0]}, "u must be"),
        (selective_scan_fn, SCAN | {"delta": SCAN["delta"].transpose(1, 2)}, "delta must have the shape"),
        (selective_scan_fn, SCAN | {"B": SCAN["B"].transpose(1, 2)}, "input_matrix must be"),
        (selective_scan_fn, SCAN | {"B": SCAN["B"][0, 0]}, "B must be"),
        (selective_scan_fn, SCAN | {"A": scan_arguments("complex")["A"]}, "real and imaginary parts interleaved"),
        (causal_conv1d_fn, CONVOLUTION | {"activation": "relu"}, "activation must be None"),
        (causal_conv1d_fn, CONVOLUTION | {"x": CONVOLUTION["x"][0]}, "x must be"),
        (causal_conv1d_fn, CONVOLUTION | {"seq_idx": torch.zeros(BATCH, 3, dtype=torch.int32)}, "seq_idx must be"),
        (causal_conv1d_fn, CONVOLUTION | {"final_states_out": torch.zeros(1)}, "final_states_out must have shape"),
        (
            causal_conv1d_fn,
            CONVOLUTION | {"seq_idx": ONE_RECORD, "initial_states": torch.zeros(BATCH, CHANNELS, 3)},
            "give only one of them",
        ),
        (
            selective_state_update,
            {"state": torch.zeros(2, 3, 4), "x": torch.zeros(3, 3), "dt": torch.zeros(3, 3), "A": torch.zeros(3, 4),
             "B": torch.zeros(3, 4), "C": torch.zeros(3, 4)},
            "to fit the state",
        ),
        (
            mamba_inner_fn,
            {"xz": torch.zeros(2, 5, 4), "conv1d_weight": torch.zeros(3, 1, 4), "conv1d_bias": None,
             "x_proj_weight": torch.zeros(8, 3), "delta_proj_weight": torch.zeros(3, 2),
             "out_proj_weight": torch.zeros(5, 3), "out_proj_bias": None, "A": torch.zeros(3, 3)},
            "xz must be",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)
    assert issubclass(InputError, ValueError)
