"""Every mixer equals its paper's recurrence, written out position by position in float64; and is chosen by its name."""

import math

import pytest
import torch
from torch.nn import functional as F

from mambacore import use_backend
from mambacore.errors import InputError
from mambacore.layers import MIXERS, ResidualStack, build_mixer, mixer_options, parameters_without_decay, s4d
from mambacore.layers.attention import head_count, rotated
from mambacore.layers.rwkv import weighted_averages
from tolerances import BFLOAT16_LAYERS, COMPLEX_FLOAT32, FLOAT32, FLOAT64, RESAMPLED, relative_error

LENGTH = 150


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def selective_reference(mixer, sequence):
    """Convolution, selection, h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t, y = C_t h + D x, and the gate."""
    inputs, gate = mixer.input_projection(sequence).chunk(2, dim=-1)
    width = mixer.convolution_weight.shape[1]
    extended = F.pad(inputs, (0, 0, width - 1, 0))
    taps = [extended[:, tap : tap + inputs.shape[1]] * mixer.convolution_weight[:, tap] for tap in range(width)]
    inputs = sum(taps) if mixer.convolution_bias is None else sum(taps) + mixer.convolution_bias
    inputs = inputs * torch.sigmoid(inputs)
    matrix = -mixer.log_decay_rate.exp()
    if mixer.complex_state:
        matrix = matrix + 1j * mixer.frequency
    state, outputs = torch.zeros(len(sequence), *matrix.shape, dtype=matrix.dtype), []
    for now in inputs.unbind(1):
        selected = None if mixer.selection_projection is None else mixer.selection_projection(now)
        step = mixer.step_bias
        if "step" in mixer.selective:
            step = mixer.step_projection(selected[:, : mixer.step_rank]) + step
            selected = selected[:, mixer.step_rank :]
        step = F.softplus(step).unsqueeze(-1)
        write = selected[:, : mixer.matrix_width].unsqueeze(1) if "input" in mixer.selective else mixer.input_matrix
        read = selected[:, -mixer.matrix_width :].unsqueeze(1) if "output" in mixer.selective else mixer.output_matrix
        if mixer.complex_state:
            write, read = (pairs[..., 0::2] + 1j * pairs[..., 1::2] for pairs in (write, read))
        state = torch.exp(step * matrix) * state + step * now.unsqueeze(-1) * write
        product = (state * read).sum(-1)
        outputs.append((2 * product.real if mixer.complex_state else product) + mixer.skip_weight * now)
    return mixer.output_projection(torch.stack(outputs, dim=1) * F.silu(gate))


