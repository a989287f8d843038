"""What kernels/README.md says of the scan's relatives, shown: each is the scan with some of its freedom taken away."""

import torch
from torch.nn import functional as F

from mambacore import selective_scan
from mambacore.layers.state_matrices import initial_state_matrix
from tolerances import FLOAT64, relative_error

BATCH, LENGTH, KEYS, VALUES = 2, 40, 5, 7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def constant(value, *shape):
    return torch.full(shape, value, dtype=torch.float64)


def gated_recurrence(inputs, gate):
    """h = (1 - g) h + g x (Gu & Dao, arXiv 2312.00752, theorem 1)."""
    state, outputs = torch.zeros_like(inputs[:, 0]), []
    for position in range(inputs.shape[1]):
        state = (1 - gate[:, position]) * state + gate[:, position] * inputs[:, position]
        outputs.append(state)
    return torch.stack(outputs, dim=1)


def scan_of_one_state(inputs, projected, input_matrix):
    """The scan with one state, A = -1, C = 1 and the step softplus(z)."""
    channels = inputs.shape[2]
    return selective_scan(
        inputs, projected, constant(-1.0, channels, 1), input_matrix, constant(1.0, channels, 1), step_softplus=True
    )


def test_with_one_state_the_scan_is_the_gate_of_an_rnn():
    # The theorem discretises B with a zero-order hold, (1 - exp(-step)) / step; the operator's B takes that factor in.
    projected = normal(BATCH, LENGTH, 1, seed=1)
    inputs = normal(BATCH, LENGTH, 1)
    step = F.softplus(projected)
    zero_order_hold = -torch.expm1(-step) / step
    expected = gated_recurrence(inputs, torch.sigmoid(projected))
    assert relative_error(scan_of_one_state(inputs, projected, zero_order_hold), expected) < FLOAT64


def test_with_b_equal_to_one_the_gate_is_met_up_to_eulers_rule():
    # B = 1 as the published code computes it: a step is written instead of 1 - exp(-step), which is less by step^2 / 2.
    projected, inputs = normal(BATCH, LENGTH, 1, seed=1) - 6, normal(BATCH, LENGTH, 1)
    expected = gated_recurrence(inputs, torch.sigmoid(projected))
    found = scan_of_one_state(inputs, projected, constant(1.0, 1, 1))
    largest_step = float(F.softplus(projected).max())
    assert 0 < relative_error(found, expected) < largest_step


def test_a_wide_open_gate_forgets_and_a_closed_one_ignores():
    inputs, closed, opened = normal(1, 3, 1), -50.0, 50.0
    projected = torch.tensor([opened, closed, opened], dtype=torch.float64).reshape(1, 3, 1)
    step = F.softplus(projected)
    found = scan_of_one_state(inputs, projected, -torch.expm1(-step) / step)
    assert relative_error(found, torch.stack([inputs[:, 0], inputs[:, 0], inputs[:, 2]], dim=1)) < FLOAT64


def attention_like_scan(queries, keys, values, state_matrix):
    """Keys write values into a state, queries read them: B = keys, C = queries, x = values, every step 1."""
    return selective_scan(values, torch.ones_like(values), state_matrix, keys, queries)


def test_without_decay_the_scan_is_linear_attention():
    queries, keys, values = (normal(BATCH, LENGTH, width, seed=width) for width in (KEYS, KEYS, VALUES))
    keys = F.elu(keys) + 1
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.float64).tril()
    expected = (
        queries @ keys.mT * mask
    ) @ values  # Katharopoulos et al., arXiv 2006.16236, equation 8 without its divisor
    found = attention_like_scan(queries, keys, values, torch.zeros(VALUES, KEYS, dtype=torch.float64))
    assert relative_error(found, expected) < FLOAT64
    # The divisor is one more channel, into which ones are written.
    ones = torch.ones(BATCH, LENGTH, 1, dtype=torch.float64)
    divisor = attention_like_scan(queries, keys, ones, torch.zeros(1, KEYS, dtype=torch.float64))
    assert relative_error(divisor, (queries @ keys.mT * mask).sum(-1, keepdim=True)) < FLOAT64


