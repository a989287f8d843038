"""The gate on evidence: pieces are the whole, strands and classes are alike, and it comes back from a folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.classification import gate_fit
from genomamba.classification.evidence import class_logits, evidence_along, evidence_of_pieces, evidence_of_records
from genomamba.classification.evidence_gate import EvidenceGate
from genomamba.classification.gate_fit import GatePieces, fit_gate
from genomamba.classification.part_fit import PartSettings, fit_parts
from genomamba.classification.parts import CountedParts
from genomamba.data.genomes import GenomeCollection
from genomamba.models.species_classifier import load_classifier, save_classifier
from genomamba.tokenizer import ANY_BASE_TOKEN, COMPLEMENT_IDS
from mambacore.errors import InputError
from tests.support.tiny_species import combined_model, random_bases, some_gate, some_parts
from tests.support.tolerances import FLOAT32, PIECES_FLOAT32, relative_error

CLASSES = 3
GATE_ROW = 5  # after the stack, the orders 1 to 3, and a regression


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return relative_error(torch.from_numpy(found), torch.from_numpy(expected)) < tolerance


def test_pieces_are_the_whole_and_strands_padding_and_batches_do_not_matter():
    model, tokens = combined_model(gated=True), random_bases(600)
    assert model.parts is not None and model.parts.names[-1] == "gate"
    other = COMPLEMENT_IDS[tokens[::-1]]
    whole = evidence_of_records(model, [tokens])[0]
    assert whole.shape == (GATE_ROW + 1, CLASSES)
    assert np.abs(whole[GATE_ROW]).max() > 1e-5
    plain = evidence_of_records(combined_model(), [tokens])[0]
    np.testing.assert_array_equal(whole[:GATE_ROW], plain)
    in_a_batch = evidence_of_records(model, [tokens[:50], tokens, other, random_bases(610, 9)])
    for found in (in_a_batch[1], in_a_batch[2], evidence_of_records(model, [other])[0]):
        assert close(found[GATE_ROW], whole[GATE_ROW], PIECES_FLOAT32)
    for size, length in ((1, 40), (7, 600), (64, 600), (599, 600)):
        short, reverse = tokens[:length], COMPLEMENT_IDS[tokens[:length][::-1]]
        starts = range(0, length, size)
        pieces = evidence_of_pieces(model, ((short[at : at + size], reverse[at : at + size]) for at in starts))
        assert close(pieces[GATE_ROW], evidence_of_records(model, [short])[0, GATE_ROW], PIECES_FLOAT32), size
    boundaries = np.array([0, 200, 200, 450, 600])
    along = evidence_along(model, tokens, boundaries)
    total = (along * np.diff(boundaries)[:, None, None]).sum(axis=0) / 600
    assert close(total[GATE_ROW], whole[GATE_ROW], PIECES_FLOAT32)
    blocks = model.parts.gate_block_evidence(tokens, 100)
    assert blocks.shape == (6, CLASSES) and close(blocks.sum(axis=0) / 600, whole[GATE_ROW], PIECES_FLOAT32)


def test_records_longer_than_a_piece_and_threads_give_the_same(monkeypatch: pytest.MonkeyPatch):
    model, tokens = combined_model(gated=True), random_bases(600)
    records = [tokens, random_bases(90, 1), random_bases(280, 2)]
    expected = evidence_of_records(model, records)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(evidence_of_records(model, records), expected)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("genomamba.classification.evidence.PIECE_LENGTH_BP", 64)
    assert close(evidence_of_records(model, records), expected, PIECES_FLOAT32)


def test_classes_are_interchangeable_and_unknown_bases_are_no_evidence():
    parts, tokens = replace(some_parts(), gate=some_gate()), random_bases(300)
    found, _ = parts.gate_evidence(tokens[None])
    order = [2, 0, 1]
    permuted = replace(parts, counts=[parts.counts[label] for label in order])
    assert close(permuted.gate_evidence(tokens[None])[0], found[..., order], FLOAT32)
    unknown = np.full((1, 40), ANY_BASE_TOKEN, dtype=np.uint8)
    assert not parts.gate_evidence(unknown)[0].any()
    padded = np.concatenate([tokens[None], unknown], axis=1)
    assert close(parts.gate_evidence(padded)[0], found, FLOAT32)


def test_a_gate_that_was_not_trained_is_a_sum_over_the_orders():
    parts, tokens = replace(some_parts(), gate=EvidenceGate((1, 3), width=8).eval()), random_bases(300)
    plain = parts.evidence(tokens)[[0, 2]].sum(axis=0) * 0.15
    assert close(parts.gate_evidence(tokens[None])[0][0, 0], plain - plain.mean(), FLOAT32)


def test_a_gate_comes_back_from_its_folder_and_a_damaged_one_is_refused(tmp_path: Path):
    model, tokens = combined_model(gated=True), random_bases(400)
    save_classifier(tmp_path / "model", model, details={})
    again, _ = load_classifier(tmp_path / "model")
    expected = evidence_of_records(model, [tokens])
    np.testing.assert_array_equal(evidence_of_records(again, [tokens]), expected)
    np.testing.assert_array_equal(class_logits(again, expected, 400), class_logits(model, expected, 400))
    parts = model.parts
    assert parts is not None
    tensors = parts.to_tensors()
    weights = tensors["parts.gate.inputs.weight"]
    damage = {
        "settings": torch.tensor([8, 1, 4, 1, 9]),
        "inputs.weight": weights[:, :-1],
        "gate.bias": torch.full_like(tensors["parts.gate.gate.bias"], torch.nan),
        "order_weights": torch.zeros(3),
        "unknown": torch.zeros(3),
    }
    for name, value in damage.items():
        with pytest.raises(InputError, match="damaged"):
            CountedParts.from_tensors(tensors | {f"parts.gate.{name}": value}, parts.names)
    for names in (parts.names[:-1], (*parts.names, "gate")):
        with pytest.raises(InputError, match="damaged"):
            CountedParts.from_tensors(tensors, names)
    without = {name: value for name, value in tensors.items() if "gate" not in name}
    with pytest.raises(InputError, match="damaged"):
        CountedParts.from_tensors(without, parts.names)


def noisy_genomes(contig_bp: int) -> GenomeCollection:
    """Two classes of second-order chains, one of them in contigs."""
    random = np.random.default_rng(0)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, length in (("whole", 60_000), ("contigs", contig_bp)):
        steps = np.cumsum(random.dirichlet([4.0] * 4, size=4), axis=1)
        bases = np.zeros(60_000, dtype=np.int64)
        uniform = random.random(len(bases))
        for place in range(1, len(bases)):
            bases[place] = min(3, np.searchsorted(steps[bases[place - 1]], uniform[place]))
        tokens = (7 + bases).astype(np.uint8)
        found[name] = {f"c{start}": tokens[start : start + length] for start in range(0, len(tokens), length)}
    return GenomeCollection.from_tokens(found)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_fit, "FEWEST_PIECES", 8)
    monkeypatch.setattr(gate_fit, "MOST_PASSES", 10)
    monkeypatch.setattr(gate_fit, "PIECES_PER_STEP", 4)


@pytest.mark.usefixtures("small_pieces")
def test_the_parts_are_fitted_with_a_gate_that_depends_on_the_seed_only():
    genomes = noisy_genomes(2000)
    settings = PartSettings(markov_order=3, kmer=False, gate_steps=2)
    said: list[str] = []
    fit = fit_parts(genomes, settings, seed=0, progress=said.append)
    assert fit is not None and fit.parts.gate is not None
    assert fit.parts.gate.orders == (1, 3) and tuple(fit.combination.alone) == ("markov", "gate")
    assert "evidence gate, step 1 of 2" in said and "evidence of the gate, fold 5 of 5" in said
    assert fit.accuracy["gate"][1024] > 0.95 and fit.accuracy["combined"][1024] > 0.95
    coefficients = fit.combination.counted.coefficients
    assert np.abs(coefficients[:, -1]).min() > 0
    again = fit_parts(genomes, settings, seed=0)
    assert again is not None
    np.testing.assert_array_equal(again.combination.counted.coefficients, coefficients)
    without = fit_parts(genomes, replace(settings, gate=False), seed=0)
    assert without is not None and without.parts.gate is None and without.parts.names == fit.parts.names[:-1]


def test_small_genomes_have_no_gate():
    fit = fit_parts(noisy_genomes(2000), PartSettings(markov_order=2, kmer=False), seed=0)
    assert fit is not None and fit.parts.gate is None and "gate" not in fit.combination.alone


def sampled(genomes: GenomeCollection, order: int = 3) -> tuple[GatePieces, CountedParts]:
    """Pieces of the genomes, under random models of as many classes."""
    parts = replace(some_parts(), counts=some_parts().counts[: len(genomes.class_names)], kmers=())
    pieces = GatePieces(len(genomes.class_names), order, 1)
    pieces.add(parts, genomes, fold=0, seed=0)
    return pieces, parts


@pytest.mark.usefixtures("small_pieces")
def test_training_lowers_the_cross_entropy_of_the_true_class():
    pieces, _ = sampled(noisy_genomes(2000))
    first, trained = (fit_gate(pieces, steps, seed=0) for steps in (1, 6))
    assert first is not None and trained is not None
    batch, scales = pieces.batch(seed=5, step=0), torch.zeros(3)
    with torch.no_grad():
        before, after = (float(gate_fit._loss(gate, scales, batch)) for gate in (first, trained))
    assert after < before - 0.01
    assert not any(weight.requires_grad for weight in trained.parameters())


def test_short_contigs_are_joined_with_an_unknown_base_between():
    pieces, _ = sampled(noisy_genomes(2000))
    statistics, deviations, tokens = pieces.batch(seed=0, step=0)
    gaps = (tokens == ANY_BASE_TOKEN).sum(dim=1)
    assert gaps[::2].max() == 0 and gaps[1::2].min() >= 2  # whole sequence and contigs in turn
    unknown = tokens == ANY_BASE_TOKEN
    assert not statistics[unknown].any() and not deviations[unknown].any()


def test_with_many_classes_a_piece_keeps_its_own_and_the_hardest(monkeypatch: pytest.MonkeyPatch):
    genomes = GenomeCollection.from_tokens({f"c{seed}": {"x": random_bases(9000, seed)} for seed in range(CLASSES)})
    every, parts = sampled(genomes)
    monkeypatch.setattr(gate_fit, "KEPT_CLASSES", 2)
    some, _ = sampled(genomes)
    all_of_three, two = every.batch(seed=0, step=0)[1], some.batch(seed=0, step=0)[1]
    assert all_of_three.shape[-1] == CLASSES and two.shape[-1] == 2
    assert torch.equal(two, all_of_three[..., :2])
    sums = all_of_three.sum(dim=(1, 2))
    assert (sums[:, 1] >= sums[:, 2]).all()
    # The means are over all classes; half precision keeps 11 bits.
    assert all_of_three.sum(dim=-1).abs().max() < 2e-3
    assert np.abs(parts.evidence(random_bases(9000, 0))).max() > 0


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_the_memory_of_the_pieces_is_bounded_whatever_the_number_of_classes(classes: int):
    folds = 5 if classes <= 20 else 2
    pieces = GatePieces(classes, 10, folds)
    values = len(pieces.orders) * (2 + min(classes, gate_fit.KEPT_CLASSES))
    most = pieces.per_class * classes * folds
    assert most >= gate_fit.FEWEST_PIECES and most * gate_fit.PIECE_BP * (2 * values + 1) <= gate_fit.MOST_BYTES


@pytest.mark.parametrize("kind", ["text", "short", "zeros"])
def test_settings_that_are_no_shape_are_refused(kind: str):
    tensors = some_gate().to_tensors()
    damage: dict[str, Callable[[], torch.Tensor]] = {
        "text": lambda: torch.tensor([8.0, 1.0, 4.0, 1.0, 3.0]),
        "short": lambda: torch.tensor([8]),
        "zeros": lambda: torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(InputError, match="damaged"):
        EvidenceGate.from_tensors(tensors | {"settings": damage[kind]()})
    assert EvidenceGate.from_tensors({}) is None