def mamba2_reference(mixer, sequence):
    """Convolution of x, B, C; h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T by head; norm of (h C + D x) silu(z)."""
    inner, states, groups, heads = mixer.inner_width, mixer.state_size, mixer.groups, mixer.heads
    gate, mixed, raw_step = mixer.input_projection(sequence).tensor_split([inner, -heads], dim=-1)
    width = mixer.convolution_weight.shape[1]
    extended = F.pad(mixed, (0, 0, width - 1, 0))
    taps = [extended[:, tap : tap + mixed.shape[1]] * mixer.convolution_weight[:, tap] for tap in range(width)]
    mixed = F.silu(sum(taps) if mixer.convolution_bias is None else sum(taps) + mixer.convolution_bias)
    step = F.softplus(raw_step + mixer.step_bias)
    if mixer.step_limits is not None:
        step = step.clamp(*mixer.step_limits)
    state, outputs = sequence.new_zeros(len(sequence), heads, inner // heads, states), []
    for position, now in enumerate(mixed.unbind(1)):
        values = now[:, :inner].unflatten(1, (heads, -1))
        write, read = (
            now[:, begin : begin + groups * states].unflatten(1, (groups, -1)).repeat_interleave(heads // groups, 1)
            for begin in (inner, inner + groups * states)
        )
        step_now = step[:, position, :, None, None]
        decay = torch.exp(-step_now * mixer.log_decay_rate.exp()[:, None, None])
        state = decay * state + step_now * values.unsqueeze(-1) * write.unsqueeze(2)
        outputs.append((state * read.unsqueeze(2)).sum(-1) + mixer.skip_weight[:, None] * values)
    gated = (torch.stack(outputs, dim=1).flatten(2) * F.silu(gate)).unflatten(-1, (groups, -1))
    scale = (gated.square().mean(-1, keepdim=True) + mixer.gate_norm.epsilon).rsqrt()
    return mixer.output_projection((gated * scale).flatten(2) * mixer.gate_norm.weight)


def mamba3_reference(mixer, sequence):
    """The published recurrence, vector by vector: angles that add up, the trapezoid with the last vectors."""
    inner, heads, rank, size = mixer.inner_width, mixer.heads, mixer.rank, mixer.state_size
    batch, width = len(sequence), inner // heads
    angle = sequence.new_zeros(batch, heads, 1, mixer.angles)
    state, last_key = (sequence.new_zeros(batch, heads, *shape) for shape in ((width, size), (rank, size)))
    last_value, outputs = sequence.new_zeros(batch, heads, rank, width), []

    def vectors(raw, norm, bias):
        raw = raw.reshape(batch, rank, mixer.groups, size)
        normal = raw / (raw.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        biased = normal.repeat_interleave(heads // mixer.groups, 2).transpose(1, 2) + bias
        first = torch.arange(0, 2 * mixer.angles, 2) if rank == 1 else torch.arange(mixer.angles)
        second = first + (1 if rank == 1 else size // 2)
        turned = biased.clone()
        turned[..., first] = biased[..., first] * angle.cos() - biased[..., second] * angle.sin()
        turned[..., second] = biased[..., first] * angle.sin() + biased[..., second] * angle.cos()
        return turned

    for now in mixer.input_projection(sequence).unbind(1):
        gate, values, write, read, raw_step, raw_decay, raw_share, turn = now.split(mixer.parts, dim=-1)
        step = F.softplus(raw_step + mixer.step_bias)
        rate = torch.where(raw_decay >= 0, 1 + raw_decay, 1 / (1 - raw_decay)).clamp(min=1e-4)
        decay, share = torch.exp(-step * rate), torch.sigmoid(raw_share) if mixer.trapezoidal else step * 0 + 1
        angle = angle + (math.pi * torch.tanh(turn)[:, None] * step[:, :, None])[:, :, None]
        key = vectors(write, mixer.input_matrix_norm, mixer.input_matrix_bias)
        query = vectors(read, mixer.output_matrix_norm, mixer.output_matrix_bias)
        value, gates = (part.reshape(batch, heads, 1, width) for part in (values, gate))
        if rank > 1:
            value, gates = value * mixer.rank_inputs, gates * mixer.rank_gates
        before, present = (v.mT @ k for v, k in ((last_value, last_key), (value, key)))
        decay, step, share = (number[:, :, None, None] for number in (decay, step, share))
        state = decay * state + (1 - share) * step * decay * before + share * step * present
        output = query @ state.mT + mixer.skip_weight[:, None, None] * value
        if mixer.output_norm_weight is not None:
            output = output / (output.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            output = output * mixer.output_norm_weight.reshape(heads, 1, width)
        output = output * F.silu(gates)
        outputs.append((output if rank == 1 else output * mixer.rank_outputs).sum(2).flatten(1))
        last_key, last_value = key, value
    return mixer.output_projection(torch.stack(outputs, dim=1))


def s4d_reference(mixer, sequence):
    """h_t = exp(Delta A) h_{t-1} + (exp(Delta A) - 1) / A x_t; y = C h + D x; then GELU and a gated linear layer."""
    step = F.softplus(mixer.step_bias).unsqueeze(-1) * mixer.sampling_rate_factor
    matrix, read = -mixer.log_decay_rate.exp(), mixer.output_matrix
    if mixer.complex_state:
        matrix = matrix + 1j * mixer.frequency
        read = read[:, 0::2] + 1j * read[:, 1::2]
    decay = torch.exp(step * matrix)
    drive = (decay - 1) / matrix
    state, outputs = torch.zeros(len(sequence), *matrix.shape, dtype=matrix.dtype), []
    for inputs in sequence.unbind(1):
        state = decay * state + drive * inputs.unsqueeze(-1)
        product = (read * state).sum(-1)
        outputs.append((2 * product.real if mixer.complex_state else product) + mixer.skip_weight * inputs)
    values, gate = mixer.output_projection(F.gelu(torch.stack(outputs, dim=1))).chunk(2, dim=-1)
    return values * torch.sigmoid(gate)


def turned(vectors, position, base):
    """Pairs of channels as complex numbers, times e^{i m theta_j} (RoFormer, section 3.2)."""
    pairs = torch.complex(vectors[..., 0::2], vectors[..., 1::2])
    theta = base ** (-2 * torch.arange(pairs.shape[-1], dtype=torch.float64) / vectors.shape[-1])
    return pairs * torch.exp(1j * position * theta)


def attention_reference(mixer, sequence):
    """Each query's softmax over the keys so far; the scores are Re <q e^{i m theta}, k e^{i n theta}>."""
    outputs, keys, values = [], [], []
    for position, inputs in enumerate(sequence.unbind(1)):
        parts = mixer.input_projection(inputs).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (mixer.heads, -1)) for part in parts)
        keys.append(turned(key, position, mixer.rotary_base))
        values.append(value)
        query = turned(query, position, mixer.rotary_base)
        scores = (torch.stack(keys, dim=1).conj() * query.unsqueeze(1)).sum(-1).real / math.sqrt(value.shape[-1])
        outputs.append((scores.softmax(1).unsqueeze(-1) * torch.stack(values, dim=1)).sum(1).flatten(1))
    return mixer.output_projection(torch.stack(outputs, dim=1))


def linear_attention_reference(mixer, sequence):
    """s_i = s_{i-1} + phi(k_i) v_i^T; z_i = z_{i-1} + phi(k_i); the output is phi(q_i)^T s_i / phi(q_i)^T z_i."""
    outputs, memory, normaliser = [], 0, 0
    for inputs in sequence.unbind(1):
        parts = mixer.input_projection(inputs).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (mixer.heads, -1)) for part in parts)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        memory = memory + key.unsqueeze(-1) * value.unsqueeze(-2)
        normaliser = normaliser + key
        read = (query.unsqueeze(-1) * memory).sum(-2)
        outputs.append((read / (query * normaliser).sum(-1, keepdim=True)).flatten(1))
    return mixer.output_projection(torch.stack(outputs, dim=1))


def retention_reference(mixer, sequence):
    """S_n = gamma S_{n-1} + K_n^T V_n; the output is Q_n S_n, normalised by head, gated by swish (complex rotation)."""
    gamma = 1 - 2.0 ** -(5 + torch.arange(mixer.heads, dtype=torch.float64)).view(-1, 1, 1)
    outputs, memory = [], 0
    for position, inputs in enumerate(sequence.unbind(1)):
        query, key, value, gate = mixer.input_projection(inputs).split(mixer.widths, dim=-1)
        query, key, value = (part.unflatten(-1, (mixer.heads, -1)) for part in (query, key, value))
        query = turned(query, position, mixer.rotary_base)
        key = turned(key / math.sqrt(key.shape[-1]), position, mixer.rotary_base).conj()
        memory = gamma * memory + key.unsqueeze(-1) * value.unsqueeze(-2)
        read = (query.unsqueeze(-1) * memory).sum(-2).real
        centred = read - read.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + mixer.norm.eps)
        outputs.append(F.silu(gate) * (normed.flatten(1) * mixer.norm.weight + mixer.norm.bias))
    return mixer.output_projection(torch.stack(outputs, dim=1))


def wkv_reference(keys, values, decay_rate, bonus):
    """The paper's numerically safe recurrence: sums that are divided by the exponential of a running maximum."""
    outputs = []
    numerator, denominator = torch.zeros_like(keys[:, 0]), torch.zeros_like(keys[:, 0])
    largest = torch.full_like(keys[:, 0], -1e38)
    for key, value in zip(keys.unbind(1), values.unbind(1), strict=True):
        here = torch.maximum(largest, bonus + key)
        past, present = torch.exp(largest - here), torch.exp(bonus + key - here)
        outputs.append((past * numerator + present * value) / (past * denominator + present))
        here = torch.maximum(largest - decay_rate, key)
        past, present = torch.exp(largest - decay_rate - here), torch.exp(key - here)
        numerator, denominator = past * numerator + present * value, past * denominator + present
        largest = here
    return torch.stack(outputs, dim=1)


def rwkv_reference(mixer, sequence):
    """Token shift, the averages, and the gate by the receptance."""
    before = torch.cat([torch.zeros_like(sequence[:, :1]), sequence[:, :-1]], dim=1)
    keys = mixer.key_projection(mixer.key_share * sequence + (1 - mixer.key_share) * before)
    values = mixer.value_projection(mixer.value_share * sequence + (1 - mixer.value_share) * before)
    receptance = mixer.receptance_projection(mixer.receptance_share * sequence + (1 - mixer.receptance_share) * before)
    averages = wkv_reference(keys, values, mixer.log_decay_rate.exp(), mixer.bonus)
    return mixer.output_projection(torch.sigmoid(receptance) * averages)


def gru_reference(mixer, sequence):
    """The equations of torch.nn.GRU, gate by gate."""
    unit, outputs = mixer.recurrence, []
    hidden = sequence.new_zeros(len(sequence), unit.hidden_size)
    for inputs in sequence.unbind(1):
        from_inputs = F.linear(inputs, unit.weight_ih_l0, unit.bias_ih_l0).chunk(3, dim=-1)
        from_hidden = F.linear(hidden, unit.weight_hh_l0, unit.bias_hh_l0).chunk(3, dim=-1)
        reset = torch.sigmoid(from_inputs[0] + from_hidden[0])
        update = torch.sigmoid(from_inputs[1] + from_hidden[1])
        new = torch.tanh(from_inputs[2] + reset * from_hidden[2])
        hidden = (1 - update) * new + update * hidden
        outputs.append(hidden)
    return mixer.output_projection(torch.stack(outputs, dim=1))


REFERENCES = {
    "selective": ({}, selective_reference),
    "selective complex": ({"state_size": 6, "complex_state": True, "step_rank": 3}, selective_reference),
    "selective with other options": (
        {
            "state_size": 5,
            "kernel_width": 3,
            "expansion": 3,
            "state_matrix": "random",
            "linear_bias": True,
            "convolution_bias": False,
        },
        selective_reference,
    ),
    "selective in nothing": ({"state_size": 5, "selective": []}, selective_reference),
    "selective in the step": ({"state_size": 5, "selective": ["step"]}, selective_reference),
    "selective in the input": ({"state_size": 5, "selective": ["input"]}, selective_reference),
    "selective in the output": ({"state_size": 5, "selective": ["output"]}, selective_reference),
    "selective in step and input": ({"state_size": 5, "selective": ["input", "step"]}, selective_reference),
    "selective in step and output": ({"state_size": 5, "selective": ["step", "output"]}, selective_reference),
    "selective in both matrices, complex": (
        {"state_size": 5, "selective": ["input", "output"], "complex_state": True},
        selective_reference,
    ),
    "selective in the step, complex": (
        {"state_size": 5, "selective": ["step"], "complex_state": True},
        selective_reference,
    ),
    "s4d": ({"state_size": 6, "convolution": False}, s4d_reference),
    "s4d at another rate": ({"state_size": 6, "convolution": False, "sampling_rate_factor": 1.7}, s4d_reference),
    "s4d convolution": ({"state_size": 6, "convolution": True}, s4d_reference),
    "s4d real": ({"state_size": 6, "complex_state": False, "convolution": False}, s4d_reference),
    "s4d real convolution": ({"state_size": 6, "complex_state": False, "convolution": True}, s4d_reference),
    "s4d random start": ({"state_size": 6, "state_matrix": "random", "convolution": True}, s4d_reference),
    "mamba2": ({"state_size": 5}, mamba2_reference),
    "mamba2 of groups": (
        {"state_size": 3, "head_width": 4, "groups": 4, "kernel_width": 3, "linear_bias": True},
        mamba2_reference,
    ),
    "mamba2 of limited steps": (
        {"state_size": 3, "convolution_bias": False, "norm_epsilon": 1e-2, "step_limits": [0.01, 0.05]},
        mamba2_reference,
    ),
    "mamba3": ({"state_size": 6}, mamba3_reference),
    "mamba3 of a real state": ({"state_size": 5, "rotated_share": 0.0, "head_width": 8}, mamba3_reference),
    "mamba3 by Euler's rule": ({"state_size": 4, "rotated_share": 1.0, "trapezoidal": False}, mamba3_reference),
    "mamba3 of groups": ({"state_size": 4, "head_width": 4, "groups": 4, "output_norm": True}, mamba3_reference),
    "mamba3 of rank 4": (
        {"state_size": 6, "head_width": 8, "groups": 2, "rank": 4, "output_norm": True},
        mamba3_reference,
    ),
    "mamba3 of rank 2": ({"state_size": 4, "rank": 2, "rotated_share": 1.0}, mamba3_reference),
    "attention": ({}, attention_reference),
    "attention of two heads": ({"heads": 2, "rotary_base": 100.0, "linear_bias": True}, attention_reference),
    "linear_attention": ({}, linear_attention_reference),
    "linear_attention of four heads": ({"heads": 4, "linear_bias": True}, linear_attention_reference),
    "retention": ({}, retention_reference),
    "retention of two heads": (
        {"heads": 2, "expansion": 3, "rotary_base": 100.0, "norm_epsilon": 1e-3, "linear_bias": True},
        retention_reference,
    ),
    "rwkv": ({}, rwkv_reference),
    "rwkv of the last layer": ({"relative_depth": 1.0}, rwkv_reference),
    "gru": ({}, gru_reference),
    "gru of twice the width": ({"expansion": 2, "linear_bias": True}, gru_reference),
}


def build(case, width=16, dtype=torch.float64):
    torch.manual_seed(0)
    return build_mixer(width, {"name": case.split()[0], **REFERENCES[case][0]}).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", REFERENCES)
def test_mixer_and_all_gradients_equal_the_papers_recurrence(case, dtype):
    mixer = build(case)
    results = []
    for function, of_dtype in ((lambda x: REFERENCES[case][1](mixer, x), torch.float64), (mixer, dtype)):
        mixer.to(of_dtype)
        inputs = normal(2, LENGTH, 16, dtype=of_dtype).requires_grad_()
        outputs = function(inputs)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        loss = (outputs * normal(*outputs.shape, seed=3, dtype=of_dtype)).sum()
        grads = torch.autograd.grad(loss, [inputs, *mixer.parameters()])
        names = ["outputs", "inputs", *dict(mixer.named_parameters())]
        results.append(dict(zip(names, [outputs, *grads], strict=True)))
    errors = {name: relative_error(results[1][name], results[0][name]) for name in results[0]}
    assert max(errors.values()) < (FLOAT64 if dtype == torch.float64 else COMPLEX_FLOAT32), errors


def test_every_registered_mixer_has_a_reference():
    assert set(MIXERS) <= {case.split()[0] for case in REFERENCES}


@pytest.mark.parametrize("width", [8, 24, 128])
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_builds_by_its_bare_name(name, width):
    mixer = build_mixer(width, name)
    outputs, state = mixer(normal(1, 3, width, dtype=torch.float32))
    assert outputs.shape == (1, 3, width) and torch.isfinite(outputs).all()
    assert mixer(outputs, state)[0].shape == (1, 3, width)
    assert mixer.output_projection.weight.requires_grad


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_rwkv_starts_from_the_published_values(depth):
    """Appendix on initialisation of arXiv 2305.13048: l over L - 1 is the relative depth, i over s the share."""
    width = 6
    mixer = build_mixer(width, {"name": "rwkv", "relative_depth": depth}).requires_grad_(False)
    channel = torch.arange(width, dtype=torch.float64)
    share = (channel / width) ** (1 - depth)
    expected = {
        "key_share": share,
        "value_share": share + 0.3 * depth,
        "receptance_share": share / 2,
        "log_decay_rate": -5 + 8 * (channel / 5) ** (0.7 + 1.3 * depth),
        "bonus": 0.5 * ((channel + 1) % 3 - 1) + math.log(0.3),
    }
    for name, wanted in expected.items():
        assert relative_error(getattr(mixer, name), wanted) < FLOAT32, name


# Exactly the parameters of the dynamics; everything else decays.
WITHOUT_DECAY = {
    "selective": {"log_decay_rate", "skip_weight", "step_bias", "convolution_bias"},
    "selective complex": {"log_decay_rate", "frequency", "skip_weight", "step_bias", "convolution_bias"},
    "selective without bias": {"log_decay_rate", "skip_weight", "step_bias"},
    "s4d": {"log_decay_rate", "frequency", "skip_weight", "step_bias"},
    "s4d real": {"log_decay_rate", "skip_weight", "step_bias"},
    "mamba2": {"log_decay_rate", "skip_weight", "step_bias", "convolution_bias"},
    "mamba3": {"skip_weight", "step_bias", "input_matrix_bias", "output_matrix_bias"},
    "rwkv": {"key_share", "value_share", "receptance_share", "log_decay_rate", "bonus"},
    "attention": set(),
    "linear_attention": set(),
    "retention": set(),
    "gru": set(),
}
OPTIONS_WITHOUT_DECAY = {
    "selective complex": {"complex_state": True},
    "selective without bias": {"convolution_bias": False},
    "s4d real": {"complex_state": False},
}


@pytest.mark.parametrize("case", WITHOUT_DECAY)
def test_exactly_the_parameters_of_the_dynamics_are_spared_from_decay(case):
    mixer = build_mixer(8, {"name": case.split()[0], **OPTIONS_WITHOUT_DECAY.get(case, {})})
    names = {id(parameter): name for name, parameter in mixer.named_parameters()}
    spared = [names[id(parameter)] for parameter in mixer.parameters_without_decay]
    assert sorted(spared) == sorted(WITHOUT_DECAY[case])
    has_matrix = case.startswith(("selective", "s4d", "mamba2"))
    assert (mixer.state_matrix is not None) == has_matrix
    assert not has_matrix or (mixer.state_matrix.real < 0).all()


def test_a_module_collects_the_parameters_of_all_mixers_inside_it_once():
    shared = build_mixer(8, "s4d")
    stack = ResidualStack(8, [shared, "rwkv", shared])
    expected = [*shared.parameters_without_decay, *stack.blocks[1].mixer.parameters_without_decay]
    for found in (stack.parameters_without_decay, parameters_without_decay(torch.nn.Sequential(stack))):
        assert [id(one) for one in found] == [id(one) for one in expected]


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_bfloat16_stays_close_to_the_same_mixer_in_float32(name):
    torch.manual_seed(0)
    mixer = build_mixer(16, name).bfloat16()
    inputs = normal(2, 40, 16, dtype=torch.bfloat16)
    outputs, state = mixer(inputs)
    onwards, _ = mixer(inputs, state)
    mixer.float()
    expected, state = mixer(inputs.float())
    for found, wanted in ((outputs, expected), (onwards, mixer(inputs.float(), state)[0])):
        assert found.dtype == torch.bfloat16
        assert relative_error(found, wanted) < BFLOAT16_LAYERS


@pytest.mark.parametrize("complex_state", [True, False], ids=["complex", "real"])
def test_s4d_convolution_and_recurrence_are_one_system_over_long_pieces(complex_state):
    """With the constants as they are: a whole piece of 8,192 by Fourier transform, another one, and a short rest."""
    torch.manual_seed(0)
    mixer = build_mixer(2, {"name": "s4d", "state_size": 8, "complex_state": complex_state}).double()
    length = s4d.CONVOLUTION_PIECE + s4d.CONVOLUTION_FROM + 5
    incoming = s4d.S4DState(mixer(normal(1, 20, 2, seed=2))[1].scan.detach().requires_grad_())
    results = []
    for convolution in (False, True):
        mixer.convolution = convolution
        inputs = normal(1, length, 2).requires_grad_()
        outputs, state = mixer(inputs, incoming)
        loss = (outputs * normal(*outputs.shape, seed=3)).sum() + state.scan.abs().square().sum()
        grads = torch.autograd.grad(loss, [inputs, incoming.scan, *mixer.parameters()])
        results.append([outputs, state.scan, *grads])
    errors = [relative_error(found, expected) for expected, found in zip(*results, strict=True)]
    assert max(errors) < FLOAT64, errors
    mixer.float()
    with torch.no_grad():
        for convolution in (False, True):
            mixer.convolution = convolution
            found, _ = mixer(inputs.float(), incoming)
            assert relative_error(found, results[0][0]) < COMPLEX_FLOAT32


def test_s4d_takes_the_recurrence_where_it_is_native_and_else_the_transform(monkeypatch):
    calls = []
    convolution = s4d.diagonal_convolution
    monkeypatch.setattr(s4d, "diagonal_convolution", lambda *args: calls.append(1) or convolution(*args))
    mixer, inputs = build_mixer(4, {"name": "s4d", "state_size": 2}).double(), normal(1, 64, 4)
    with use_backend("torch"):
        expected, _ = mixer(inputs)
        assert calls
        mixer(inputs, None, torch.zeros(1, 64, dtype=torch.bool))
        mixer(inputs[:, : s4d.CONVOLUTION_FROM - 1])
        assert len(calls) == 1
    assert relative_error(mixer(inputs)[0], expected) < FLOAT64


def test_s4d_runs_at_another_sampling_rate():
    """The same signal at half the rate, with steps of twice the length, gives nearly the same outputs."""
    torch.manual_seed(0)
    mixer = build_mixer(4, {"name": "s4d", "state_size": 4, "state_matrix": "constant"}).double()
    time = torch.arange(4000, dtype=torch.float64) / 4000
    signal = torch.stack([torch.sin(2 * math.pi * waves * time) for waves in (1, 2, 3, 5)], dim=1).unsqueeze(0)
    full, _ = mixer(signal)
    unchanged = relative_error(mixer(signal[:, ::2])[0], full[:, ::2])
    mixer.sampling_rate_factor = 2.0
    assert relative_error(mixer(signal[:, ::2])[0], full[:, ::2]) < RESAMPLED < 5 * RESAMPLED < unchanged


def test_rotation_depends_on_the_distance_alone_even_after_ten_million_positions():
    query, key = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=2)

    def score(first, dtype):
        turned_query, turned_key = rotated(query.to(dtype), first + 7, 1e4), rotated(key.to(dtype), first, 1e4)
        return (turned_query * turned_key).sum()

    for first in (1, 1000, 10_000_000):
        assert relative_error(score(first, torch.float32), score(0, torch.float64)) < FLOAT32
        assert score(first, torch.float64) != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_rwkv_averages_equal_the_safe_recurrence_for_keys_of_any_size(dtype):
    """Keys of -50 to 50 and decays from almost none to almost all per position: plain exponentials would overflow or
    lose all but the largest."""
    generator = torch.Generator().manual_seed(0)
    keys = (100 * torch.rand(2, 300, 12, generator=generator, dtype=torch.float64) - 50).to(dtype)
    keys[:, 150:] -= 40  # what comes later is small, but the decay brings it to the front
    values, bonus = normal(2, 300, 12).to(dtype), normal(12, seed=2).to(dtype)
    log_decay_rate = torch.linspace(-8, 3, 12, dtype=dtype)
    nothing = torch.zeros(2, 12, dtype=torch.float64)
    results = []
    for function, of_dtype in (
        (lambda *given: wkv_reference(*given[:2], given[2].exp(), given[3]), torch.float64),
        (lambda *given: weighted_averages(*given, nothing, nothing - torch.inf)[0], dtype),
    ):
        leaves = [tensor.to(of_dtype).requires_grad_() for tensor in (keys, values, log_decay_rate, bonus)]
        outputs = function(*leaves)
        results.append([outputs, *torch.autograd.grad((outputs * normal(*outputs.shape, seed=3)).sum(), leaves)])
    errors = [relative_error(found, expected) for expected, found in zip(*results, strict=True)]
    assert max(errors) < (FLOAT64 if dtype == torch.float64 else FLOAT32), errors


