"""Language models: pieces equal the whole, generation follows the logits, both strands give the same."""

import pytest
import torch
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.models import (
    CausalLanguageModel,
    CausalLanguageModelConfig,
    MaskedLanguageModel,
    MaskedLanguageModelConfig,
    sample_tokens,
)
from mambacore.packing import starts_from_lengths
from tolerances import BFLOAT16, FLOAT64, PIECES_FLOAT64, relative_error

SELECTIVE = {"name": "selective", "state_size": 4}
COMPLEMENT = (3, 2, 1, 0)
PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)


def causal(**options):
    torch.manual_seed(0)
    config = {"vocabulary_size": 13, "model_width": 8, "mixers": (SELECTIVE,) * 2} | options
    model = CausalLanguageModel(CausalLanguageModelConfig(**config)).double()
    # Logits of a fresh model are nearly equal, and those of a tied one favour the token itself.
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.stack.final_norm.weight)
    return model


def masked(**options):
    torch.manual_seed(0)
    config = {"vocabulary_size": 6, "model_width": 8, "layers": 2, "complement": COMPLEMENT, "mixer": {"state_size": 3}}
    return MaskedLanguageModel(MaskedLanguageModelConfig(**(config | options))).double()


def tokens(length=60, below=13, seed=1):
    return torch.randint(0, below, (2, length), generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("mixers", [(SELECTIVE,) * 2, (SELECTIVE, "attention", "s4d")], ids=["selective", "hybrid"])
def test_logits_of_pieces_equal_those_of_the_whole(mixers, tied_head):
    model = causal(mixers=mixers, tied_head=tied_head)
    whole, _ = model(tokens())
    state, found = None, []
    for piece in tokens().split([1, 20, 1, 38], dim=1):
        logits, state = model(piece, state)
        found.append(logits)
    assert relative_error(torch.cat(found, dim=1), whole) < PIECES_FLOAT64
    assert whole.shape == (2, 60, 13)


def test_records_of_a_row_do_not_see_each_other():
    model = causal()
    packed, _ = model(tokens(), sequence_starts=starts_from_lengths([[20, 40]] * 2, 60))
    alone = [model(record)[0] for record in tokens().split([20, 40], dim=1)]
    assert relative_error(packed, torch.cat(alone, dim=1)) < FLOAT64


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not():
    assert causal().head is None
    tied, untied = (sum(p.numel() for p in causal(tied_head=flag).parameters()) for flag in (True, False))
    assert untied - tied == 13 * 8
    model = causal()
    hidden, _ = model.hidden(tokens())
    assert torch.equal(model(tokens())[0], F.linear(hidden, model.embedding.weight))


def test_the_vocabulary_is_padded_and_padding_is_never_generated():
    model = causal(vocabulary_multiple=8)
    assert model.config.padded_vocabulary_size == 16
    logits, _ = model(tokens())
    assert logits.shape == (2, 60, 16)
    with torch.no_grad():
        model.embedding.weight[13:] = 1e3 * model.embedding.weight[:3]  # the likeliest by far, if they could be chosen
    for temperature in (0.0, 1.0):
        assert model.generate(tokens(), 30, temperature, generator=generator()).tokens.max() < 13


def test_greedy_generation_is_what_the_whole_sequence_predicts():
    model = causal()
    prompt = tokens(7)
    new = model.generate(prompt, 12, temperature=0).tokens
    assert new.shape == (2, 12) and len(new.unique()) > 1
    logits, _ = model(torch.cat([prompt, new], dim=1))
    assert torch.equal(new, logits[:, 6:-1].argmax(-1))
    assert model.generate(prompt, 0).tokens.shape == (2, 0)


def test_sampled_generation_follows_the_logits_and_the_seed():
    model = causal()
    with torch.no_grad():
        expected = torch.softmax(model(tokens(7)[:1])[0][0, -1], dim=-1)
    drawn = model.generate(tokens(7)[:1].expand(4000, -1), 1, generator=generator()).tokens
    share = torch.bincount(drawn[:, 0], minlength=13) / 4000
    assert (share - expected).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations of a share, at most
    assert torch.equal(drawn, model.generate(tokens(7)[:1].expand(4000, -1), 1, generator=generator()).tokens)
    assert not torch.equal(drawn, model.generate(tokens(7)[:1].expand(4000, -1), 1, generator=generator(1)).tokens)


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (1.0, 0.5, [1, 0, 0, 0]),
        (1.0, 0.51, [0.5 / 0.8, 0.3 / 0.8, 0, 0]),
        (1.0, 0.9, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (0.0, 1.0, [1, 0, 0, 0]),
        (1e-30, 1.0, [1, 0, 0, 0]),
    ],
)
def test_sampling_has_the_stated_distribution(temperature, top_p, expected):
    count = 20_000
    order = torch.tensor([2, 0, 3, 1])  # the likeliest is not the first
    drawn = sample_tokens(PROBABILITIES.log()[:, order].expand(count, -1), temperature, top_p, generator())
    share = torch.bincount(drawn, minlength=4) / count
    wanted = torch.tensor(expected)[order]
    assert (share - wanted).abs().max() < 4 * 0.5 / count**0.5
    assert (share[wanted == 0] == 0).all()


