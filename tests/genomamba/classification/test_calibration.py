"""Calibration: probabilities become honest, calls stay what they were."""

import numpy as np
import pytest
import torch

from genomamba.classification import evidence
from genomamba.classification.calibration import (
    Confidence,
    HeldOutEvidence,
    calibrate,
    calibration_lengths,
    collect_evidence,
    expected_calibration_error,
    fit_confidence,
)
from genomamba.classification.evidence import evidence_of_records
from genomamba.data.genomes import GenomeCollection
from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig
from genomamba.tokenizer import CharacterTokenizer


def tiny_model(seed: int = 0) -> SpeciesClassifier:
    config = SpeciesClassifierConfig(class_names=("a", "b", "c"), model_width=8, layers=1, state_size=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SpeciesClassifier(config)
        with torch.no_grad():
            for head in (model.class_next_base, model.deviation):
                head.weight.normal_(std=0.1)
    return model.eval()


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(7, 11, size=shape, dtype=np.uint8)


def simulated_evidence(truth: Confidence, windows_per_length: int = 3000) -> HeldOutEvidence:
    """Evidence whose labels are drawn with exactly the probabilities that `truth` gives."""
    random = np.random.default_rng(3)
    lengths = np.repeat([1024, 4096, 16_384], windows_per_length)
    scale = np.exp(truth.intercept + truth.slope * np.log(lengths / 1024))
    evidence = random.normal(size=(len(lengths), 3)) * 1.5 / scale[:, None]
    cumulated = np.exp(truth.log_probabilities(evidence, lengths)).cumsum(axis=1)
    labels = (random.random(len(lengths))[:, None] > cumulated).sum(axis=1).clip(max=2)
    return HeldOutEvidence(evidence, lengths, labels, np.arange(len(lengths)) % 2)


def test_the_confidence_that_made_the_labels_is_found_again() -> None:
    fitted = fit_confidence(simulated_evidence(Confidence(5.0, 0.6)), prior=Confidence(6.0, 0.9))
    assert fitted.intercept == pytest.approx(5.0, abs=0.1)
    assert fitted.slope == pytest.approx(0.6, abs=0.06)


def test_calibration_repairs_an_overconfident_model_and_keeps_every_call() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.confidence_intercept.fill_(7.0)
        model.confidence_slope.fill_(0.6)
    evidence = simulated_evidence(Confidence(5.0, 0.6))
    pooled = torch.tensor(evidence.mean_evidence)
    lengths = torch.tensor(evidence.lengths_bp)
    calls_before = model.logits(pooled, lengths).argmax(dim=1)
    report = calibrate(model, evidence)
    assert torch.equal(model.logits(pooled, lengths).argmax(dim=1), calls_before)
    assert report.expected_calibration_error_before > 0.2
    assert report.expected_calibration_error_after < 0.03
    assert report.negative_log_likelihood_after < report.negative_log_likelihood_before
    assert model.confidence_intercept.item() == pytest.approx(report.intercept)
    assert report.windows_by_length == {1024: 3000, 4096: 3000, 16_384: 3000}
    assert report.to_dict()["windows_by_length"] == {"1024": 3000, "4096": 3000, "16384": 3000}
    assert "9000 held-out windows" in report.summary()


def test_a_confidence_means_the_same_in_the_fit_and_in_the_model() -> None:
    model = tiny_model()
    trained = Confidence(model.confidence_intercept.item(), model.confidence_slope.item())
    pooled, lengths = np.random.default_rng(1).normal(size=(4, 3)) / 500, np.array([1, 1000, 1024, 10**6])
    with torch.no_grad():
        expected = torch.log_softmax(model.logits(torch.tensor(pooled), torch.tensor(lengths)), dim=1)
    np.testing.assert_allclose(trained.log_probabilities(pooled, lengths), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_windows_that_are_all_right_or_all_wrong_leave_the_confidence_finite(sign: int) -> None:
    labels = np.arange(30) % 3
    evidence = HeldOutEvidence(sign * np.eye(3)[labels], np.full(30, 1024), labels, np.arange(30) % 2)
    fitted = fit_confidence(evidence, prior=Confidence(0.0, 0.9))
    assert abs(fitted.intercept) < 10
    assert fitted.slope == pytest.approx(0.9, abs=1e-3), "one length says nothing about the slope"


def test_a_calibration_with_windows_in_one_fold_only_still_works() -> None:
    whole = simulated_evidence(Confidence(5.0, 0.6), windows_per_length=20)
    one_fold = HeldOutEvidence(
        whole.mean_evidence, whole.lengths_bp, whole.labels, np.zeros(len(whole.labels), dtype=np.int64)
    )
    assert np.isfinite(calibrate(tiny_model(), one_fold).expected_calibration_error_after)


def test_calibration_error_is_the_gap_between_probability_and_accuracy() -> None:
    sure = np.tile([0.9, 0.1], (100, 1))
    half_right = np.arange(100) % 2
    assert expected_calibration_error(sure, half_right) == pytest.approx(0.4)
    assert expected_calibration_error(sure, (np.arange(100) % 10 == 0).astype(int)) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0
    # Weights: only the windows that are right count.
    assert expected_calibration_error(sure, half_right, (half_right == 0) / 50) == pytest.approx(0.1)


def test_evidence_is_the_same_for_a_window_and_its_reverse_complement() -> None:
    model, tokens = tiny_model(), random_tokens(3, 200)
    reverse = np.stack([CharacterTokenizer().reverse_complement(window) for window in tokens])
    np.testing.assert_allclose(evidence_of_records(model, tokens), evidence_of_records(model, reverse), atol=1e-6)


@pytest.mark.parametrize("piece_length", [1, 7, 100, 199])
def test_pieces_and_grouping_do_not_change_the_evidence(monkeypatch: pytest.MonkeyPatch, piece_length: int) -> None:
    model, tokens = tiny_model(), random_tokens(3, 200)
    whole = evidence_of_records(model, tokens)
    monkeypatch.setattr(evidence, "PIECE_LENGTH_BP", piece_length)
    monkeypatch.setattr(evidence, "BASES_PER_FORWARD", 1)
    np.testing.assert_allclose(evidence_of_records(model, tokens), whole, atol=1e-6)


def collection(**lengths: int) -> GenomeCollection:
    return GenomeCollection.from_tokens({name: {"chrI": random_tokens(length)} for name, length in lengths.items()})


def test_calibration_lengths_are_those_every_class_and_the_budget_can_carry() -> None:
    held_out = collection(a=50_000, b=20_000)
    assert calibration_lengths(held_out, 8192, bases_per_class=10**6) == [1024, 4096, 8192, 16_384]
    assert calibration_lengths(held_out, 8192, bases_per_class=8192) == [1024, 4096, 8192]
    assert calibration_lengths(held_out, 65_536, bases_per_class=2048) == [1024]
    assert calibration_lengths(collection(a=500, b=20_000), 8192, bases_per_class=10**6) == [256]
    assert calibration_lengths(collection(a=200, b=20_000), 8192, bases_per_class=10**6) == []


def test_collected_evidence_keeps_to_the_budget_and_covers_every_class() -> None:
    held_out = collection(a=6000, b=6000, c=6000)
    evidence = collect_evidence(
        tiny_model(), held_out, [512, 2048], bases_per_class=4096, maximum_windows_per_class=5, seed=1
    )
    assert evidence is not None
    for length, per_class in ((512, 5), (2048, 2)):
        chosen = evidence.labels[evidence.lengths_bp == length]
        assert np.bincount(chosen).tolist() == [per_class] * 3
    assert set(evidence.folds) == {0, 1}


def test_held_out_sequences_that_are_too_short_give_no_evidence() -> None:
    held_out = collection(a=600, b=100, c=600)
    arguments = {"bases_per_class": 4096, "maximum_windows_per_class": 5, "seed": 1}
    assert collect_evidence(tiny_model(), held_out, [512], **arguments) is None
    assert collect_evidence(tiny_model(), held_out, [], **arguments) is None