def test_rwkv_averages_stay_finite_for_keys_beyond_the_range_of_float64():
    keys = torch.tensor([[[-3000.0], [3000.0], [-3000.0], [-3000.0]]], dtype=torch.float64).requires_grad_()
    values, nothing = normal(1, 4, 1), torch.zeros(1, 1, dtype=torch.float64)
    averages, average, log_weight = weighted_averages(
        keys, values, torch.full((1,), 1.0), torch.zeros(1), nothing, nothing - torch.inf
    )
    assert torch.isfinite(averages).all() and torch.isfinite(average).all() and torch.isfinite(log_weight).all()
    assert torch.allclose(averages[0, 1:3], values[0, 1])
    averages.sum().backward()
    assert torch.isfinite(keys.grad).all()


def test_linear_attention_stays_finite_where_all_features_are_tiny():
    mixer = build_mixer(8, {"name": "linear_attention", "linear_bias": True})
    with torch.no_grad():
        mixer.input_projection.bias[:16] = -30.0  # queries and keys, whose features are then about exp(-30)
        outputs, _ = mixer(normal(1, 20, 8, dtype=torch.float32))
        expected = linear_attention_reference_in_logs(mixer, normal(1, 20, 8, dtype=torch.float32))
    assert relative_error(outputs, expected) < FLOAT32


