"""Both directions equal the mixers applied to explicitly flipped sequences; strands commute with the complement."""

import itertools

import pytest
import torch

from mambacore.errors import InputError
from mambacore.layers import (
    BidirectionalBlock,
    BidirectionalMixer,
    BidirectionalStack,
    EquivariantEmbedding,
    EquivariantStack,
)
from mambacore.layers.equivariant import (
    complement_table,
    equivariant_logits,
    reverse_complement,
    starts_of_reversed,
)
from mambacore.packing import starts_from_lengths
from tolerances import BFLOAT16, FLOAT64, relative_error

WIDTH, TOKENS = 6, 5
COMPLEMENT = (3, 2, 1, 0, 4)
OPTIONS = {"state_size": 3, "linear_bias": True}
MAMBA2 = {"name": "mamba2", "state_size": 3, "head_width": 4, "linear_bias": True}
KINDS = [pytest.param(*kind, OPTIONS, id=f"{kind[0]}-{'tied' if kind[1] else 'untied'}")
         for kind in itertools.product(("add", "multiply"), (True, False))]  # fmt: skip
MAMBA3 = {"name": "mamba3", "state_size": 4, "head_width": 4}
KINDS += [
    pytest.param("add", True, MAMBA2, id="mamba2-tied"),
    pytest.param("multiply", False, MAMBA2, id="mamba2"),
    pytest.param("add", True, MAMBA3, id="mamba3"),
]
EXCHANGED = pytest.mark.parametrize("exchange_strands", [False, True], ids=["in place", "exchanged"])


def sequence(channels, length=70, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, channels, generator=generator, dtype=torch.float64)


