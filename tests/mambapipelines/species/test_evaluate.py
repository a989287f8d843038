"""Evaluation: honest windows, honest intervals, and baselines that see exactly the model's training sequences."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genomamba.baselines import fitting
from genomamba.classification.calibration import collect_evidence
from genomamba.classification.novelty import KEY, LikelihoodQuantiles
from genomamba.data.genomes import GenomeCollection, GenomeSpecification, load_genomes
from mambacore.errors import InputError
from mambapipelines.species.evaluate import (
    AccuracyRow,
    EvaluationOptions,
    accuracy_by_length,
    classifiers_of,
    evaluate_species_classifier,
    table_text,
    wilson_interval,
)
from mambapipelines.species.evaluate_novelty import ScoringModel
from mambapipelines.species.evaluation_sequences import find_training_sequences, in_class_order, select_test_sequences
from tiny_species import CLASS_NAMES, bases, fasta, tiny_model, write_tiny_model

GC_SHARES = dict(zip(CLASS_NAMES, (0.3, 0.5, 0.7), strict=True))
CHROMOSOMES = {"chrI": 9000, "chrII": 7000, "chrIII": 5000}


def write_genomes(folder: Path, strain: int = 0) -> list[GenomeSpecification]:
    """One file per class; the classes differ in their share of G and C."""
    folder.mkdir(exist_ok=True)
    specifications = []
    for label, (name, gc) in enumerate(GC_SHARES.items()):
        path = folder / f"{name}.{strain}.fa"
        seed = 1000 * strain + 10 * label
        path.write_bytes(fasta({key: bases(size + strain, seed + size, gc) for key, size in CHROMOSOMES.items()}))
        specifications.append(GenomeSpecification(name, (str(path),)))
    return specifications


@pytest.fixture(scope="module")
def genomes(tmp_path_factory: pytest.TempPathFactory) -> list[GenomeSpecification]:
    return write_genomes(tmp_path_factory.mktemp("genomes"))


@pytest.fixture(scope="module")
def collection(genomes: list[GenomeSpecification]) -> GenomeCollection:
    return load_genomes(genomes)


@pytest.fixture(scope="module")
def details(collection: GenomeCollection) -> dict[str, Any]:
    return {"holdout": ["chrIII"], "manifest": collection.manifest()}


@pytest.fixture(scope="module")
def model_folder(details: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model", details)


def test_the_table_has_every_classifier_at_every_length_on_the_same_windows(
    model_folder: Path, genomes: list[GenomeSpecification], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "FITTING_WINDOWS", 100)
    monkeypatch.setattr(fitting, "CHOOSING_WINDOWS", 40)
    output = tmp_path / "evaluation"
    rows = evaluate_species_classifier(
        EvaluationOptions(model_folder, genomes, lengths=[250, 1000], per_class=12, output=output)
    )
    assert {(row.length, row.classifier) for row in rows} == {
        (length, name) for length in (250, 1000) for name in ("genomamba", "kmer", "markov", "composition")
    }
    for length in (250, 1000):
        assert len({(row.windows, row.independent_windows) for row in rows if row.length == length}) == 1
    # Species that differ in composition only: what sees it must find it, an untrained model must not.
    accuracy = {row.classifier: row.accuracy for row in rows if row.length == 1000}
    assert min(accuracy["kmer"], accuracy["markov"], accuracy["composition"]) > 0.9
    assert accuracy["genomamba"] < 0.7
    with (output / "accuracy.tsv").open(encoding="utf-8") as stream:
        table = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["classifier"] for row in table] == [row.classifier for row in rows]
    assert table[0]["expected_calibration_error"] != "NA"
    assert (output / "accuracy_by_length.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((output / "baselines.json").read_text(encoding="utf-8"))) == {"kmer", "markov", "composition"}


def test_an_evaluation_is_a_function_of_the_seed(collection: GenomeCollection) -> None:
    def evaluate(seed: int) -> list[AccuracyRow]:
        return accuracy_by_length(classifiers_of(tiny_model(), None), collection, [300], per_class=15, seed=seed)

    assert evaluate(1) == evaluate(1)
    assert evaluate(1) != evaluate(2)


def test_the_calibration_error_and_the_labels_are_those_of_the_probabilities(collection: GenomeCollection) -> None:
    windows = [sequence.tokens(0, 500) for sequence in collection.sequences]
    labels, probabilities = ScoringModel(tiny_model())(windows, 500)
    assert probabilities.shape == (len(windows), 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(labels, probabilities.argmax(axis=1))


def test_overlapping_windows_are_bounded_and_do_not_narrow_the_interval(collection: GenomeCollection) -> None:
    few, many = (
        accuracy_by_length(
            {"always right": lambda windows, _: (right_labels(windows), None)},
            collection,
            [5000],
            per_class=per_class,
            seed=0,
            windows_per_independent=bound,
        )[0]
        for per_class, bound in ((3, 1), (1000, 4))
    )
    assert (few.windows, many.windows, few.independent_windows) == (9, 36, 9)
    assert few.accuracy == many.accuracy == 1
    assert many.low == pytest.approx(few.low)


def right_labels(windows: Any) -> np.ndarray:
    """Classes by their share of G and C, which tells these windows apart without an error."""
    gc = [np.isin(tokens, (8, 9)).mean() for tokens in windows]
    return np.abs(np.subtract.outer(gc, list(GC_SHARES.values()))).argmin(axis=1)


def test_a_chromosome_in_two_strains_counts_once_as_independent(tmp_path: Path) -> None:
    both = [
        GenomeSpecification(one.name, one.paths + two.paths)
        for one, two in zip(write_genomes(tmp_path / "a"), write_genomes(tmp_path / "b", strain=1), strict=True)
    ]
    classifiers = classifiers_of(tiny_model(), None)
    (one,) = accuracy_by_length(classifiers, load_genomes(write_genomes(tmp_path / "a")), [2000], per_class=1, seed=0)
    (two,) = accuracy_by_length(classifiers, load_genomes(both), [2000], per_class=1, seed=0)
    assert one.independent_windows == two.independent_windows == 3 * (4 + 3 + 2)


def test_lengths_without_windows_of_every_class_are_left_out_with_a_note(
    collection: GenomeCollection, capsys: pytest.CaptureFixture[str]
) -> None:
    classifiers = classifiers_of(tiny_model(), None)
    rows = accuracy_by_length(classifiers, collection, [400, 100_000], per_class=2, seed=0)
    assert [row.length for row in rows] == [400]
    assert "100,000 bp is left out" in capsys.readouterr().err
    with pytest.raises(InputError, match="no length"):
        accuracy_by_length(classifiers, collection, [100_000], per_class=2, seed=0)


@pytest.mark.parametrize(("unknown_bases", "windows"), [(15, 6), (30, 6), (200, 0)])
def test_gaps_are_let_through_only_where_a_class_has_nothing_else_and_never_many(
    unknown_bases: int, windows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.full(2000, 7, dtype=np.uint8)
    gapped = tokens.copy()
    gapped[1000 : 1000 + unknown_bases] = 11
    collection = GenomeCollection.from_tokens(
        {"alba": {"chr": tokens}, "nigra": {"chr": gapped}, "rubra": {"chr": tokens}}
    )
    rows = accuracy_by_length(classifiers_of(tiny_model(), None), collection, [500, 1990], per_class=2, seed=0)
    assert sum(row.windows for row in rows if row.length == 1990) == windows
    assert sum(row.windows for row in rows if row.length == 500) == 6
    assert ("are allowed" in capsys.readouterr().err) == (unknown_bases > 20)


def test_only_held_out_sequences_are_tested_on(collection: GenomeCollection, details: dict[str, Any]) -> None:
    test = select_test_sequences(collection, details)
    assert {sequence.name for sequence in test.sequences} == {"chrIII"}
    assert len(test.sequences) == 3


def test_a_genome_the_model_has_never_seen_is_tested_on_whole(
    collection: GenomeCollection, details: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(sequence.path for sequence in collection.sequences if sequence.class_name == "nigra")
    seen = [entry for entry in details["manifest"] if entry["path"] != path]
    with pytest.raises(InputError, match="trained on all sequences given for class 'alba'"):
        select_test_sequences(collection, {"holdout": ["chrIX"], "manifest": seen})
    assert f"{path} has no held-out sequence" in capsys.readouterr().err


def test_baselines_are_trained_on_what_the_model_was_trained_on_wherever_it_is_now(
    collection: GenomeCollection, details: dict[str, Any], genomes: list[GenomeSpecification], tmp_path: Path
) -> None:
    expected = {(name, chromosome) for name in CLASS_NAMES for chromosome in ("chrI", "chrII")}
    nothing = GenomeCollection(collection.class_names, ())
    gone = {**details, "manifest": [{**entry, "path": str(tmp_path / "gone.fa")} for entry in details["manifest"]]}
    for training in (
        find_training_sequences(collection, [], gone),
        find_training_sequences(nothing, genomes, gone),
        find_training_sequences(nothing, [], details),
    ):
        assert {(sequence.class_name, sequence.name) for sequence in training.sequences} == expected
    with pytest.raises(InputError, match="--training-genome alba="):
        find_training_sequences(nothing, [], gone)
    with pytest.raises(InputError, match="does not list"):
        find_training_sequences(collection, [], {})


def test_classes_must_be_the_models_and_take_its_labels(collection: GenomeCollection) -> None:
    reordered = in_class_order(collection, ("rubra", "alba", "nigra"))
    assert reordered.class_names == ("rubra", "alba", "nigra")
    with pytest.raises(InputError, match="has no class 'rubra'"):
        in_class_order(collection, ("alba", "nigra"))
    with pytest.raises(InputError, match="no genome is given for the model's class 'viridis'"):
        in_class_order(collection, (*CLASS_NAMES, "viridis"))


def test_wilsons_interval_holds_the_share_and_narrows_with_the_trials() -> None:
    for share in (0.0, 0.3, 1.0):
        wide, narrow = wilson_interval(share, 10), wilson_interval(share, 1000)
        assert 0 <= wide[0] <= narrow[0] <= share <= narrow[1] <= wide[1] <= 1
    # Newcombe (1998), Statist. Med. 17:857, table I: 81 of 263.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_the_table_says_na_where_there_are_no_calibrated_probabilities() -> None:
    lines = table_text([AccuracyRow(1024, "kmer", 0.5, 0.4, 0.6, 90, 80, None)]).splitlines()
    assert lines[1] == "1024\tkmer\t0.5000\t0.4000\t0.6000\t90\t80\tNA"


def test_ood_genomes_are_detected_by_windows_that_were_not_tested(
    collection: GenomeCollection, genomes: list[GenomeSpecification], details: dict[str, Any], tmp_path: Path
) -> None:
    training = collect_evidence(
        tiny_model(), collection, [400], bases_per_class=40_000, maximum_windows_per_class=40, seed=3
    )
    assert training is not None
    quantiles = LikelihoodQuantiles.of_windows(training)
    folder = write_tiny_model(tmp_path / "model", {**details, "calibration": {KEY: quantiles.to_dict()}})
    repeats, alike = tmp_path / "repeats.fa", tmp_path / "alike.fa"
    repeats.write_bytes(fasta({"r": b"ACCT" * 1500}))
    alike.write_bytes(fasta({name: bases(2500, 77 + size, gc) for size, (name, gc) in enumerate(GC_SHARES.items())}))
    ood_genomes = [GenomeSpecification("repeats", (str(repeats),)), GenomeSpecification("alike", (str(alike),))]
    options = EvaluationOptions(
        folder, genomes, lengths=[400], per_class=15, baselines=[], output=tmp_path / "out", ood_genomes=ood_genomes
    )
    evaluate_species_classifier(options)
    with (tmp_path / "out" / "accuracy.tsv").open(encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert (row["windows_repeats"], row["windows_alike"]) == ("15", "15")
    assert (float(row["detected_repeats"]), float(row["auroc_repeats"])) == (1, 1)
    assert float(row["detected_alike"]) < 0.3
    assert 0.2 < float(row["auroc_alike"]) < 0.8
    assert float(row["false_alarms"]) < 0.2
    assert float(row["probability_auroc_repeats"]) != 1
    assert (tmp_path / "out" / "ood_accuracy_by_length.png").read_bytes().startswith(b"\x89PNG")
    # With another threshold the rates are others, and the area is the same.
    low = {**quantiles.to_dict(), "quantiles": (quantiles.quantiles - 100).tolist()}
    lenient = write_tiny_model(tmp_path / "lenient", {**details, "calibration": {KEY: low}})
    evaluate_species_classifier(replace(options, model_folder=lenient, output=tmp_path / "lenient.tsv"))
    with (tmp_path / "lenient.tsv").open(encoding="utf-8") as stream:
        (other,) = csv.DictReader(stream, delimiter="\t")
    assert (other["detected_repeats"], other["false_alarms"]) == ("0.0000", "0.0000")
    assert other["auroc_alike"] == row["auroc_alike"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [0]}, "--lengths"),
        ({"per_class": 0}, "--per-class"),
        ({"seed": -1}, "--seed"),
        ({"baselines": ["forest"]}, "no baseline 'forest'"),
        ({"lengths": [6000]}, "the longest test sequence"),
        ({"output": Path("/nowhere/at/all.tsv")}, "no folder"),
        ({"threads": 0}, "--threads"),
        ({"ood_genomes": [GenomeSpecification("alba", ("x.fa",))]}, "belongs to none"),
        ({"ood_genomes": [GenomeSpecification("other", ("/nowhere.fa",))]}, "no file"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, model_folder: Path, genomes: list[GenomeSpecification]
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_species_classifier(EvaluationOptions(model_folder, genomes, **changes))
