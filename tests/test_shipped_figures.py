"""The figures in the cards of the shipped models: the same everywhere they are quoted, and reproduced from the data.

A card is the source: its tables and its commands are read here, so a new model with a new card is tested as it is.
"""

import csv
import gzip
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

import audiomamba.weights
import genomamba.weights
from audiomamba.models.clip_classifier import fitted_clip, load_clip_classifier, opinions
from genomamba.data.genomes import GenomeSpecification
from genomamba.models.species_classifier import load_classifier
from mambacore.shipped import ShippedModels
from mambapipelines.cli.audiomamba.main import main as audiomamba_main
from mambapipelines.species.evaluate import EvaluationOptions, evaluate_species_classifier
from tiny_species import bases, fasta
from tolerances import SHIPPED_BITS, SHIPPED_PERPLEXITY, SHIPPED_WINDOWS

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
GENOMES, DIGITS = DATA / "dna", DATA / "audio" / "spoken_digits_8khz"
# Column of a card's table -> row of `genomamba evaluate`.
COLUMNS = {
    "genomamba (95 % interval)": "genomamba",
    "stack": "part:stack",
    "Markov models": "part:markov",
    "gate": "part:gate",
    "k-mers": "part:kmer",
    "k-mers + LR": "kmer",
    "Markov": "markov",
    "composition": "composition",
}
# Longer windows take minutes more and show nothing new.
LONGEST_TESTED_BP = 4_096


def card(models: ShippedModels, name: str) -> str:
    """The card of a shipped model; skips when it does not ship."""
    if name not in models.table:
        pytest.skip(f"{name} does not ship with this version")
    return (models.folder / name / "README.md").read_text(encoding="utf-8")


def accuracy_table(text: str) -> list[dict[str, str]]:
    """The rows of the first table of accuracies, by column."""
    table = re.search(
        r"^\| length \| windows \| genomamba [^\n]*\n\| --- [^\n]*\n((?:\|[^\n]*\n)+)", text, re.MULTILINE
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def number(cell: str) -> float:
    """The first number of a cell."""
    return float(re.search(r"\d[\d,]*\.?\d*", cell)[0].replace(",", ""))


@pytest.mark.parametrize("name", ["yeasts", "enterobacteria"])
def test_the_row_of_a_classifier_quotes_its_card(name: str) -> None:
    rows = {int(number(row["length"])): row for row in accuracy_table(card(genomamba.weights.MODELS, name))}
    quoted = genomamba.weights.MODELS.table[name].figures
    percent, low, high, windows, length, baseline = re.match(
        r"([\d.]+) % \((\d+)-(\d+)\) of (\d+) held-out windows of ([\d,]+) bp, better baseline ([\d.]+)", quoted
    ).groups()
    row = rows[int(length.replace(",", ""))]
    # A half is rounded up in the table of models.
    assert math.floor(number(row["genomamba (95 % interval)"]) + 0.5) == int(percent)
    assert row["genomamba (95 % interval)"].endswith(f"({low}-{high})")
    assert int(number(row["windows"])) == int(windows)
    assert math.floor(max(number(row["k-mers + LR"]), number(row["Markov"])) + 0.5) == int(baseline)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["yeasts", "enterobacteria"])
def test_the_accuracies_of_a_classifier_are_reproduced(name: str, tmp_path: Path) -> None:
    text = card(genomamba.weights.MODELS, name)
    named = dict(re.findall(r"--genome (\w+)=(?:\w+/)?([\w.-]+)", text))
    places = {class_name: GENOMES / name / file for class_name, file in named.items()}
    absent = [str(path) for path in places.values() if not path.is_file()]
    if absent:
        pytest.skip(f"the data is not at hand: {', '.join(absent)}")
    folder = genomamba.weights.MODELS.folder / name
    class_names = load_classifier(folder)[0].config.class_names
    assert set(places) == set(class_names)
    rows = [row for row in accuracy_table(text) if number(row["length"]) <= LONGEST_TESTED_BP]
    assert rows
    found = {
        (one.length, one.classifier): one
        for one in evaluate_species_classifier(
            EvaluationOptions(
                model_folder=folder,
                genomes=[GenomeSpecification(class_name, (str(path),)) for class_name, path in places.items()],
                lengths=[int(number(row["length"])) for row in rows],
                per_class=int(number(rows[0]["windows"])) // len(class_names),
                output=tmp_path / "evaluation",
                threads=1,
            )
        )
    }
    wrong = []
    for row in rows:
        length, windows = int(number(row["length"])), int(number(row["windows"]))
        for column, classifier in COLUMNS.items():
            if column == "gate" and (length, classifier) not in found and column not in row:
                continue  # a model from before there were gates
            one = found[length, classifier]
            assert one.windows == windows
            if abs(100 * one.accuracy - number(row[column])) > 100 * SHIPPED_WINDOWS / windows + 0.05:
                wrong.append(f"{length} bp, {classifier}: {100 * one.accuracy:.1f} %, the card has {row[column]}")
    assert not wrong