def linear_attention_reference_in_logs(mixer, sequence):
    """Where every feature is exp(x), the weights are a softmax over the keys of log sum exp(query + key)."""
    query, key, value = mixer.double().input_projection(sequence.double()).chunk(3, dim=-1)
    scores = (query.unsqueeze(2) + key.unsqueeze(1)).logsumexp(-1)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    outputs = mixer.output_projection(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value)
    mixer.float()
    return outputs


def test_attention_forgets_the_keys_of_finished_records():
    torch.manual_seed(0)
    mixer, inputs = build_mixer(8, "attention"), normal(2, 50, 8, dtype=torch.float32)
    starts = torch.zeros(2, 50, dtype=torch.bool)
    starts[0, 30] = starts[1, 42] = True
    _, state = mixer(inputs, None, starts)
    assert state.keys.shape[1] == 20 and state.visible.sum(1).tolist() == [20, 8] and state.positions == 50
    plain, _ = mixer(inputs[:, :10], state)
    alone, alone_state = mixer(inputs[1:, 42:])
    alone, _ = mixer(inputs[1:, :10], alone_state)
    assert relative_error(plain[1:], alone) < FLOAT32


def test_an_unknown_mixer_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(InputError, match="there is no mixer 'mamba9'; choose attention, ") as refused:
        build_mixer(8, "mamba9")
    assert "\n" not in str(refused.value) and all(name in str(refused.value) for name in MIXERS)
    with pytest.raises(InputError, match="lacks a name; choose attention, "):
        build_mixer(8, {"state_size": 4})


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_an_unknown_option_is_refused_with_the_names_of_those_there_are(name):
    with pytest.raises(InputError, match=f"the mixer '{name}' has no option 'state_sise'; it has") as refused:
        build_mixer(8, {"name": name, "state_sise": 4})
    assert "\n" not in str(refused.value) and all(option in str(refused.value) for option in mixer_options(name))


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({"name": "attention", "heads": 3}, "3 heads do not divide a model_width of 8; choose a divisor"),
        ({"name": "retention", "heads": 8}, "heads of width 1 cannot be rotated in pairs"),
        ({"name": "selective", "selective": ["step", "gate"]}, "selective must be a list of step, input, output"),
        ({"name": "selective", "selective": "step"}, "selective must be a list of step, input, output"),
        ({"name": "selective", "selective": ["step", "step"]}, "selective must be a list of step, input, output"),
        ({"name": "s4d", "state_matrix": "hippo"}, "a complex state cannot be initialised with 'hippo'; choose"),
        ({"name": "s4d", "sampling_rate_factor": 0}, "sampling_rate_factor must be positive but is 0"),
        ({"name": "mamba2", "head_width": 3}, "heads of width 3 do not divide 16 inner channels; choose a divisor"),
        ({"name": "mamba2", "head_width": 4, "groups": 3}, "3 groups do not divide 4 heads; choose a divisor"),
        (
            {"name": "mamba2", "step_limits": [0.1, 0.1]},
            "step_limits must be two increasing non-negative numbers but are",
        ),
        (
            {"name": "mamba3", "state_size": 5},
            "a share of 0.5 of 5 states cannot rotate in pairs",
        ),
        ({"name": "mamba3", "rank": 0}, "rank must be at least 1 but is 0"),
        ({"name": "attention", "heads": 0}, "0 heads do not divide a model_width of 8; choose a divisor"),
        ({"name": "linear_attention", "heads": 3}, "3 heads do not divide a model_width of 8; choose a divisor"),
        ({"name": "rwkv", "relative_depth": 2}, "relative_depth must lie between 0 and 1 but is 2"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_reason(description, reason):
    with pytest.raises(InputError, match=f"the mixer '{description['name']}' cannot be built: {reason}"):
        build_mixer(8, description)


def test_default_heads_are_at_most_eight_and_at_least_eight_channels_wide():
    assert [head_count(width, None) for width in (8, 24, 64, 128, 1024, 104, 12)] == [1, 3, 8, 8, 8, 4, 1]