def test_with_one_decay_for_all_times_the_scan_is_retention():
    queries, keys, values = (normal(BATCH, LENGTH, width, seed=width) for width in (KEYS, KEYS, VALUES))
    gamma = 0.9
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    decay = torch.where(distance >= 0, gamma ** distance.clamp(min=0).double(), 0.0)
    expected = (queries @ keys.mT * decay) @ values  # Sun et al., arXiv 2307.08621, equation 5
    found = attention_like_scan(queries, keys, values, constant(gamma, VALUES, KEYS).log())
    assert relative_error(found, expected) < FLOAT64


def test_with_a_complex_decay_it_is_retention_with_rotated_keys_and_queries():
    keys, queries = (normal(BATCH, LENGTH, KEYS, seed=seed).to(torch.complex128) for seed in (1, 2))
    values, gamma, angle = normal(BATCH, LENGTH, VALUES), 0.9, 0.3
    turned = torch.exp(1j * angle * torch.arange(LENGTH, dtype=torch.float64))[:, None]
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    decay = torch.where(distance >= 0, gamma ** distance.clamp(min=0).double(), 0.0)
    expected = 2 * ((queries * turned @ (keys * turned.conj()).mT).real * decay) @ values
    state_matrix = torch.complex(constant(gamma, VALUES, KEYS).log(), constant(angle, VALUES, KEYS))
    assert relative_error(attention_like_scan(queries, keys, values, state_matrix), expected) < FLOAT64


def test_with_one_state_a_channel_and_exponential_keys_it_is_the_average_of_rwkv():
    keys, values, rate, bonus = (normal(*shape, seed=len(shape)) for shape in
                                 ((BATCH, LENGTH, VALUES), (BATCH, LENGTH, VALUES), (VALUES,), (VALUES,)))  # fmt: skip
    rate = rate.exp()
    numerator, divisor, expected = 0.0, 0.0, []
    for position in range(LENGTH):  # Peng et al., arXiv 2305.13048, equation 16
        now, boosted = keys[:, position].exp(), (keys[:, position] + bonus).exp()
        expected.append((numerator + boosted * values[:, position]) / (divisor + boosted))
        numerator = numerator * torch.exp(-rate) + now * values[:, position]
        divisor = divisor * torch.exp(-rate) + now

    def before(weighted):
        """What a scan with the decay exp(-rate) holds when a position comes, before it is written and decayed."""
        ones = constant(1.0, VALUES, 1)
        after = selective_scan(weighted, torch.ones_like(weighted), -rate.unsqueeze(1), ones, ones)
        return F.pad(after[:, :-1], (0, 0, 1, 0))

    boosted = (keys + bonus).exp()
    found = (before(keys.exp() * values) + boosted * values) / (before(keys.exp()) + boosted)
    assert relative_error(found, torch.stack(expected, dim=1)) < FLOAT64


def test_with_fixed_matrices_and_steps_it_is_s4d_a_convolution():
    channels, states, step = 3, 4, 0.1
    inputs = normal(1, LENGTH, channels)
    state_matrix = initial_state_matrix("s4d-lin", channels, states, True).to(torch.complex128)
    into, out_of = (torch.complex(normal(channels, states, seed=seed), normal(channels, states, seed=seed + 1))
                    for seed in (3, 5))  # fmt: skip
    powers = torch.exp(step * state_matrix[None] * torch.arange(LENGTH)[:, None, None])
    kernel = 2 * (out_of * into * step * powers).sum(-1).real  # Gu et al., arXiv 2206.11893, equation 5
    expected = torch.stack([(kernel[: t + 1].flip(0) * inputs[0, : t + 1]).sum(0) for t in range(LENGTH)]).unsqueeze(0)
    found = selective_scan(inputs, torch.full_like(inputs, step), state_matrix, into, out_of)
    assert relative_error(found, expected) < FLOAT64