@pytest.mark.parametrize("residual_in_float32", [False, True])
def test_bfloat16_parameters_give_nearly_the_same(residual_in_float32):
    model = causal(mixers=(SELECTIVE,) * 6, residual_in_float32=residual_in_float32)
    expected, _ = model(tokens())
    model = model.bfloat16()
    found, state = model(tokens())
    assert found.dtype == torch.bfloat16
    error = (found - expected).square().mean().sqrt() / expected.abs().max()
    assert error < BFLOAT16
    assert model.generate(tokens(), 3, generator=generator()).tokens.shape == (2, 3)
    embedded = []
    model.stack.blocks[-1].register_forward_hook(lambda _module, _inputs, outputs: embedded.append(outputs[0].dtype))
    model(tokens(1), state)
    assert embedded == [torch.float32 if residual_in_float32 else torch.bfloat16]


@pytest.mark.parametrize("exchange_strands", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tied_head", [True, False])
def test_an_equivariant_model_predicts_the_complement_on_the_other_strand(tied_head, layers, exchange_strands):
    model = masked(equivariant=True, layers=layers, exchange_strands=exchange_strands, tied_head=tied_head)
    read = tokens(below=6)
    other = model.reverse_complement(read)
    assert torch.equal(model.reverse_complement(other), read)
    expected = model(read)
    assert relative_error(model(other), expected.flip(1)[..., model.complement]) < FLOAT64
    assert relative_error(model.conjoined_logits(read), expected) < FLOAT64


def test_conjoining_makes_a_plain_model_equivariant():
    model, read = masked(), tokens(below=6)
    other = model.reverse_complement(read)
    plain, conjoined = model(read), model.conjoined_logits(read)
    assert relative_error(model(other), plain.flip(1)[..., model.complement]) > 1e-2
    assert relative_error(model.conjoined_logits(other), conjoined.flip(1)[..., model.complement]) < FLOAT64
    by_position = torch.stack([model(other)[:, 59 - position] for position in range(60)], dim=1)
    by_token = torch.stack([by_position[..., token] for token in (3, 2, 1, 0, 4, 5)], dim=-1)
    assert relative_error(conjoined, (plain + by_token) / 2) < FLOAT64


@pytest.mark.parametrize("equivariant", [True, False])
def test_a_record_of_a_padded_row_is_as_if_alone(equivariant):
    model, read = masked(equivariant=equivariant), tokens(below=6)
    starts = starts_from_lengths([[20, 33], [1, 50]], 60)
    for function in (model, model.conjoined_logits):
        packed = function(read, starts)
        for row, first, last in ((0, 0, 20), (0, 20, 53), (1, 0, 1), (1, 1, 51)):
            alone = function(read[row : row + 1, first:last])
            assert relative_error(packed[row : row + 1, first:last], alone) < FLOAT64


def test_mistakes_are_named():
    with pytest.raises(InputError, match="vocabulary_size must be at least 1"):
        causal(vocabulary_size=0)
    with pytest.raises(InputError, match="at least one layer"):
        causal(mixers=())
    with pytest.raises(InputError, match="layers must be at least 1"):
        masked(layers=0)
    with pytest.raises(InputError, match="needs complement"):
        masked(equivariant=True, complement=None)
    with pytest.raises(InputError, match="exchange_strands is for equivariant models"):
        masked(exchange_strands=True)
    with pytest.raises(InputError, match="no other strand"):
        masked(complement=None).conjoined_logits(tokens(below=6))
    with pytest.raises(InputError, match="at least one token"):
        causal().generate(tokens(0), 1)
    with pytest.raises(InputError, match="count must not be negative"):
        causal().generate(tokens(1), -1)
    with pytest.raises(InputError, match="temperature"):
        causal().generate(tokens(1), 0, temperature=-1)
    for top_p in (0.0, 1.5):
        with pytest.raises(InputError, match="top_p"):
            sample_tokens(PROBABILITIES, top_p=top_p)
