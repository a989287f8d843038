"""Long words: a strain of a known class is recognised by them, pieces are the whole, and repeats say nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genomamba.classification import long_words
from genomamba.classification.combination import WORDS
from genomamba.classification.evidence import RecordEvidence, class_logits, evidence_of_pieces, evidence_of_records
from genomamba.classification.long_words import LongWords, word_logits
from genomamba.classification.part_fit import PartSettings, fit_parts
from genomamba.classification.parts import CountedParts
from genomamba.classification.records import Classification, Group, RecordClassifier
from genomamba.data.genomes import GenomeCollection
from genomamba.models.species_classifier import SpeciesClassifier, load_classifier, save_classifier
from genomamba.tokenizer import ANY_BASE_TOKEN, COMPLEMENT_IDS
from mambacore.errors import InputError
from mambapipelines.species.rows import table_header, table_row
from tests.support.tiny_species import CLASS_NAMES, combined_model, some_parts

LENGTH = 20_000


def genome(seed: int, length: int = LENGTH) -> np.ndarray:
    return (7 + np.random.default_rng([9, seed]).integers(0, 4, length)).astype(np.uint8)


def mutated(tokens: np.ndarray, share: float) -> np.ndarray:
    random = np.random.default_rng(3)
    changed = random.random(len(tokens)) < share
    return np.where(changed, 7 + (tokens - 7 + random.integers(1, 4, len(tokens))) % 4, tokens).astype(np.uint8)


def collection(**genomes: np.ndarray) -> GenomeCollection:
    return GenomeCollection.from_tokens({name: {"x": tokens} for name, tokens in genomes.items()})


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep one word in four, so that small genomes suffice."""
    monkeypatch.setattr(long_words, "ONE_IN", 4)


@pytest.fixture
def words(dense: None) -> LongWords:
    return LongWords.of_genomes(collection(**{name: genome(seed) for seed, name in enumerate(CLASS_NAMES)}))


def model_with(words: LongWords) -> SpeciesClassifier:
    model = combined_model()
    assert model.parts is not None and model.combination is not None
    model.parts = replace(model.parts, words=words)
    model.combination = replace(model.combination, words_one_in=words.one_in)
    return model


def matches_of(words: LongWords, tokens: np.ndarray) -> np.ndarray:
    return words.block_matches(tokens, len(tokens))[0]


def test_the_words_kept_are_the_share_asked_for_and_the_same_on_both_strands(words: LongWords):
    kept = np.bincount(words.owners) / (LENGTH - 20)
    np.testing.assert_allclose(kept, 1 / 4, atol=0.015)
    tokens = mutated(genome(1), 0.01)[2000:6000]
    matches = matches_of(words, tokens)
    np.testing.assert_array_equal(matches, matches_of(words, COMPLEMENT_IDS[tokens[::-1]]))
    # A word of 21 bases survives where none of them changed.
    assert matches[1] == pytest.approx(0.99**21 * 1000, rel=0.2)
    assert matches[[0, 2]].max() == 0


def test_blocks_and_pieces_are_the_whole(words: LongWords, monkeypatch: pytest.MonkeyPatch):
    tokens = mutated(genome(2), 0.002)[:3000]
    tokens[1200:1203] = ANY_BASE_TOKEN
    whole = matches_of(words, tokens)
    np.testing.assert_array_equal(words.block_matches(tokens, 100).sum(axis=0), whole)
    for size in (1, 7, 20, 21, 950):
        total = np.zeros(len(CLASS_NAMES))
        for start in range(0, len(tokens), size):
            piece = tokens[start : start + size]
            total += words.block_matches(piece, len(piece), tokens[:start])[0]
        np.testing.assert_array_equal(total, whole)
    monkeypatch.setattr(long_words, "BASES_AT_A_TIME", 64)
    np.testing.assert_array_equal(matches_of(words, tokens), whole)
    again = LongWords.of_genomes(collection(**{name: genome(seed) for seed, name in enumerate(CLASS_NAMES)}))
    np.testing.assert_array_equal(again.fingerprints, words.fingerprints)


def test_words_with_unknown_bases_do_not_match(words: LongWords):
    tokens = genome(0)[:2000].copy()
    tokens[::20] = ANY_BASE_TOKEN
    assert not matches_of(words, tokens).any()
    assert not words.block_matches(tokens[:5], 5).any()


def test_copies_are_left_out_of_all_classes_but_files_of_one_class_may_agree(dense: None):
    repeat = genome(7, 4000)
    repeats = LongWords.of_genomes(collection(a=np.concatenate([genome(0), repeat, repeat]), b=genome(1), c=repeat))
    assert not matches_of(repeats, repeat).any()
    twice = collection(a=genome(0), b=genome(1))
    strains = tuple(replace(sequence, path="other") for sequence in twice.sequences_of("a"))
    joined = replace(twice, sequences=(*twice.sequences, *strains))
    assert matches_of(LongWords.of_genomes(joined), genome(0))[0] > LENGTH / 4 * 0.9


