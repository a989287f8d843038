"""Generation: by the step program or the modules, at once or in parts, from prompts of any lengths, with an end."""

import pytest
import torch

from mambacore import use_backend
from mambacore.errors import InputError
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig, generation
from mambacore.models.language_steps import steps_library
from mambacore.models.sampling import sample_tokens, sampling_probabilities, token_log_likelihoods
from mambacore.native_library import native_library
from mambacore.state import state_tensors
from tolerances import COMPLEX_FLOAT32, FLOAT64, PIECES_FLOAT64, relative_error

SELECTIVE = {"name": "selective", "state_size": 4}
COMPLEX = {"name": "selective", "complex_state": True, "state_size": 3}
VOCABULARY = 13
STACKS = {
    "selective": (SELECTIVE,) * 2,
    "s4d and complex": (
        {"name": "s4d", "state_size": 3},
        {"name": "selective", "complex_state": True, "state_size": 3},
    ),
    "mamba2 and mamba3": (
        {"name": "mamba2", "state_size": 4, "head_width": 4, "groups": 2},
        {"name": "mamba3", "state_size": 6, "head_width": 8},
    ),
    "mamba3 of rank 2": ({"name": "mamba3", "state_size": 4, "head_width": 4, "rank": 2, "output_norm": True},),
    "attention": (SELECTIVE, "attention"),
    "retention": ("retention",),
    "gru and rwkv": ("gru", "rwkv"),
}
NATIVE = ("selective", "s4d and complex", "mamba2 and mamba3", "mamba3 of rank 2")


def causal(mixers=(SELECTIVE,) * 2, **options):
    torch.manual_seed(0)
    config = {"vocabulary_size": VOCABULARY, "model_width": 8, "mixers": mixers, "vocabulary_multiple": 8} | options
    model = CausalLanguageModel(CausalLanguageModelConfig(**config)).double().eval()
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.stack.final_norm.weight)
    return model


def tokens(rows=2, length=7, seed=1):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_states_equal(found, expected):
    for one, other in zip(state_tensors(found), state_tensors(expected), strict=True):
        assert one.dtype == other.dtype and relative_error(one, other) < PIECES_FLOAT64


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.7}, {"top_k": 3}])
@pytest.mark.parametrize("stack", STACKS)
def test_tokens_likelihoods_and_state_are_those_of_the_whole_sequence(stack, options):
    model, prompt = causal(STACKS[stack]), tokens()
    found = model.generate(prompt, 40, generator=seeded(), **options)
    whole = torch.cat([prompt, found.tokens], dim=1)
    with torch.no_grad():
        logits, state = model(whole[:, :-1])
    logits = logits[:, 6:, :VOCABULARY]
    assert relative_error(found.log_likelihoods, token_log_likelihoods(logits, found.tokens)) < PIECES_FLOAT64
    assert_states_equal(found.state, state)
    assert found.lengths.tolist() == [40, 40] and found.tokens.max() < VOCABULARY
    allowed = sampling_probabilities(
        logits, options.get("temperature", 1), options.get("top_p", 1), options.get("top_k")
    )
    assert (allowed.gather(-1, found.tokens.unsqueeze(-1)) > 0).all()


@pytest.mark.skipif(native_library() is None, reason="installed without the native library")
@pytest.mark.parametrize("stack", NATIVE)
@pytest.mark.parametrize("tied_head", [True, False])
def test_the_step_program_generates_what_the_modules_do(stack, tied_head, monkeypatch):
    model, prompt = causal(STACKS[stack], tied_head=tied_head), tokens(3)
    assert steps_library(model) is not None
    for options in ({}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}):
        found = model.generate(prompt, 300, generator=seeded(), **options)
        with monkeypatch.context() as patch:
            patch.setattr(generation, "steps_library", lambda _: None)
            expected = model.generate(prompt, 300, generator=seeded(), **options)
        assert torch.equal(found.tokens, expected.tokens)
        assert relative_error(found.log_likelihoods, expected.log_likelihoods) < PIECES_FLOAT64
        assert_states_equal(found.state, expected.state)


@pytest.mark.skipif(native_library() is None, reason="installed without the native library")
@pytest.mark.parametrize("stack", NATIVE)
def test_the_step_program_generates_what_the_modules_do_in_float32(stack, monkeypatch):
    model, prompt = causal(STACKS[stack]).float(), tokens(5)
    for options in ({}, {"temperature": 0.0}):
        found = model.generate(prompt, 60, generator=seeded(), **options)
        with monkeypatch.context() as patch:
            patch.setattr(generation, "steps_library", lambda _: None)
            expected = model.generate(prompt, 60, generator=seeded(), **options)
        assert torch.equal(found.tokens, expected.tokens)
        assert relative_error(found.log_likelihoods, expected.log_likelihoods) < COMPLEX_FLOAT32


@pytest.mark.skipif(native_library() is None, reason="installed without the native library")
def test_what_a_program_would_bypass_is_generated_by_the_modules():
    with use_backend("torch"):
        assert steps_library(causal()) is None
    assert steps_library(causal(("attention",))) is None
    assert steps_library(causal(context_symbols=(0, 4), context_widths=(2,))) is None
    for path in ("embedding", "stack", "stack.final_norm", "stack.blocks.0", "stack.blocks.1.mixer.input_projection"):
        model = causal()
        assert steps_library(model) is not None
        model.get_submodule(path).register_forward_hook(lambda *_: None)
        assert steps_library(model) is None, path
    with torch.autocast("cpu", torch.bfloat16):
        assert steps_library(causal()) is None


