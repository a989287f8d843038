"""Inputs that were once lost, misread or fatal: each has a right result, or one sentence that says what to do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fuzzing import MOST_MEMORY_BYTES
from genomamba.data.targets import TargetDescription
from genomamba.models.sequence_model import save_sequence_model, sequence_model_on
from hostile_inputs import write_hostile_inputs
from mambapipelines.cli.genomamba.main import main
from tiny_language_models import language_model, model_folder
from tiny_species import write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED_SCRIPT = REPOSITORY.parent / "shared" / "cases" / "make.py"


@pytest.fixture(scope="module", params=["own", "shared"])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of hostile inputs: those of this project, and those of another script with the same layout."""
    folder = tmp_path_factory.mktemp("cases")
    if request.param == "own":
        return write_hostile_inputs(folder)
    if not SHARED_SCRIPT.is_file():
        pytest.skip(f"{SHARED_SCRIPT} is not there")
    subprocess.run([sys.executable, str(SHARED_SCRIPT), str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    write_tiny_model(models / "species")
    model_folder(models / "causal", "causal")
    targets = TargetDescription("classes", ("kind",), ("a", "b"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fine_tuned = sequence_model_on(language_model("causal"), targets, "mean", True).float()
    save_sequence_model(models / "finetuned", fine_tuned, {})
    return models


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[list[str]], str]:
    """Exit code, rows of the table on standard output without its header, standard error."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, [line.split("\t") for line in captured.out.splitlines()[1:]], captured.err


def one_sentence(status: int, errors: str) -> bool:
    """Whether a command failed as it should."""
    return status == 2 and errors.splitlines()[-1].startswith("genomamba: error: ") and "Traceback" not in errors


def test_records_without_a_known_base_are_unclassified_everywhere(
    cases: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows, errors = run(
        capsys, "classify", models / "species", cases / "fasta/all_n.fa", "--report", tmp_path / "r.html",
        "--multiqc", tmp_path / "x_mqc.tsv", "--classified-out", tmp_path / "in",
        "--unclassified-out", tmp_path / "no.fa",
    )  # fmt: skip
    assert status == 0
    assert [row[2] for row in rows[:2]] == ["unclassified"] * 2
    assert set(rows[0][3:]) == set(rows[1][3:]) == {"NA"}
    assert rows[2][0] == "real" and rows[2][2] not in ("unclassified", "unknown")
    assert "2 unclassified" in errors
    multiqc = [
        line.split("\t") for line in (tmp_path / "x_mqc.tsv").read_text().splitlines() if not line.startswith("#")
    ]
    assert dict(zip(*multiqc, strict=True))["unclassified"] == "2"
    assert (tmp_path / "no.fa").read_bytes().count(b">") == 2
    assert (tmp_path / "in" / f"{rows[2][2]}.fa").read_bytes().count(b">") == 1
    assert "unclassified" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("name", "rows", "letters"), [("star.fa", 2, 1), ("x.fa", 2, 4), ("dash.fa", 1, 4), ("dot.fq", 1, 1)]
)
def test_letters_of_unknown_bases_are_read_as_n_and_counted(
    cases: Path, models: Path, capsys: pytest.CaptureFixture[str], name: str, rows: int, letters: int
) -> None:
    status, table, errors = run(capsys, "classify", models / "species", cases / "fasta" / name)
    assert status == 0
    assert len(table) == rows
    assert f"{letters} " in errors and "N" in errors


def test_a_protein_is_refused(cases: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = run(capsys, "classify", models / "species", cases / "fasta/protein.fa")
    assert one_sentence(status, errors)
    assert "protein" in errors


def test_bytes_after_a_compressed_file_are_a_warning(
    cases: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows, errors = run(capsys, "classify", models / "species", cases / "fasta/after_gzip.fa.gz")
    assert status == 0
    assert len(rows) == 1
    assert "after_gzip" in errors


@pytest.mark.parametrize("name", ["bom.fa", "blank_before.fa", "plain.fa.bz2", "plain.fa.xz"])
def test_ordinary_variations_are_read(cases: Path, models: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, rows, _ = run(capsys, "classify", models / "species", cases / "fasta" / name)
    assert status == 0
    assert [row[0] for row in rows] == ["c1"]


def test_mates_are_one_call(cases: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows, _ = run(capsys, "classify", models / "species", cases / "fasta/mates.fq", "--paired")
    assert status == 0
    assert [row[0] for row in rows] == ["pair0", "pair1", "pair2"]


def test_escape_sequences_do_nothing(
    cases: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["classify", str(models / "species"), str(cases / "fasta/escape.fa"), "--report", str(page)]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err + page.read_text()


FINETUNE = ("--recipe", "tiny", "--steps", 2, "--threads", 1, "--output")


@pytest.mark.parametrize("name", ["one_below_detection", "one_inf", "decimal_comma"])
def test_a_bad_number_is_named_and_makes_no_classes(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = cases / f"tables/{name}.tsv"
    status, _, errors = run(capsys, "finetune", "--table", path, *FINETUNE, tmp_path / "out")
    assert one_sentence(status, errors)
    lines = path.read_text().splitlines()
    number = next(number for number, line in enumerate(lines, 1) if number > 1 and not _is_number(line.split("\t")[1]))
    assert f"line {number}" in errors and lines[number - 1].split("\t")[1] in errors
    assert not (tmp_path / "out" / "config.json").exists()


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def test_zeros_and_ones_are_classes(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cases / "tables/float_classes.tsv"
    assert run(capsys, "finetune", "--table", path, *FINETUNE, tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["targets"]["kind"] == "classes"


def test_labels_that_read_as_missing_are_counted(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = run(capsys, "finetune", "--table", cases / "tables/na_label.tsv", *FINETUNE, tmp_path / "out")
    assert one_sentence(status, errors)
    assert "20" in errors


def test_an_index_without_a_name_is_no_label(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cases / "tables/index_column.csv"
    assert run(capsys, "finetune", "--table", path, *FINETUNE, tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["targets"]["columns"] == ["label"]


def test_the_three_parts_of_a_benchmark_folder_are_used(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = run(capsys, "finetune", "--table", cases / "tables/benchmark", *FINETUNE, tmp_path / "out")
    assert status == 0
    assert "30 train, 30 valid, 30 test" in errors


def test_a_quoted_name_forges_no_row(cases: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows, _ = run(capsys, "predict", models / "finetuned", cases / "tables/quoted_name.csv")
    assert status == 2 or (len(rows) == 1 and len(rows[0]) == 6)


def test_an_ambiguity_code_of_the_reference_is_no_mismatch(
    cases: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows, _ = run(
        capsys, "score-variants", models / "causal", cases / "variants/iupac.vcf",
        "--reference", cases / "variants/ref.fa", "--window", 128,
    )  # fmt: skip
    assert status == 0
    assert len(rows) == 1
    assert "reference_mismatch" not in rows[0]


@pytest.mark.parametrize("name", ["garbage.vcf", "nothing.vcf"])
def test_standard_input_that_is_no_vcf_is_one_sentence(
    cases: Path, models: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (cases / "variants" / name).open(encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        reference = ("--reference", cases / "variants/ref.fa")
        status, _, errors = run(capsys, "score-variants", models / "causal", "-", *reference)
    assert one_sentence(status, errors), errors


@pytest.mark.parametrize(("name", "vectors"), [("bom.bed", {1}), ("head.bed", {1}), ("mac.bed", {2, None})])
def test_ordinary_variations_of_bed_are_read(
    cases: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, vectors: set[int | None]
) -> None:
    status, _, errors = run(
        capsys, "embed", models / "causal", "--reference", cases / "variants/ref.fa",
        "--bed", cases / "variants" / name, "--output", tmp_path / "out.npz",
    )  # fmt: skip
    if status == 2:
        assert None in vectors
        assert "line end" in errors
    else:
        assert len(np.load(tmp_path / "out.npz")["embedding"]) in vectors


def test_a_class_cannot_leave_the_folder_of_its_file(
    cases: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "deep" / "model"
    shutil.copytree(models / "species", model)
    config = json.loads((model / "config.json").read_text())
    config["classifier"] |= json.loads((cases / "models/traversal.json").read_text())
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    (tmp_path / "real.fa").write_text(">r\nACGTACGTAA\n")
    status, _, errors = run(
        capsys, "classify", model, tmp_path / "real.fa", "--classified-out", tmp_path / "out" / "in"
    )
    assert one_sentence(status, errors)
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "out", "real.fa"]


def _damaged_configurations(cases: Path, models: Path) -> Iterator[str]:
    yield (cases / "models/nested.json").read_text()
    for line in (cases / "models/sizes.txt").read_text().splitlines():
        key, value = line.split()
        config = json.loads((models / "species" / "config.json").read_text())
        config["classifier"][key] = int(value)
        yield json.dumps(config)


def test_a_configuration_cannot_take_all_memory(cases: Path, models: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from mambacore.benchmarking import memory_bytes\n"
        "from mambapipelines.cli.genomamba.main import main\n"
        "for model in sys.argv[2:]: assert main(['classify', model, sys.argv[1]]) == 2\n"
        f"assert memory_bytes('VmHWM') < {MOST_MEMORY_BYTES}"
    )
    (tmp_path / "real.fa").write_text(">r\nACGTACGTAA\n")
    folders = []
    for number, text in enumerate(_damaged_configurations(cases, models)):
        folders.append(str(tmp_path / f"model-{number}"))
        shutil.copytree(models / "species", folders[-1])
        Path(folders[-1], "config.json").write_text(text)
    command = [sys.executable, "-c", program, str(tmp_path / "real.fa"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("genomamba: error: ") == len(done.stderr.splitlines()) == len(folders), done.stderr
