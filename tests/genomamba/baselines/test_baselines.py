"""The baselines count what they say, respect both strands and choose on training data only."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from genomamba.baselines import CompositionControl, KmerBaseline, MarkovBaseline, fit_baselines
from genomamba.baselines import fitting as fitting_module
from genomamba.baselines.composition import composition_features
from genomamba.baselines.sampling import draw_windows, set_aside
from genomamba.baselines.words import reverse_complement_codes, word_codes
from genomamba.data.simulation import simulate_clade
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

TOKENIZER = CharacterTokenizer()
YEASTS = Path(__file__).parents[4] / "shared" / "data" / "dna" / "yeasts"


def random_tokens(length: int, seed: int, gc: float = 0.5) -> np.ndarray:
    weights = [(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2]
    return np.random.default_rng(seed).choice(np.arange(7, 11, dtype=np.uint8), size=length, p=weights)


def three_classes(length: int = 30_000, sequences: int = 4) -> list[list[np.ndarray]]:
    return [
        [random_tokens(length, 10 * label + index, gc) for index in range(sequences)]
        for label, gc in enumerate((0.35, 0.5, 0.65))
    ]


def test_words_are_read_in_order_and_those_with_unknown_bases_are_left_out() -> None:
    tokens = TOKENIZER.encode("ACGTNACRTT")
    np.testing.assert_array_equal(word_codes(tokens, 2), [1, 6, 11, 1, 15])
    np.testing.assert_array_equal(word_codes(tokens, 4), [27])
    assert len(word_codes(tokens[:3], 4)) == 0


@pytest.mark.parametrize("word_length", [1, 2, 5])
def test_word_complements_are_those_of_the_tokenizer(word_length: int) -> None:
    words = np.array(list(itertools.product(range(7, 11), repeat=word_length)), dtype=np.uint8)
    expected = [word_codes(TOKENIZER.reverse_complement(word), word_length)[0] for word in words]
    np.testing.assert_array_equal(reverse_complement_codes(word_length), expected)


@pytest.mark.parametrize(("word_length", "features"), [(4, 136), (6, 2080)])
def test_a_spectrum_sums_to_one_and_is_the_same_on_both_strands(word_length: int, features: int) -> None:
    tokens = random_tokens(5_000, 1)
    tokens[100:120] = 11
    spectra = KmerBaseline(word_length).spectra([tokens, TOKENIZER.reverse_complement(tokens), tokens[:2]])
    assert spectra.shape == (3, features)
    np.testing.assert_array_equal(spectra[0], spectra[1])
    np.testing.assert_allclose(spectra[:2].sum(axis=1), 1.0, rtol=1e-5)
    assert not spectra[2].any()


def test_every_baseline_answers_alike_for_both_strands_and_learns_composition() -> None:
    classes = three_classes()
    training = draw_windows(classes, 1_000, 100, np.random.default_rng(0))
    test = draw_windows(three_classes(20_000, 1), 1_000, 30, np.random.default_rng(1))
    other_strand = [TOKENIZER.reverse_complement(window) for window in test.windows]
    models = [
        KmerBaseline(4).fit(training.windows, training.labels),
        CompositionControl().fit(training.windows, training.labels),
        MarkovBaseline(3).fit(classes),
    ]
    for model in models:
        probabilities = model.predict_proba(test.windows)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(model.predict_proba(other_strand), probabilities, atol=1e-9)
        assert (probabilities.argmax(axis=1) == test.labels).mean() > 0.95


def test_the_composition_control_sees_gc_and_unknown_bases_only() -> None:
    windows = [TOKENIZER.encode(text) for text in ("GGCCAATTNN", "CATGTNGRCA", "NNNN", "")]
    np.testing.assert_allclose(composition_features(windows), [[0.5, 0.2], [0.5, 0.2], [0, 1], [0, 1]])


@pytest.mark.parametrize("order", [0, 1, 3])
def test_markov_probabilities_after_each_context_sum_to_one(order: int) -> None:
    sequence = random_tokens(200, 2)  # short: many contexts of order 3 were seen once or never
    strands = [sequence, TOKENIZER.reverse_complement(sequence)]
    model = MarkovBaseline(order).fit([[sequence], [random_tokens(50, 3)]])
    counts = np.zeros((4**order, 4))
    for strand in strands:
        np.add.at(counts.reshape(-1), word_codes(strand, order + 1), 1)
    words = np.array(list(itertools.product(range(7, 11), repeat=order + 1)), dtype=np.uint8)
    expected = np.log([witten_bell(word - 7, strands) for word in words])
    assert np.allclose(np.exp(expected).reshape(-1, 4).sum(axis=1), 1.0)
    both = (expected + expected[reverse_complement_codes(order + 1)]) / 2
    np.testing.assert_allclose(model.log_likelihoods(list(words))[:, 0], both, rtol=1e-5)


def witten_bell(word: np.ndarray, strands: list[np.ndarray]) -> float:
    """P(last base | bases before it), by its recursion; shorter words are counted where a whole word ends."""
    full_length = len(word)

    def count(suffix: tuple[int, ...]) -> int:
        ends = (
            strand[end - len(suffix) : end] - 7 for strand in strands for end in range(full_length, len(strand) + 1)
        )
        return sum(tuple(found) == suffix for found in ends)

    def probability(suffix: tuple[int, ...]) -> float:
        lower = probability(suffix[1:]) if len(suffix) > 1 else 0.25
        followers = [count((*suffix[:-1], base)) for base in range(4)]
        types = sum(number > 0 for number in followers)
        return (followers[suffix[-1]] + types * lower) / (sum(followers) + types) if types else lower

    return probability(tuple(int(base) for base in word))


def test_a_long_window_scores_as_the_sum_of_its_overlapping_pieces() -> None:
    order = 4
    model = MarkovBaseline(order).fit(three_classes(5_000, 1))
    window = random_tokens(100_000, 8)
    pieces = [window[:41_234], window[41_234 - order : 90_000], window[90_000 - order :]]
    np.testing.assert_allclose(model.log_likelihoods([window])[0], model.log_likelihoods(pieces).sum(axis=0), rtol=1e-9)


def test_windows_too_short_to_score_are_equally_probable() -> None:
    model = MarkovBaseline(5).fit(three_classes(5_000, 1))
    np.testing.assert_allclose(model.predict_proba([random_tokens(5, 0), random_tokens(0, 0)]), 1 / 3)


@pytest.mark.parametrize("order", [-1, 11])
def test_orders_out_of_range_are_refused(order: int) -> None:
    with pytest.raises(InputError, match="from 0 to 10"):
        MarkovBaseline(order)


def test_drawn_windows_come_from_both_strands_and_avoid_unknown_bases() -> None:
    sequence = np.tile(np.array([7, 7, 8], dtype=np.uint8), 2_000)  # A and C; T and G on the other strand
    sequence[1_000:2_000] = 11
    drawn = draw_windows([[sequence, sequence[:50]]], 300, 200, np.random.default_rng(0))
    is_forward = np.array([window.min() == 7 for window in drawn.windows])
    assert 60 < is_forward.sum() < 140
    assert all(len(window) == 300 and (window == 11).sum() <= 3 for window in drawn.windows)


def test_drawing_refuses_short_sequences_and_sequences_of_unknown_bases() -> None:
    good = random_tokens(1_000, 0)
    with pytest.raises(InputError, match=r"class number 2 .* longest is 10 bp"):
        draw_windows([[good], [good[:10]]], 100, 1, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"class number 2 .* unknown bases"):
        draw_windows([[good], [np.full(1_000, 11, dtype=np.uint8)]], 100, 1, np.random.default_rng(0))


def test_sequences_of_one_name_are_set_aside_together_and_no_part_is_empty() -> None:
    sequences = [[np.full(100, label * 10 + index % 5, dtype=np.uint8) for index in range(10)] for label in range(2)]
    names = [[f"chr{index % 5}" for index in range(10)]] * 2  # two strains of each species
    for seed in range(10):
        parts = set_aside(sequences, names, np.random.default_rng(seed))
        kept = {int(tokens[0]) % 10 for tokens in itertools.chain(*parts.fitting)}
        aside = {int(tokens[0]) % 10 for tokens in itertools.chain(*parts.choosing)}
        assert not kept & aside
        assert [len(part) for part in parts.fitting] == [6, 6]
        assert [len(part) for part in parts.choosing] == [4, 4]


def test_a_class_of_one_sequence_has_its_last_quarter_set_aside() -> None:
    single, several = random_tokens(1_000, 0), [random_tokens(500, seed) for seed in range(1, 5)]
    parts = set_aside([[single], several], None, np.random.default_rng(0))
    np.testing.assert_array_equal(np.concatenate([parts.fitting[0][0], parts.choosing[0][0]]), single)
    assert len(parts.choosing[0][0]) == 250
    assert len(parts.choosing[1]) == 1


def test_fitted_baselines_answer_every_length_and_say_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting_module, "FITTING_WINDOWS", 60)
    monkeypatch.setattr(fitting_module, "CHOOSING_WINDOWS", 40)
    monkeypatch.setattr(fitting_module, "MARKOV_ORDERS", (3, 5))
    clade = simulate_clade(2, (60_000,) * 3, (60_000,))
    training = clade.sequences(clade.training_names)
    names = [clade.training_names] * len(training)
    fitted = fit_baselines(training, (1_024, 8_192, 1_048_576), seed=1, sequence_names=names)
    assert fitted.names == ("kmer", "markov", "composition")
    description = json.loads(json.dumps(fitted.describe()))
    assert description["kmer"].keys() == description["markov"].keys() == {"1024", "8192"}
    assert description["markov"]["8192"]["order"] in (3, 5)
    assert description["kmer"]["8192"]["word_length"] in (4, 6)

    for length in (8_192, 50_000):
        test = draw_windows(clade.sequences(clade.holdout_names), length, 20, np.random.default_rng(0))
        for name, floor in (("kmer", 0.4), ("markov", 0.6), ("composition", 0.25)):
            predictions = fitted.predict(name, test.windows, length)
            assert predictions.shape == test.labels.shape
            assert (predictions == test.labels).mean() > floor

    again = fit_baselines(training, (1_024, 8_192, 1_048_576), seed=1, sequence_names=names)
    assert again.describe() == fitted.describe()
    for name in fitted.names:
        np.testing.assert_array_equal(
            again.predict(name, test.windows, 50_000), fitted.predict(name, test.windows, 50_000)
        )


@pytest.mark.parametrize("lengths", [(256, 4096), (4096,)])
def test_gaps_that_leave_no_long_window_leave_the_short_ones(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genomamba.baselines.fitting.TRAINING_LENGTHS_BP", (256, 4096))
    monkeypatch.setattr("genomamba.baselines.fitting.FITTING_WINDOWS", 20)
    monkeypatch.setattr("genomamba.baselines.fitting.CHOOSING_WINDOWS", 10)
    random = np.random.default_rng(0)
    whole = (7 + random.integers(0, 4, 40_000)).astype(np.uint8)
    gaps = (7 + (random.random(40_000) < 0.8)).astype(np.uint8)
    gaps[np.arange(40_000) % 1000 < 100] = 0
    fitted = fit_baselines([[whole], [gaps]], lengths, seed=0)
    assert set(fitted.markov_choices) == {256}
    assert {choice.training_length_bp for choice in fitted.kmer_choices.values()} == {256}
    for name in fitted.names:
        assert fitted.predict(name, [whole[:500], gaps[100:600]], 500).tolist() == [0, 1]


def test_sequences_shorter_than_every_length_are_still_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting_module, "FITTING_WINDOWS", 50)
    classes = three_classes(600, 8)
    fitted = fit_baselines(classes, (4_096,), seed=0, names=("kmer", "composition"))
    assert fitted.names == ("kmer", "composition")
    windows = [tokens for sequences in three_classes(600, 3) for tokens in sequences]
    assert (fitted.predict("kmer", windows, 600) == np.repeat([0, 1, 2], 3)).mean() > 0.7
    with pytest.raises(InputError, match="give one of kmer, composition"):
        fitted.predict("markov", windows, 600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ("svm",)}, "'svm'"),
        ({"training_sequences": three_classes(100)[:1]}, "two classes"),
        ({"training_sequences": [three_classes(100)[0], []]}, "at least one training sequence"),
        ({"lengths": ()}, "evaluation length"),
        ({"lengths": (0,)}, "1 bp or more"),
        ({"seed": -1}, "seed of 0 or more"),
    ],
)
def test_impossible_requests_are_refused_with_a_remedy(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_baselines(**{"training_sequences": three_classes(100), "lengths": (50,), "seed": 0, **arguments})


@pytest.mark.skipif(not YEASTS.is_dir(), reason="the yeast genomes of the shared data are not on this machine")
def test_yeast_species_are_told_apart_on_a_chromosome_that_was_held_out() -> None:
    training, held_out = [], []
    for strain in ("cerevisiae.S288C", "paradoxus.CBS432", "arboricola.Sarb"):
        text = gzip.decompress((YEASTS / f"{strain}.fa.gz").read_bytes()).decode()
        records = {
            record.split(maxsplit=1)[0]: TOKENIZER.encode("".join(record.split("\n")[1:]))
            for record in text.split(">")[1:]
        }
        held_out.append([records["chrXI"]])
        training.append([records[name] for name in ("chrI", "chrII", "chrV", "chrX")])
    test = draw_windows(held_out, 131_072, 10, np.random.default_rng(0))
    predictions = MarkovBaseline(5).fit(training).log_likelihoods(test.windows).argmax(axis=1)
    assert (predictions == test.labels).mean() > 0.6