def test_a_strain_is_called_by_its_long_words_through_every_road(words: LongWords, tmp_path: Path):
    model, plain = model_with(words), combined_model()
    for label in range(len(CLASS_NAMES)):
        tokens = mutated(genome(label), 0.02)[:1500]
        evidence = evidence_of_records(model, [tokens])
        assert class_logits(model, evidence, len(tokens))[0].argmax() == label
        both = tokens, COMPLEMENT_IDS[tokens[::-1]]
        pieces = [tuple(strand[start : start + 97] for strand in both) for start in range(0, len(tokens), 97)]
        np.testing.assert_allclose(evidence_of_pieces(model, pieces), evidence[0], atol=1e-6)
        difference = class_logits(model, evidence, 1500) - class_logits(plain, evidence[:, :-1], 1500)
        alone = model.combination.logits_alone(WORDS, evidence[:, 1:], np.array([1500]))  # type: ignore[union-attr]
        np.testing.assert_allclose(difference, alone, atol=1e-5)
    # Nothing is known of this one: the other parts decide as they would alone.
    stranger = genome(50)[:1500]
    evidence = evidence_of_records(model, [stranger])
    np.testing.assert_array_equal(class_logits(model, evidence, 1500), class_logits(plain, evidence[:, :-1], 1500))
    save_classifier(tmp_path / "model", model, details={})
    again, _ = load_classifier(tmp_path / "model")
    np.testing.assert_array_equal(again.parts.words.fingerprints, words.fingerprints)  # type: ignore[union-attr]
    np.testing.assert_array_equal(evidence_of_records(again, [stranger]), evidence)


def test_logits_are_those_of_the_formula_and_never_favour_a_class_by_chance():
    matches, expected = np.array([[30.0, 12.0, 30.0], [3.0, 0.0, 1.0]]), np.array([40.0, 40.0])
    logits = word_logits(matches, expected)
    assert logits[0].tolist() == pytest.approx([0.0, -3 * np.log(1 + (18 - 3) / 3), 0.0])
    assert not logits[1].any()


def test_damaged_words_are_refused(words: LongWords, tmp_path: Path):
    tensors = words.to_tensors()
    parts = some_parts()
    every = parts.to_tensors() | tensors
    again = CountedParts.from_tensors(every, parts.names).words
    assert again is not None and again.one_in == 4
    short = {long_words.TENSOR_NAME: tensors[long_words.TENSOR_NAME][1:]}
    wide = {long_words.TENSOR_NAME: tensors[long_words.TENSOR_NAME].double()}
    never = {long_words.SAMPLING_NAME: tensors[long_words.SAMPLING_NAME] * 0}
    for damage in (short, wide, never):
        with pytest.raises(InputError, match="long words in the model folder are damaged"):
            CountedParts.from_tensors(every | damage, parts.names)
    model = model_with(words)
    model.combination = combined_model().combination
    save_classifier(tmp_path / "model", model, details={})
    with pytest.raises(InputError, match="damaged"):
        load_classifier(tmp_path / "model")


def test_training_keeps_words_unless_the_recipe_says_otherwise(dense: None):
    genomes = collection(a=genome(0, 40_000), b=genome(1, 40_000))
    settings = PartSettings(markov_order=2, kmer=False)
    fit = fit_parts(genomes, settings, seed=0)
    assert fit is not None and fit.parts.words is not None and fit.combination.words_one_in == 4
    assert fit.combination.kinds == ("markov", WORDS)
    without = fit_parts(genomes, replace(settings, words=False), seed=0)
    assert without is not None and without.parts.words is None and without.combination.words_one_in is None
    np.testing.assert_array_equal(without.combination.counted.coefficients, fit.combination.counted.coefficients)


def test_records_that_share_too_few_words_are_unknown(words: LongWords):
    classifier = RecordClassifier(model_with(words), unknown_shared=0.3)
    half = np.concatenate([genome(2)[:1000], genome(60)[:1000]])
    half[1000:1500] = ANY_BASE_TOKEN
    letters = {"strain": mutated(genome(1), 0.02)[:2000], "stranger": genome(60)[:2000], "half": half}
    table = {name: "".join("ACGTN"[min(int(token) - 7, 4)] for token in tokens) for name, tokens in letters.items()}
    assert set(table["half"]) == set("ACGTN")
    found = {row.name: row for row in classifier.classify(table | {"empty": "N" * 50})}
    assert found["strain"].call == CLASS_NAMES[1] and found["strain"].shared == pytest.approx(0.98**21, abs=0.1)
    assert found["stranger"].call == "unknown" and found["stranger"].shared == 0
    # 500 of its 1,500 known bases are a stranger's.
    assert found["half"].call == CLASS_NAMES[2] and found["half"].shared == pytest.approx(2 / 3, abs=0.08)
    assert found["empty"].call == "unclassified" and found["empty"].shared is None
    assert genomamba_row(found["stranger"]) == "stranger\t2000\tunknown"


def genomamba_row(row: Classification) -> str:
    header = table_header(CLASS_NAMES, ("shared",)).decode().split("\t")
    cells = table_row(row, len(CLASS_NAMES), ("shared",)).decode().rstrip("\n").split("\t")
    assert header[-1] == "shared\n" and cells[-1] == "0.000000" and len(cells) == len(header)
    return "\t".join(cells[:3])


def test_pairs_and_groups_share_what_their_records_do(words: LongWords):
    classifier = RecordClassifier(model_with(words), unknown_shared=0.3)
    group = Group(np.zeros(()))
    records = [(genome(0)[:1000], 1000), (genome(60)[:500], 500)]
    for tokens, length in records:
        evidence = evidence_of_records(classifier._model, [tokens])[0]
        group.add(RecordEvidence("r", length, length, evidence), None)
    assert classifier.answer_group("bin", group).shared == pytest.approx(2 / 3, abs=0.12)


def test_a_model_without_words_cannot_be_asked_for_shares():
    with pytest.raises(InputError, match="no long words to share"):
        RecordClassifier(combined_model(), unknown_shared=0.3)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="give a share from 0 to 1"):
            RecordClassifier(combined_model(), unknown_shared=share)
