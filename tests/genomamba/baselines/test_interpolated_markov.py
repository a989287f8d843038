"""Markov models beside a language model: exact by definition, on both strands, and not an easy opponent."""

import math

import numpy as np
import pytest

from genomamba.baselines.interpolated_markov import (
    InterpolatedMarkovModel,
    StrandSymmetricCounts,
    fit_markov_models,
    log_probability_table,
)
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError
from tiny_dna import predictable_dna

COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A"}


def encode(text):
    return CharacterTokenizer().encode(text)


def test_probabilities_are_those_of_the_definition():
    sequences = ["ACGGTACCANGTACGGATTTACGCA", "GGGACNCGAT"]
    strands = [*sequences, *("".join(COMPLEMENT.get(base, base) for base in reversed(one)) for one in sequences)]
    strengths = (4.0, 2.0, 1.0, 0.5)
    window = "TACGGNACGTTAC"
    counts = StrandSymmetricCounts(3).add([encode(one) for one in sequences])
    found = InterpolatedMarkovModel(counts, strengths).log_probabilities(encode(window))
    # Words of four bases are what is counted; shorter ones are their ends.
    words = [one[start : start + 4] for one in strands for start in range(len(one) - 3)]
    words = [word for word in words if "N" not in word]
    for position, letter in enumerate(window):
        if letter == "N":
            assert found[position] == 0
            continue
        probability = 0.25
        for order, strength in enumerate(strengths):
            context = window[position - order : position]
            if order > position or "N" in context:
                break
            followed = {base: sum(word.endswith(context + base) for word in words) for base in "ACGT"}
            probability = (followed[letter] + strength * probability) / (sum(followed.values()) + strength)
        assert found[position] == pytest.approx(math.log(probability)), position


def test_a_model_sums_to_one_over_the_four_bases():
    counts = StrandSymmetricCounts(4).add([encode(predictable_dna(500))])
    model = InterpolatedMarkovModel(counts, (3.0,) * 5)
    totals = sum(math.exp(model.log_probabilities(encode("ACCGT" + base))[-1]) for base in "ACGT")
    assert totals == pytest.approx(1)


def test_both_strands_count_alike():
    tokens = encode(predictable_dna(700))
    other = CharacterTokenizer().reverse_complement(tokens)
    first, second = (StrandSymmetricCounts(5).add([one]) for one in (tokens, other))
    assert all(np.array_equal(first.of_order(order), second.of_order(order)) for order in range(6))


def test_a_table_holds_the_models_probabilities():
    counts = StrandSymmetricCounts(3).add([encode(predictable_dna(900))])
    model = InterpolatedMarkovModel(counts, (7.0, 5.0, 2.0, 3.0))
    table = log_probability_table(model)
    assert table.shape == (64, 4)
    found = model.log_probabilities(encode("GCTA"))[-1]  # G 2, C 1, T 3
    assert table[2 * 16 + 1 * 4 + 3, 0] == pytest.approx(found, abs=1e-5)


def test_the_order_of_the_sequence_is_found_and_its_entropy_reached():
    training = [encode(predictable_dna(15_000, seed)) for seed in range(3)]
    fitted = fit_markov_models(training, [encode(predictable_dna(4_000, 7))], 5)
    # A quarter of the 10 % that are drawn at random agree with the rule.
    right = 0.925
    entropy = -right * math.log(right) - 0.075 * math.log(0.025)
    test = encode(predictable_dna(4_000, 8))
    reached = -fitted.best.log_probabilities(test)[2:].mean()
    assert fitted.best.order >= 2
    assert fitted.validation_entropies[1] > entropy + 0.1
    # Words of the other strand are counted too and follow another rule, which a context of two cannot tell apart.
    assert reached < fitted.validation_entropies[0] - 0.1
    by_order = list(fitted.log_probabilities_by_order(test))
    for model, log_probabilities in zip(fitted.models, by_order, strict=True):
        assert np.allclose(model.log_probabilities(test), log_probabilities)


def test_noise_makes_no_order_better_than_the_uniform_distribution_by_much():
    random = np.random.default_rng(0)
    noise = [random.integers(7, 11, 20_000).astype(np.uint8) for _ in range(3)]
    fitted = fit_markov_models(noise[:1], noise[1:2], 8)
    entropies = [-model.log_probabilities(noise[2]).mean() for model in fitted.models]
    assert max(entropies) < math.log(4) + 0.002  # strengths fitted on validation do not overfit


def test_mistakes_are_named():
    with pytest.raises(InputError, match="order from 0 to 12"):
        StrandSymmetricCounts(13)
    with pytest.raises(InputError, match="no bases to select"):
        fit_markov_models([encode("ACGT")], [encode("NNN")], 1)