@pytest.fixture
def pretraining(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes `yeast-lm`."""
    monkeypatch.syspath_prepend(REPOSITORY / "pipelines" / "experiments")
    import pretraining  # noqa: PLC0415 - a script beside the packages

    return pretraining


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_trains_and_ships_the_language_model(
    pretraining: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("cerevisiae.S288C", "paradoxus.CBS432")):
        lengths = {"chrI": 40_000, "chrVII": 33_000, "chrX": 20_000, "chrXI": 20_000}
        records = {record: bases(length, 10 * number + k) for k, (record, length) in enumerate(lengths.items())}
        (tmp_path / f"{name}.fa.gz").write_bytes(gzip.compress(fasta(records)))
    # The same script on short sequences: windows of 512, then of 16,384 and 32,768 instead of 1,048,576 bases.
    for name, value in {"FIRST_LENGTH": 512, "LENGTH": 32_768, "BLOCK": 8_192, "MARKOV_ORDER": 3}.items():
        monkeypatch.setattr(pretraining, name, value)
    (tmp_path / "checkout" / "genomamba" / "weights").mkdir(parents=True)
    (tmp_path / "checkout" / "genomamba" / "weights" / "models.json").write_text("{}")
    command = [
        "--yeasts",
        str(tmp_path),
        "--output",
        str(tmp_path / "results"),
        "--short-steps",
        "2",
        "--long-steps",
        "2",
    ]
    command += ["--tested", "cerevisiae.S288C", "--lengths", "1024", "32768", "--ship"]
    pretraining.main([*command, "--repository", str(tmp_path / "checkout")])
    models = ShippedModels(tmp_path / "checkout" / "genomamba" / "weights")
    text = card(models, "yeast-lm")
    assert "{" not in text
    perplexities = [float(found) for found in re.findall(r"perplexity ([\d.]+) with a context of", text)]
    assert len(perplexities) == 2
    assert models.table["yeast-lm"].figures.startswith(f"perplexity {min(perplexities):.3f} per base")
    folder = str(models.find("yeast-lm"))
    again = pretraining.losses_by_length(folder, [str(tmp_path / "results/genomes/cerevisiae.S288C.fa")], [1024])
    losses = again["losses"]["1024"]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(perplexities[0], abs=SHIPPED_PERPLEXITY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_perplexity_of_the_language_model_is_reproduced(pretraining: ModuleType) -> None:
    text = " ".join(card(genomamba.weights.MODELS, "yeast-lm").split())
    genome = GENOMES / "yeasts" / "cerevisiae.S288C.fa.gz"
    if not genome.is_file():
        pytest.skip(f"the data is not at hand: {genome}")
    expected, context = re.search(r"perplexity ([\d.]+)(?: \([^)]*\))? with a context of ([\d,]+) bases", text).groups()
    length = int(context.replace(",", ""))
    folder = str(genomamba.weights.MODELS.folder / "yeast-lm")
    losses = pretraining.losses_by_length(folder, [str(genome)], [length])["losses"][str(length)]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(float(expected), abs=SHIPPED_PERPLEXITY)


def test_the_row_of_the_voice_quotes_its_card() -> None:
    text = card(audiomamba.weights.MODELS, "digits")
    bits = re.match(r"([\d.]+) bits per sample", audiomamba.weights.MODELS.table["digits"].figures)[1]
    assert re.search(rf"^\| test clips \(\d+\) \| {re.escape(bits)} ", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_likelihood_of_the_voice_is_reproduced(tmp_path: Path) -> None:
    text = card(audiomamba.weights.MODELS, "digits")
    if not DIGITS.is_dir():
        pytest.skip(f"the data is not at hand: {DIGITS}")
    clips, bits = re.search(r"^\| test clips \((\d+)\) \| ([\d.]+) ", text, re.MULTILINE).groups()
    split = [re.search(rf"--{name} '([^']+)'", text)[1] for name in ("valid", "test")]
    folder = str(audiomamba.weights.MODELS.folder / "digits")
    command = ["evaluate", f"digits={folder}", "--data", str(DIGITS), "--valid", split[0], "--test", split[1]]
    assert audiomamba_main([*command, "--threads", "1", "--output", str(tmp_path / "scores")]) == 0
    with (tmp_path / "scores" / "metrics.tsv").open(encoding="utf-8", newline="") as opened:
        row = next(row for row in csv.DictReader(opened, delimiter="\t") if row["set"] == "digits")
    assert float(row["bits_per_sample"]) == pytest.approx(float(bits), abs=SHIPPED_BITS)
    scored = (tmp_path / "scores" / "likelihoods.tsv").read_text(encoding="utf-8").splitlines()
    assert len(scored) == 1 + int(clips)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_accuracy_of_the_clip_classifier_is_reproduced() -> None:
    text = card(audiomamba.weights.MODELS, "digits-classifier")
    if not DIGITS.is_dir():
        pytest.skip(f"the data is not at hand: {DIGITS}")
    clips, percent = re.search(r"^\| test \| (\d+) \| ([\d.]+) %", text, re.MULTILINE).groups()
    assert audiomamba.weights.MODELS.table["digits-classifier"].figures.startswith(f"{percent} % of {clips} test clips")
    classifier, _ = load_clip_classifier(audiomamba.weights.MODELS.folder / "digits-classifier")
    settings, names = classifier.config.log_mel, classifier.config.class_names
    paths = sorted(DIGITS.glob(re.search(r"--test '([^']+)'", text)[1]))
    assert len(paths) == int(clips)
    heard = opinions(classifier, (fitted_clip(path, settings) for path in paths)).probabilities.argmax(axis=1)
    right = sum(names[one] == path.name[0] for one, path in zip(heard, paths, strict=True))
    assert abs(right - float(percent) / 100 * len(paths)) <= SHIPPED_WINDOWS