@pytest.mark.parametrize("stack", STACKS)
def test_generation_in_parts_equals_generation_at_once(stack):
    model, prompt = causal(STACKS[stack]), tokens()
    whole = model.generate(prompt, 41, generator=seeded())
    source = seeded()
    first = model.generate(prompt, 20, generator=source)
    second = model.generate(first.tokens[:, -1:], 21, generator=source, state=first.state)
    assert torch.equal(torch.cat([first.tokens, second.tokens], dim=1), whole.tokens)
    assert_states_equal(second.state, whole.state)
    nothing = model.generate(prompt, 0)
    assert nothing.tokens.shape == (2, 0)
    again = model.generate(prompt[:, -1:], 41, generator=seeded(), state=nothing.state)
    assert torch.equal(again.tokens, whole.tokens)


@pytest.mark.parametrize("stack", STACKS)
def test_prompts_of_unequal_lengths_are_continued_as_if_each_were_of_its_length(stack):
    model = causal(STACKS[stack])
    prompts = [tokens(1, length, seed=length)[0] for length in (5, 1, 9, 5)]
    found = model.generate(prompts, 30, temperature=0)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], 30, temperature=0)
        assert torch.equal(found.tokens[row], alone.tokens[0])
        assert relative_error(found.log_likelihoods[row], alone.log_likelihoods[0]) < PIECES_FLOAT64
    padded = [tokens(1, 6, seed=length)[0] for length in (1, 2, 3)]
    one, other = (
        model.generate(padded, 20, generator=seeded()),
        model.generate(torch.stack(padded), 20, generator=seeded()),
    )
    assert torch.equal(one.tokens, other.tokens)
    assert_states_equal(one.state, other.state)


def test_rows_of_unequal_prompts_stand_side_by_side_where_states_have_one_size():
    model = causal()
    prompts = [tokens(1, length, seed=length)[0] for length in (4, 9, 2)]
    found = model.generate(prompts, 30, generator=seeded())
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, found.tokens[row]])[None, :-1]
        _, expected = model(whole)
        picked = [tensor[row : row + 1] for tensor in state_tensors(found.state)]
        for one, other in zip(picked, state_tensors(expected), strict=True):
            assert relative_error(one, other) < PIECES_FLOAT64


@pytest.mark.parametrize("count", [12, 600])
def test_a_row_ends_at_its_eos(count):
    model, prompt = causal(), tokens(4)
    free = model.generate(prompt, count, generator=seeded())
    eos = int(free.tokens[0, 4])
    found = model.generate(prompt, count, generator=seeded(), eos=eos)
    assert found.tokens.shape == (4, count)
    for row in range(4):
        places = (free.tokens[row] == eos).nonzero().flatten().tolist()
        length = places[0] + 1 if places else count
        assert found.lengths[row] == length
        assert torch.equal(found.tokens[row, :length], free.tokens[row, :length])
        assert (found.tokens[row, length:] == eos).all() and (found.log_likelihoods[row, length:] == 0).all()
        assert (found.log_likelihoods[row, :length] < 0).all()
    assert found.lengths[0] <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": tokens(2, 0)}, "at least one token"),
        ({"prompt": tokens()[0]}, "at least one token"),
        ({"prompt": tokens().float()}, "which are integers"),
        ({"prompt": tokens() + 16}, "the model has those from 0 to 15"),
        ({"prompt": tokens() - 13}, "the model has those from 0 to 15"),
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": [tokens()]}, "prompt 0 must be"),
        ({"prompt": [tokens()[0], tokens()[0, :0]]}, "prompt 1 must be"),
        ({"prompt": [tokens()[0], tokens()[0, :3]], "state": ()}, "prompts of one length"),
        ({"count": -1}, "count must not be negative"),
        ({"eos": 13}, "eos is the token 13"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k must be at least 1 but is 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments, message):
    with pytest.raises(InputError, match=message) as refused:
        causal().generate(**({"prompt": tokens(), "count": 3} | arguments))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 0.5 / 0.8, 0.3 / 0.8, 0]),
        ({"top_k": 9}, [0.15, 0.5, 0.3, 0.05]),
        ({"top_k": 3, "top_p": 0.51}, [0, 0.5 / 0.8, 0.3 / 0.8, 0]),
        ({"top_k": 1, "top_p": 0.99}, [0, 1, 0, 0]),
        ({"temperature": 0.0, "top_k": 3}, [0, 1, 0, 0]),
    ],
)
def test_top_k_keeps_the_likeliest(options, expected):
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05]], dtype=torch.float64).log()
    assert (
        relative_error(sampling_probabilities(logits, **options)[0], torch.tensor(expected, dtype=torch.float64))
        < FLOAT64
    )


def test_of_equal_tokens_the_first_are_kept():
    assert sampling_probabilities(torch.zeros(1, 4), top_k=2).tolist() == [[0.5, 0.5, 0, 0]]
    assert sampling_probabilities(torch.zeros(1, 4), top_p=0.5).tolist() == [[0.5, 0.5, 0, 0]]
    assert sampling_probabilities(torch.zeros(1, 4), temperature=0).tolist() == [[1, 0, 0, 0]]


def test_the_same_number_gives_the_same_token():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-16], dtype=torch.float64)
    assert sample_tokens(logits, uniforms=uniforms).tolist() == [0, 0, 2, 2, 3, 3]
    assert sample_tokens(logits, top_k=1, uniforms=uniforms).tolist() == [2] * 6


@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=["program", "modules"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_no_numbers_generates_nothing(temperature, options):
    """Weights that are finite may overflow; tokens drawn from NaN would look like tokens."""
    model = causal().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.sign_().mul_(3e38)
    with pytest.raises(InputError, match=r"computes probabilities that are not numbers \(NaN\)"):
        model.generate(tokens(), 20, temperature=temperature, **options)
