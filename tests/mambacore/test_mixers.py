"""Every mixer equals its paper's recurrence, written out position by position in float64; and is chosen by its name."""

import math

import pytest
import torch

from mambacore import use_backend
from mambacore.errors import InputError
from mambacore.layers import MIXERS, ResidualStack, build_mixer, mixer_options, parameters_without_decay, s4d
from mambacore.layers.attention import head_count, rotated
from mambacore.layers.rwkv import weighted_averages
from mixer_equations import REFERENCES, build, wkv_reference
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
