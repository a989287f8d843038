"""Every mixer as the recurrence of its paper, written out position by position in float64."""

import math

import torch
from torch.nn import functional as F

from mambacore.layers import build_mixer


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
