"""Generation: distributions, seeds, and the log-likelihood of what was made."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genomamba.models.language_model import FIRST_BASE_TOKEN
from genomamba.scoring.generation import GeneratedRecord, Sampling, generate
from genomamba.tokenizer import CharacterTokenizer, Tokens
from mambacore.errors import InputError
from tiny_language_models import language_model
from tolerances import PIECES_FLOAT64

TOKENIZER = CharacterTokenizer()
NOTHING = TOKENIZER.encode("")
PROMPTS = [TOKENIZER.encode(text) for text in ("ACGT", "ACGT", "TTN", "GATTACA")] + [NOTHING] * 3
LOG_PROBABILITIES = st.lists(st.floats(-8, 0), min_size=4, max_size=4)


def made(
    kind: str, prompts: list[Tokens], length: int = 40, sampling: Sampling | None = None, **options: int
) -> list[GeneratedRecord]:
    return list(generate(language_model(kind), prompts, length, sampling or Sampling(), **options))


@pytest.mark.parametrize("kind", ["causal", "contexts", "hybrid"])
def test_the_log_likelihood_is_that_of_reading_the_bases_at_once(kind: str) -> None:
    model = language_model(kind)
    for prompt, record in zip(PROMPTS, made(kind, PROMPTS, sampling=Sampling(0.7, 3, 0.9)), strict=True):
        assert record.tokens.shape == (40,)
        assert set(record.tokens.tolist()) <= {7, 8, 9, 10}
        tokens = torch.from_numpy(np.concatenate([prompt, record.tokens])).long()
        found, _ = model.next_base_log_probabilities(tokens[None])
        bases = tokens - FIRST_BASE_TOKEN
        first = max(1, len(prompt))
        expected = sum(float(found[0, place - 1, bases[place]]) for place in range(first, len(tokens)))
        expected -= 0 if len(prompt) else math.log(4)
        assert record.log_likelihood == pytest.approx(expected, abs=PIECES_FLOAT64)


def test_a_record_is_a_function_of_the_seed_and_its_number() -> None:
    whole = made("causal", PROMPTS, seed=5)
    for batch_size in (1, 2):
        for one, other in zip(whole, made("causal", PROMPTS, seed=5, batch_size=batch_size), strict=True):
            assert one.index == other.index
            np.testing.assert_array_equal(one.tokens, other.tokens)
    fewer = made("causal", PROMPTS[:3], seed=5)
    np.testing.assert_array_equal(fewer[2].tokens, whole[2].tokens)
    assert any(
        (one.tokens != other.tokens).any() for one, other in zip(whole, made("causal", PROMPTS, seed=6), strict=True)
    )
    assert (whole[0].tokens != whole[1].tokens).any()  # the same prompt, another number
    longer = made("causal", PROMPTS[:1], length=1500, seed=5)
    np.testing.assert_array_equal(longer[0].tokens[:40], whole[0].tokens)
    assert (longer[0].tokens[:400] != longer[0].tokens[1024 : 1024 + 400]).any()


def test_temperature_0_takes_the_likeliest_base() -> None:
    model = language_model("causal")
    (record,) = made("causal", PROMPTS[:1], sampling=Sampling(0))
    tokens = torch.from_numpy(np.concatenate([PROMPTS[0], record.tokens])).long()
    found, _ = model.next_base_log_probabilities(tokens[None])
    likeliest = found[0, 3:-1].argmax(-1) + FIRST_BASE_TOKEN
    assert likeliest.tolist() == record.tokens.tolist()
    for other in (Sampling(top_k=1), Sampling(top_p=1e-9)):
        np.testing.assert_array_equal(made("causal", PROMPTS[:1], sampling=other)[0].tokens, record.tokens)


def test_bases_are_drawn_with_the_model_s_probabilities() -> None:
    model = language_model("causal")
    found, _ = model.next_base_log_probabilities(torch.from_numpy(PROMPTS[0]).long()[None])
    records = made("causal", [PROMPTS[0]] * 4000, length=1, batch_size=4000)
    counts = np.bincount([int(record.tokens[0]) - FIRST_BASE_TOKEN for record in records], minlength=4)
    expected = found[0, -1].exp().numpy()
    # Four standard deviations of a share of 4,000 draws.
    assert np.abs(counts / 4000 - expected).max() < 4 * math.sqrt(0.25 / 4000)
    assert expected.max() - expected.min() > 0.1


@given(
    log_probabilities=LOG_PROBABILITIES,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(1, 4),
    top_p=st.floats(0.01, 1),
)
def test_probabilities_keep_their_order_and_as_few_bases_as_asked(
    log_probabilities: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    values = np.array([log_probabilities])
    found = Sampling(temperature, top_k, top_p).probabilities(values)[0]
    assert found.sum() == pytest.approx(1)
    kept = found > 0
    assert 1 <= kept.sum() <= top_k
    if not kept.all():
        assert values[0][kept].min() >= values[0][~kept].max()
    full = np.exp(values[0] / temperature - np.max(values[0] / temperature))
    full /= full.sum()
    assert full[kept].sum() >= min(top_p, np.sort(full)[::-1][:top_k].sum()) - 1e-9
    np.testing.assert_allclose(found[kept], full[kept] / full[kept].sum(), atol=1e-9)


def test_progress_counts_every_base() -> None:
    counted: list[int] = []
    list(generate(language_model("causal"), PROMPTS[:2], 1500, Sampling(), advance=counted.append))
    assert sum(counted) == 3000
    assert len(counted) > 1


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 0}, {"top_k": 5}, {"temperature": math.inf}],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**settings)  # type: ignore[arg-type]


def test_masked_models_and_empty_records_are_refused() -> None:
    with pytest.raises(InputError, match="generation needs a causal one"):
        made("masked", PROMPTS)
    with pytest.raises(InputError, match="records of 0 bp"):
        made("causal", PROMPTS, length=0)
