"""What is rounded where: half precisions, autocast, exported graphs, and memory that nobody has filled."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from mambacore.layers import MIXERS, EquivariantEmbedding, ResidualStack, build_mixer, stack
from mambacore.models import (
    CausalLanguageModel,
    CausalLanguageModelConfig,
    MaskedLanguageModel,
    MaskedLanguageModelConfig,
)
from tolerances import FLOAT16_LAYERS, FLOAT32, ONE_BFLOAT16_LAYER, PIECES_FLOAT32, relative_error

WIDTH = 16
COMPLEMENT = (0, 1, 5, 4, 3, 2)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def root_mean_square_error(found, expected):
    return float((found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_bfloat16_stack_is_as_close_as_its_roundings(name, convolution):
    """The step size of S4D is not among what is rounded: that alone gave ten times this error."""
    if convolution and name != "s4d":
        pytest.skip("only S4D is a convolution")
    torch.manual_seed(0)
    options = {"name": "s4d", "convolution": convolution} if name == "s4d" else name
    layers = ResidualStack(WIDTH, [options] * 2)
    layers.load_state_dict({name: tensor.bfloat16().float() for name, tensor in layers.state_dict().items()})
    sequence = normal(2, 400, WIDTH).bfloat16().float()
    with torch.no_grad():
        expected, _ = layers(sequence)
        found, _ = layers.bfloat16()(sequence.bfloat16())
    assert root_mean_square_error(found, expected) < ONE_BFLOAT16_LAYER


@pytest.mark.parametrize("convolution", [False, True])
def test_s4d_under_autocast_transforms_in_float32(convolution):
    torch.manual_seed(0)
    mixer, sequence = build_mixer(WIDTH, {"name": "s4d", "convolution": convolution}), normal(2, 100, WIDTH)
    expected, expected_state = mixer(sequence)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = mixer(sequence)
    assert root_mean_square_error(found, expected) < ONE_BFLOAT16_LAYER
    assert relative_error(state.scan, expected_state.scan) < 1e-4  # nothing on its way is in bfloat16


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_s4d_under_the_autocast_of_cuda_transforms_in_float32():
    """Tensors without numbers stand in for a device: autocast casts alike, and a transform refuses alike."""
    mixer = build_mixer(WIDTH, "s4d")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            on_device = {name: torch.empty(tensor.shape) for name, tensor in mixer.state_dict().items()}
            mixer.load_state_dict(on_device, assign=True)
            sequence = torch.empty(2, 100, WIDTH)
            assert mixer.output_projection(sequence).dtype == torch.bfloat16  # autocast is at work
            outputs, state = mixer(sequence)
            narrow, _ = mixer(sequence.bfloat16())
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert outputs.shape == sequence.shape and outputs.device.type == "cuda"
    assert narrow.dtype == torch.bfloat16 and state.scan.dtype == torch.complex64


@pytest.mark.parametrize("name", ["retention", "linear_attention"])
def test_memories_are_summed_in_float32_under_autocast(name):
    torch.manual_seed(0)
    mixer, sequence = build_mixer(WIDTH, name), normal(1, 700, WIDTH).abs()
    _, expected = mixer(sequence)
    with torch.autocast("cpu", torch.bfloat16):
        projected = mixer.input_projection(sequence).float()
        _, found = mixer(sequence)
    assert found.memory.dtype == torch.float32
    # The projection is in bfloat16; sums of its roundings average out, while sums in bfloat16 lose whole terms.
    assert root_mean_square_error(found.memory, expected.memory) < ONE_BFLOAT16_LAYER
    assert projected.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_long_memory_of_retention_does_not_overflow_float16(autocast):
    torch.manual_seed(0)
    mixer, sequence = build_mixer(WIDTH, "retention"), 30 * normal(1, 300, WIDTH).abs()
    with torch.no_grad():
        mixer.input_projection.weight.abs_()
        expected, state = mixer(sequence)
        assert state.memory.max() > torch.finfo(torch.float16).max
        if autocast:
            with torch.autocast("cpu", torch.float16):
                found, _ = mixer(sequence)
        else:
            found, _ = mixer.half()(sequence.half())
    assert root_mean_square_error(found, expected) < FLOAT16_LAYERS


@pytest.mark.parametrize("kind", ["causal", "causal untied", "masked", "masked untied", "equivariant"])
def test_logits_are_in_the_precision_of_the_head_under_autocast(kind):
    torch.manual_seed(0)
    tied_head, tokens = not kind.endswith("untied"), torch.randint(6, (2, 9))
    if kind.startswith("causal"):
        model = CausalLanguageModel(CausalLanguageModelConfig(6, WIDTH, ("selective",), tied_head=tied_head))
    else:
        model = MaskedLanguageModel(
            MaskedLanguageModelConfig(6, WIDTH, 1, COMPLEMENT, equivariant=kind == "equivariant", tied_head=tied_head)
        )
    hidden = normal(2, 9, WIDTH * (2 if kind == "equivariant" else 1))
    expected = model.logits(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.logits(hidden), expected)
        outputs = model(tokens)
    assert (outputs[0] if isinstance(outputs, tuple) else outputs).dtype == torch.float32


def test_a_complement_survives_memory_that_was_never_filled():
    config = MaskedLanguageModelConfig(6, WIDTH, 1, COMPLEMENT, equivariant=True)
    torch.manual_seed(0)
    expected = MaskedLanguageModel(config)
    with torch.device("meta"):
        model = MaskedLanguageModel(config)
        embedding = EquivariantEmbedding(6, WIDTH, COMPLEMENT)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert model.complement.tolist() == model.embedding.complement.tolist() == list(COMPLEMENT)
    assert embedding.to_empty(device="cpu").complement.tolist() == list(COMPLEMENT)
    tokens = torch.randint(6, (2, 9))
    assert torch.equal(model(tokens), expected(tokens))
    assert model.half().complement.dtype == torch.long


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("name", ["selective", "s4d", "attention", "hybrid"])
def test_an_exported_stack_takes_any_length(name, no_grad):
    torch.manual_seed(0)
    layers = ResidualStack(WIDTH, ["selective", "s4d"] if name == "hybrid" else [name]).eval()
    # With gradients, states are kept before every 64 positions, and what is sized one in a graph stays so.
    shortest = 2 if no_grad else 65
    shapes = {"sequence": {1: Dim("length", min=shortest, max=100_000)}, "state": None, "sequence_starts": None}
    with torch.set_grad_enabled(not no_grad):
        exported = torch.export.export(layers, (normal(1, 200, WIDTH), None, None), dynamic_shapes=shapes).module()
        for length in (shortest, 83, 1000, 9000 if name != "attention" else 1001):
            sequence = normal(1, length, WIDTH)
            assert relative_error(exported(sequence, None, None)[0], layers(sequence)[0]) < 10 * FLOAT32


def test_a_stack_exported_without_gradients_may_be_used_with_them():
    torch.manual_seed(0)
    layers = ResidualStack(WIDTH, ["selective"])
    with torch.no_grad():
        exported = torch.export.export(layers, (normal(1, 50, WIDTH), None, None)).module()
    gradients = []
    for module in (exported, layers):
        sequence = normal(1, 50, WIDTH, seed=2).requires_grad_()
        module(sequence, None, None)[0].square().sum().backward()
        gradients.append(sequence.grad)
    assert relative_error(*gradients) < FLOAT32


@pytest.mark.parametrize(("batch", "length"), [(1, 9000), (3, 5000), (300, 130), (5000, 65), (5000, 3)])
def test_pieces_without_gradients_are_never_short(batch, length, monkeypatch):
    seen = []
    walk = ResidualStack._walk
    monkeypatch.setattr(
        ResidualStack,
        "_walk",
        lambda self, sequence, *rest: seen.append(sequence.shape[1]) or walk(self, sequence, *rest),
    )
    layers, sequence = ResidualStack(2, ["retention"]), normal(batch, length, 2)
    with torch.no_grad():
        found, _ = layers(sequence)
    assert sum(seen) == length
    assert all(positions >= stack.SHORTEST_PIECE for positions in seen[:-1])
    assert len(seen) == 1 or max(seen) * batch <= max(stack.PIECE_POSITIONS, stack.SHORTEST_PIECE * batch)
    expected, _ = layers(sequence)
    assert relative_error(found, expected) < PIECES_FLOAT32


def test_a_meta_weight_beside_cpu_inputs_is_refused():
    layers = ResidualStack(WIDTH, ["selective"])
    layers.blocks[0].norm.to("meta")
    with (
        torch.no_grad(),
        pytest.raises((ValueError, RuntimeError), match=r"must be on the device of the [a-z]+, cpu"),
    ):
        layers(normal(1, 1, WIDTH))