def unlike(module):
    """Parameters that all differ, also those which start from a constant."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return module.double()


def bidirectional_mixer(combination="add", tied_projections=True, options=OPTIONS):
    torch.manual_seed(0)
    return unlike(BidirectionalMixer(WIDTH, options, combination, tied_projections))


def both_directions_by_flips(mixer, inputs):
    """BiMamba with the sequence itself reversed, from the two causal mixers."""
    ahead, _ = mixer.forward_mixer(inputs)
    behind, _ = mixer.reverse_mixer(inputs.flip(1))
    return ahead + behind.flip(1) if mixer.combination == "add" else ahead * behind.flip(1)


def compare_with_all_gradients(module, first, second, inputs):
    results = []
    for function in (first, second):
        leaf = inputs.clone().requires_grad_()
        outputs = function(leaf)
        grads = torch.autograd.grad((outputs * outputs.detach().cos()).sum(), [leaf, *module.parameters()])
        results.append([outputs, *grads])
    errors = [relative_error(found, expected) for found, expected in zip(*results, strict=True)]
    assert max(errors) < FLOAT64, errors


@pytest.mark.parametrize(("combination", "tied", "options"), KINDS)
def test_both_directions_equal_explicit_flips_with_all_gradients(combination, tied, options):
    mixer = bidirectional_mixer(combination, tied, options)
    compare_with_all_gradients(mixer, mixer, lambda x: both_directions_by_flips(mixer, x), sequence(WIDTH))


@pytest.mark.parametrize(("combination", "tied", "options"), KINDS)
def test_reverse_complement_of_a_block_equals_flipping_positions_and_channels(combination, tied, options):
    block = unlike(BidirectionalBlock(WIDTH, bidirectional_mixer(combination, tied, options)))
    compare_with_all_gradients(
        block,
        lambda x: block(x, reverse_complement=True),
        lambda x: block(x.flip(1, 2)).flip(1, 2),
        sequence(WIDTH),
    )


def test_tied_directions_share_their_projections_and_nothing_else():
    tied, untied = bidirectional_mixer(), bidirectional_mixer(tied_projections=False)
    projections = sum(p.numel() for part in ("input", "output")
                      for p in getattr(tied.forward_mixer, f"{part}_projection").parameters())  # fmt: skip
    count = [sum(p.numel() for p in mixer.parameters()) for mixer in (tied, untied)]
    assert count[1] - count[0] == projections
    assert tied.forward_mixer.selection_projection is not tied.reverse_mixer.selection_projection


def test_every_position_depends_on_both_ends():
    inputs = sequence(WIDTH).requires_grad_()
    BidirectionalStack(WIDTH, 2, OPTIONS).double()(inputs)[:, 30].sum().backward()
    assert inputs.grad[:, 0].abs().max() > 0 and inputs.grad[:, -1].abs().max() > 0


def records_one_by_one(module, inputs, lengths):
    return torch.cat([module(record) for record in inputs.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("name", ["bidirectional", "equivariant", "exchanged", "mamba2", "mamba3"])
def test_a_record_does_not_depend_on_its_neighbours_or_on_padding(name):
    torch.manual_seed(0)
    stack = {
        "bidirectional": lambda: BidirectionalStack(WIDTH, 2, OPTIONS),
        "equivariant": lambda: EquivariantStack(WIDTH, 2, OPTIONS),
        "exchanged": lambda: EquivariantStack(WIDTH, 3, OPTIONS, exchange_strands=True),
        "mamba2": lambda: EquivariantStack(WIDTH, 2, MAMBA2),
        "mamba3": lambda: EquivariantStack(WIDTH, 2, MAMBA3),
    }[name]().double()  # fmt: skip
    lengths = [1, 2, 40, 20, 7]  # the last one is padding
    inputs = sequence(WIDTH if name == "bidirectional" else 2 * WIDTH)
    starts = starts_from_lengths([lengths[:-1]] * 2, inputs.shape[1])
    packed = stack(inputs, starts)
    assert relative_error(packed, records_one_by_one(stack, inputs, lengths)) < FLOAT64
    other = inputs.clone()
    other[:, 63:] = 9.0
    assert torch.equal(stack(other, starts)[:, :63], packed[:, :63])
    assert not torch.equal(stack(other)[:, :63], stack(inputs)[:, :63])


def equivariant_stack(layers, exchange_strands, mixer=OPTIONS, **options):
    torch.manual_seed(0)
    return unlike(EquivariantStack(WIDTH, layers, mixer, **options, exchange_strands=exchange_strands))


@EXCHANGED
@pytest.mark.parametrize(("layers", "options"), [(1, OPTIONS), (2, OPTIONS), (3, OPTIONS), (2, MAMBA2)])
def test_a_stack_commutes_with_the_reverse_complement(layers, options, exchange_strands):
    stack, inputs = equivariant_stack(layers, exchange_strands, options), sequence(2 * WIDTH)
    assert relative_error(stack(reverse_complement(inputs)), reverse_complement(stack(inputs))) < FLOAT64
    # Neither flip alone does: the law is not met for trivial reasons.
    assert relative_error(stack(inputs.flip(1)), stack(inputs).flip(1)) > 1e-3
    assert relative_error(stack(inputs.flip(2)), stack(inputs).flip(2)) > 1e-3


@EXCHANGED
@pytest.mark.parametrize(("combination", "tied", "options"), KINDS)
def test_a_stack_of_strands_equals_explicit_flips_with_all_gradients(combination, tied, options, exchange_strands):
    stack = equivariant_stack(3, exchange_strands, options, combination=combination, tied_projections=tied)

    def with_flips(two_strands):
        read, other = two_strands[..., :WIDTH], two_strands[..., WIDTH:].flip(1, 2)
        for block in stack.blocks:
            if exchange_strands:  # each arrives where the other was, hence flipped
                read, other = other.flip(1, 2), read.flip(1, 2)
            read = read + both_directions_by_flips(block.mixer, rms_norm(block.norm, read))
            other = other + both_directions_by_flips(block.mixer, rms_norm(block.norm, other))
        final = stack.final_norm
        return torch.cat([rms_norm(final, read), rms_norm(final, other).flip(1, 2)], dim=-1)

    compare_with_all_gradients(stack, stack, with_flips, sequence(2 * WIDTH))


def rms_norm(norm, values):
    return values / (values.square().mean(-1, keepdim=True) + norm.epsilon).sqrt() * norm.weight


@EXCHANGED
def test_from_tokens_to_logits_the_other_strand_gives_the_same(exchange_strands):
    embedding = EquivariantEmbedding(TOKENS, WIDTH, COMPLEMENT).double()
    stack = equivariant_stack(2, exchange_strands)
    tokens = torch.randint(0, TOKENS, (2, 50), generator=torch.Generator().manual_seed(3))
    complement = complement_table(COMPLEMENT, TOKENS)
    other_strand = complement[tokens.flip(1)]
    assert torch.equal(embedding(other_strand), reverse_complement(embedding(tokens)))
    found, expected = (
        equivariant_logits(stack(embedding(strand)), embedding.weight, complement) for strand in (other_strand, tokens)
    )
    assert relative_error(found, expected.flip(1)[..., complement]) < FLOAT64


def test_starts_of_a_reversed_row_are_the_ends():
    starts = starts_from_lengths([[3, 1, 2], [6]], 6)
    assert starts_of_reversed(starts).int().tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert torch.equal(starts_of_reversed(starts_of_reversed(starts)), starts)


def test_residuals_in_float32_are_closer_than_in_bfloat16():
    torch.manual_seed(0)
    exact = EquivariantStack(WIDTH, 8, OPTIONS)
    narrow, wide = (EquivariantStack(WIDTH, 8, OPTIONS, residual_in_float32=flag) for flag in (False, True))
    inputs, errors = sequence(2 * WIDTH).float(), []
    for stack in (narrow, wide):
        stack.load_state_dict(exact.state_dict())
        found = stack.bfloat16()(inputs.bfloat16())
        assert found.dtype == torch.bfloat16
        errors.append((found - exact(inputs)).square().mean().sqrt())
    assert errors[1] < 0.8 * errors[0]
    assert relative_error(wide(inputs.bfloat16()), exact(inputs)) < 4 * BFLOAT16


def test_weights_are_scaled_by_the_depth_once_for_tied_projections():
    largest = {}
    for layers, tied in itertools.product((1, 4), (True, False)):
        torch.manual_seed(0)
        mixer = BidirectionalStack(WIDTH, layers, OPTIONS, tied_projections=tied).blocks[0].mixer
        largest[layers, tied] = mixer.reverse_mixer.output_projection.weight.detach().abs().max()
    assert torch.isclose(largest[4, True], largest[1, True] / 2)
    assert torch.isclose(largest[4, False], largest[1, False] / 2)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="'concatenate'; choose add or multiply"):
        BidirectionalMixer(WIDTH, combination="concatenate")
    with pytest.raises(InputError, match="no option 'states'"):
        BidirectionalMixer(WIDTH, {"states": 3})
    with pytest.raises(InputError, match="'attention' cannot scan a sequence backwards; choose selective, mamba2"):
        BidirectionalMixer(WIDTH, {"name": "attention"})
    with pytest.raises(InputError, match="at least 1"):
        BidirectionalStack(WIDTH, 0)
    with pytest.raises(InputError, match="token 0 to 1, which is not mapped back to 0"):
        complement_table((1, 2, 0), 3)
    with pytest.raises(InputError, match="complement has 5 tokens but the vocabulary has 4"):
        complement_table(COMPLEMENT, 4)
    with pytest.raises(ValueError, match="two strands of 6 channels"):
        EquivariantStack(WIDTH, 1)(torch.zeros(1, 4, WIDTH))
