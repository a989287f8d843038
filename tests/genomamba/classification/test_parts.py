"""Counted parts and their combination: pieces are the whole, strands are alike, and the better part wins."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.baselines.interpolated_markov import StrandSymmetricCounts
from genomamba.classification import part_fit
from genomamba.classification.combination import (
    Combination,
    CountedWeights,
    PartWindows,
    fit_combination,
    fit_to_held_out,
)
from genomamba.classification.evidence import class_logits, evidence_along, evidence_of_pieces, evidence_of_records
from genomamba.classification.part_fit import PartSettings, fit_parts
from genomamba.classification.parts import CountedParts, longest_order
from genomamba.data.genomes import GenomeCollection
from genomamba.models.species_classifier import SpeciesClassifier, load_classifier, save_classifier
from genomamba.tokenizer import COMPLEMENT_IDS
from mambacore.errors import InputError
from tests.support.tiny_species import combined_model, random_bases, some_parts, tiny_model

CLASSES = 3


def test_pieces_are_the_whole_and_both_strands_are_read_at_once():
    parts, tokens = some_parts(), random_bases(700)
    whole = parts.evidence(tokens)
    assert whole.shape == (4, CLASSES) and parts.names == ("markov 1", "markov 2", "markov 3", "kmer 2.x")
    for size in (1, 2, 7, 64, 699):
        total, before = np.zeros_like(whole), np.zeros(0, dtype=np.uint8)
        for start in range(0, len(tokens), size):
            piece = tokens[start : start + size]
            total += parts.evidence(piece, before)
            before = np.concatenate([before, piece])[-parts.history_bp :]
        np.testing.assert_allclose(total, whole, atol=1e-9)
    np.testing.assert_allclose(parts.evidence(COMPLEMENT_IDS[tokens[::-1]]), whole, atol=1e-9)
    blocks = parts.block_evidence(tokens, 100)
    np.testing.assert_allclose(blocks.sum(axis=0), whole, atol=1e-9)


def test_the_evidence_of_a_word_is_its_log_probability_on_both_strands():
    parts = some_parts()
    counts, strengths = parts.counts[1], parts.strengths

    def probability(word: np.ndarray) -> float:
        """Of the last base given those before it."""
        found = 0.25
        for order in range(len(word)):
            own = word[-1 - order :]
            number = int(np.sum((own - 7) * 4 ** np.arange(order, -1, -1)))
            table = counts.of_order(order)
            context = table[number // 4 * 4 : number // 4 * 4 + 4].sum()
            found = (table[number] + strengths[order] * found) / (context + strengths[order])
        return float(found)

    word = np.array([7, 10, 8, 9], dtype=np.uint8)
    expected = (np.log(probability(word)) + np.log(probability(COMPLEMENT_IDS[word[::-1]]))) / 2
    assert parts.evidence(word[3:], word[:3])[2, 1] == pytest.approx(expected, rel=1e-5)


def test_a_model_with_parts_is_the_same_in_pieces_along_and_from_its_folder(tmp_path: Path):
    model, tokens = combined_model(), random_bases(600)
    whole = evidence_of_records(model, [tokens])
    assert whole.shape == (1, 5, CLASSES)
    other = COMPLEMENT_IDS[tokens[::-1]]
    pieces = [(tokens[start : start + 97], other[start : start + 97]) for start in range(0, 600, 97)]
    np.testing.assert_allclose(evidence_of_pieces(model, pieces), whole[0], atol=1e-6)
    along = evidence_along(model, tokens, np.array([0, 200, 450, 600]))
    shares = np.array([200, 250, 150])[:, None, None] / 600
    np.testing.assert_allclose((along * shares).sum(axis=0)[1:], whole[0, 1:], atol=1e-9)
    save_classifier(tmp_path / "model", model, details={})
    again, _ = load_classifier(tmp_path / "model")
    assert again.parts is not None and again.parts.names == model.parts.names  # type: ignore[union-attr]
    np.testing.assert_allclose(evidence_of_records(again, [tokens]), whole, atol=1e-6)
    np.testing.assert_allclose(class_logits(again, whole, 600), class_logits(model, whole, 600), atol=1e-6)
    plain = class_logits(without_parts(model), whole[:, 0], 600)
    assert np.abs(plain - class_logits(model, whole, 600)).max() > 1e-3


def without_parts(model: SpeciesClassifier) -> SpeciesClassifier:
    """The same stack without counted parts, as folders from before had it."""
    bare = tiny_model()
    bare.load_state_dict(model.state_dict())
    return bare


def test_damaged_parts_are_refused(tmp_path: Path):
    parts = some_parts()
    tensors = parts.to_tensors()
    with pytest.raises(InputError, match="damaged"):
        CountedParts.from_tensors(tensors, (*parts.names, "kmer 4.y"))
    with pytest.raises(InputError, match="damaged"):
        CountedParts.from_tensors({**tensors, "parts.counts": tensors["parts.counts"][:, :5]}, parts.names)
    with pytest.raises(InputError, match="damaged"):
        Combination.from_dict({"part_names": []})


def test_counts_of_any_size_come_back_and_those_of_older_folders_too():
    sequence = np.concatenate([random_bases(3000), np.full(700, 7, dtype=np.uint8)])
    parts = CountedParts([StrandSymmetricCounts(3).add([sequence]), *some_parts().counts[1:]], (9.0, 5.0, 4.0, 2.0))
    tensors = parts.to_tensors()
    assert tensors["parts.counts"].dtype == torch.uint8 and len(tensors["parts.counts.large"])
    whole = tensors["parts.counts"].to(torch.int32)
    positions, values = tensors["parts.counts.large"].T
    assert int(values.max()) >= 697
    whole.view(-1)[positions] = values.to(torch.int32)
    older = {"parts.counts": whole, "parts.strengths": tensors["parts.strengths"]}
    for folder in (tensors, older, older | {"parts.counts": whole.to(torch.int16)}):
        again = CountedParts.from_tensors(folder, parts.names)
        for mine, its in zip(parts.counts, again.counts, strict=True):
            np.testing.assert_array_equal(mine.of_order(3), its.of_order(3))
    for damaged in (tensors["parts.counts.large"][1:], tensors["parts.counts.large"] + 1, positions):
        with pytest.raises(InputError, match="damaged"):
            CountedParts.from_tensors(tensors | {"parts.counts.large": damaged}, parts.names)


def windows(strength: np.ndarray, seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of parts that know the class as well as `strength` says, and the labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    evidence = random.normal(size=(count, len(strength), CLASSES))
    evidence[np.arange(count), :, labels] += strength
    return evidence * 1e-3, labels


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def test_the_combination_is_no_worse_than_the_better_part_at_any_length():
    """One part is right at short lengths, the other at long ones; a third is noise with a large spread."""
    strengths = {256: np.array([2.0, 0.0, 0.0]), 1024: np.array([1.0, 1.0, 0.0]), 4096: np.array([0.0, 2.0, 0.0])}
    names = ("markov 1", "kmer 4.x", "kmer 6.x")

    def material(seed: int) -> dict[int, PartWindows]:
        found = {}
        for length, strength in strengths.items():
            evidence, labels = windows(strength, seed + length)
            evidence[:, 2] *= 50
            found[length] = PartWindows(evidence, labels, np.zeros(len(labels), dtype=np.int64))
        return found

    combination = fit_combination(material(0), names)
    assert set(combination.alone) == {"markov", "kmer"}
    for length, of_length in material(1).items():
        lengths = np.full(len(of_length.labels), length)
        together = accuracy(combination.counted.logits(of_length.evidence, lengths), of_length.labels)
        best = max(accuracy(of_length.evidence[:, part], of_length.labels) for part in range(3))
        assert together > best - 0.03
    again = Combination.from_dict(combination.to_dict())
    np.testing.assert_array_equal(again.counted.coefficients, combination.counted.coefficients)


@pytest.mark.parametrize("stack_is_right", [True, False])
def test_the_stack_is_believed_as_far_as_held_out_windows_say(stack_is_right: bool):
    evidence, labels = windows(np.array([1.0]), 5, 400)
    lengths = np.tile([1024, 4096], 200)
    weights = CountedWeights(np.array([1024.0]), np.array([[20.0]]), np.zeros((1, CLASSES)))
    combination = Combination(("markov 1",), weights)
    stack = 3 * np.eye(CLASSES)[labels if stack_is_right else np.random.default_rng(0).integers(0, CLASSES, 400)]
    fitted = fit_to_held_out(combination, stack, evidence, lengths, labels)
    before = accuracy(combination.logits(stack, evidence, lengths), labels)
    after = accuracy(fitted.logits(stack, evidence, lengths), labels)
    if stack_is_right:
        assert after > 0.95 and fitted.stack[0] > 0.5
    else:
        assert after > before - 0.02 and fitted.stack[0] < 0.1
    without = fit_to_held_out(combination, stack, evidence, lengths, labels, use_stack=False)
    assert without.stack == (0.0, 0.0)
    longer, longest = (fitted.join(stack, stack, np.full(400, length)) for length in (4096, 10**9))
    np.testing.assert_array_equal(longer, longest)


def test_parts_learn_classes_from_contigs_that_they_can_tell_apart():
    """Two classes of second-order chains, one in contigs; a part on single bases could not tell them apart."""
    random = np.random.default_rng(0)
    follows = [random.dirichlet([2.0] * 4, size=4) for _ in range(2)]

    def chain(label: int, length: int) -> np.ndarray:
        bases = np.zeros(length, dtype=np.int64)
        uniform = random.random(length)
        steps = np.cumsum(follows[label], axis=1)
        for place in range(1, length):
            bases[place] = np.searchsorted(steps[bases[place - 1]], uniform[place])
        return (7 + np.minimum(bases, 3)).astype(np.uint8)

    genomes = GenomeCollection.from_tokens(
        {"whole": {"x": chain(0, 24_000)}, "contigs": {f"c{number}": chain(1, 2000) for number in range(9)}}
    )
    fit = fit_parts(genomes, PartSettings(markov_order=3), seed=0)
    assert fit is not None
    assert fit.accuracy["combined"][1024] > 0.95
    tokens = [chain(label, 1024) for label in (0, 1, 0, 1)]
    evidence = np.stack([fit.parts.evidence(window) / 1024 for window in tokens])
    logits = fit.combination.counted.logits(evidence[:, :-1], np.full(4, 1024))
    assert logits.argmax(axis=1).tolist() == [0, 1, 0, 1]
    again = fit_parts(genomes, PartSettings(markov_order=3), seed=0)
    assert again is not None
    np.testing.assert_array_equal(again.combination.counted.coefficients, fit.combination.counted.coefficients)
    assert fit_parts(genomes, PartSettings(markov=False, kmer=False), seed=0) is None


def test_many_classes_are_cross_validated_in_fewer_folds_and_without_long_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part_fit, "MANY_CLASSES", 2)
    genomes = GenomeCollection.from_tokens({f"c{seed}": {"x": random_bases(24_000, seed)} for seed in range(CLASSES)})
    said: list[str] = []
    fit = fit_parts(genomes, PartSettings(markov_order=2), seed=0, progress=said.append)
    assert fit is not None and [part.name for part in fit.parts.kmers] == ["kmer 4.weak"]
    assert said[:-1] == ["counted parts, fold 1 of 2", "counted parts, fold 2 of 2"]


def test_many_classes_have_shorter_tables():
    assert longest_order(5, 2_000_000) == 10
    assert longest_order(100, 5_000_000) < 10
    assert longest_order(2, 20_000) < longest_order(2, 200_000) <= 10


def test_a_batch_without_records_has_no_evidence():
    assert evidence_of_records(combined_model(), []).shape[0] == 0
