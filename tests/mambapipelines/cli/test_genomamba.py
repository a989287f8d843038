"""The command line: exit codes, one-line errors, quiet endings, and the demo from nothing to a report."""

import csv
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genomamba.baselines import fitting
from genomamba.data.gene_simulation import simulate_genomes
from mambacore import hub
from mambacore.errors import InputError
from mambapipelines.cli import doctor
from mambapipelines.cli.genomamba.main import main
from mambapipelines.species import demo as species_demo
from mambapipelines.species import train as species_training
from mambapipelines.species.demo import contigs_text
from mambapipelines.species.train import SpeciesTrainingOptions
from tiny_species import CLASS_NAMES, bases, fasta, write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def environment() -> dict[str, str]:
    """The environment of a subprocess that can import the packages from the repository."""
    folders = [str(REPOSITORY / name) for name in ("", "kernels", "pipelines")]
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mambapipelines.cli.genomamba.main", *arguments]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def contigs(tmp_path: Path) -> str:
    path = tmp_path / "contigs.fa"
    path.write_bytes(fasta({"first": bases(300), "second": bases(40, 1)}))
    return str(path)


def expect_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command must fail with exit code 2 and one line that has `message` in it."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"genomamba: error: [^\n]+\n", captured.err), captured.err
    assert message in captured.err


def test_no_arguments_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "classify", "evaluate", "demo", "--version"))


@pytest.mark.parametrize("name", ["train", "classify", "evaluate", "demo"])
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"genomamba {name} " in shown
    assert "Example" in shown
    assert "Exit codes" in shown


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("genomamba")
    assert "native: " in shown


def test_the_doctor_tests_the_kernels_and_names_extras(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "backend native: " in shown
    assert "self-test torch: largest difference" in shown
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert main(["doctor", "--quick"]) == 0
    assert "pysam missing: pip install 'genomamba[variants]'" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "LARGEST_DIFFERENCE", 0.0)
    assert main(["doctor"]) == 2


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["classify"], ["classify", "m", "f", "--threads", "x"], ["--oops"]]
)
def test_usage_mistakes_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_help_needs_no_heavy_library() -> None:
    check = (
        "import sys; from mambapipelines.cli.genomamba.main import main; main(['--help']); "
        "heavy = {'torch', 'lightning', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules); sys.exit(bool(heavy))"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], env=environment(), check=False, capture_output=True).returncode
        == 0
    )


def test_classify_writes_rows_to_standard_output_and_everything_else_to_standard_error(
    model_folder: str, contigs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", model_folder, contigs]) == 0
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out), delimiter="\t"))
    assert [(row["record"], row["length"]) for row in rows] == [("first", "300"), ("second", "40")]
    assert all(row["call"] in CLASS_NAMES for row in rows)
    assert captured.err.startswith("2 records of 340 bp")


def test_classify_writes_a_table_and_a_report(model_folder: str, contigs: str, tmp_path: Path) -> None:
    table, report = tmp_path / "calls.tsv", tmp_path / "calls.html"
    assert main(["classify", model_folder, contigs, "--output", str(table), "--report", str(report)]) == 0
    assert len(table.read_text(encoding="utf-8").splitlines()) == 3
    assert "first" in report.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.html", "calls.tsv", "contigs.fa"]


def test_standard_input_gives_the_same_rows_as_a_file(
    model_folder: str, contigs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(contigs).read_bytes())))
    assert main(["classify", model_folder, "-"]) == 0
    from_stream = capsys.readouterr().out
    assert main(["classify", model_folder, contigs]) == 0
    assert capsys.readouterr().out == from_stream != ""


def test_a_closed_pipe_ends_the_command_silently(model_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "many.fa"
    # More rows than a pipe holds, so that the command meets the closed pipe while it writes.
    path.write_bytes(fasta({f"{'long_name_' * 100}{number}": b"ACGTACGT" for number in range(2000)}))
    process = subprocess.Popen(
        command("classify", model_folder, str(path)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"record\t")
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_an_interrupt_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(_: SpeciesTrainingOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(species_training, "train_species_classifier", interrupted)
    arguments = ["train", "--genome", "a=a.fa", "--genome", "b=b.fa", "--length", "10", "--output", str(tmp_path)]
    assert main(arguments) == 130
    assert capsys.readouterr().err == "genomamba: interrupted\n"


def test_mistakes_of_the_user_are_one_line(
    model_folder: str, contigs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protein, output = tmp_path / "protein.fa", tmp_path / "out.tsv"
    protein.write_bytes(b">p\nMKLVEEF\n")
    for arguments, message in (
        (["classify", str(tmp_path / "none"), contigs], "none"),
        (["classify", contigs, contigs], "contigs.fa"),
        (["classify", model_folder, str(tmp_path / "none.fa")], "none.fa"),
        (["classify", model_folder, str(tmp_path)], "is a directory"),
        (["classify", model_folder, "-", "-"], "twice"),
        (["classify", model_folder, contigs, "--output", str(tmp_path / "no" / "out.tsv")], "no folder"),
        (["classify", model_folder, contigs, "--report", str(tmp_path)], "is a folder"),
        (["classify", model_folder, contigs, "--unknown-below", "2"], "--unknown-below"),
        (["classify", model_folder, str(protein), "--output", str(output)], "protein"),
        (["evaluate", model_folder, "--genome", "alba"], "NAME=PATH"),
        (["evaluate", model_folder, "--genome", f"viridis={contigs}"], "viridis"),
        (["evaluate", model_folder, "--genome", f"alba={contigs}", "--lengths", "1k"], "'1k'"),
        (["evaluate", model_folder, "--genome", f"alba={contigs}", "--lengths", "1,,2"], "--lengths"),
        (["evaluate", model_folder, "--genome", f"a={contigs}", "--baseline", "none", "--baseline", "kmer"], "none"),
        (["demo", "--output", str(tmp_path)], "not from a demo"),
    ):
        expect_one_line(arguments, message, capsys)
    assert not output.exists()


@pytest.mark.parametrize("damage", ["version", "shape", "truncated", "config"])
def test_a_damaged_model_folder_is_one_line(
    damage: str, contigs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    config_path, tensors_path = folder / "config.json", folder / "model.safetensors"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if damage == "version":
        config["format_version"] = 99
    elif damage == "shape":
        config["classifier"]["model_width"] = 12
    elif damage == "truncated":
        tensors_path.write_bytes(tensors_path.read_bytes()[:-100])
    config_path.write_text("{" if damage == "config" else json.dumps(config), encoding="utf-8")
    expect_one_line(["classify", str(folder), contigs], "model", capsys)


def test_train_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[SpeciesTrainingOptions] = []
    monkeypatch.setattr(species_training, "train_species_classifier", seen.append)
    arguments = (
        "train --genome a=x.fa,y.fa --genome b=z.fa --holdout chrI,chrII --length 512 --steps 7 --seed 3 --resume"
    )
    assert main([*arguments.split(), "--recipe", "tiny", "--threads", "1", "--output", str(tmp_path)]) == 0
    (options,) = seen
    assert [(genome.name, genome.paths) for genome in options.genomes] == [("a", ("x.fa", "y.fa")), ("b", ("z.fa",))]
    assert (list(options.holdout), options.length, options.steps, options.minutes) == (["chrI", "chrII"], 512, 7, None)
    assert (options.seed, options.resume, options.recipe, options.threads) == (3, True, "tiny", 1)
    assert options.output == tmp_path


def test_the_demo_makes_everything_and_replaces_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = functools.partial(
        simulate_genomes, training_lengths_bp=(9_000, 9_000, 9_000), holdout_lengths_bp=(9_000, 9_000)
    )
    monkeypatch.setattr(species_demo, "simulate_genomes", small)
    monkeypatch.setattr(species_demo, "EVALUATION_LENGTHS_BP", (256, 1024))
    monkeypatch.setattr(species_demo, "WINDOWS_PER_CLASS", 4)
    monkeypatch.setattr(fitting, "FITTING_WINDOWS", 40)
    monkeypatch.setattr(fitting, "CHOOSING_WINDOWS", 20)
    monkeypatch.setattr(species_demo, "CONTIG_LENGTHS_BP", (500, 2000))
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.json").write_text("{}", encoding="utf-8")
    (folder / "report.html").write_text("of an earlier demo", encoding="utf-8")
    (folder / "mine.txt").write_text("kept", encoding="utf-8")
    assert main(["demo", "--output", str(folder), "--minutes", "0.03", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert "GC and N only" in captured.out
    assert "1,024 bp" in captured.out

    report = (folder / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in ("dorsalis", "transposons", "reverse_complement", "Training"))
    assert report.count("data:image/png;base64,") == 3
    assert (folder / "accuracy_by_length.png").exists()
    assert (folder / "mine.txt").read_text(encoding="utf-8") == "kept"
    with (folder / "classification.tsv").open(encoding="utf-8") as stream:
        rows = {row["record"]: row for row in csv.DictReader(stream, delimiter="\t")}
    (name,) = [name for name in rows if name.endswith("_reverse_complement")]
    assert float(rows[name]["probability"]) == pytest.approx(
        float(rows[name.removesuffix("_reverse_complement")]["probability"]), abs=2e-6
    )
    assert [row["call"] for key, row in rows.items() if key.endswith("too_short")] == ["unclassified"]


def test_the_demo_contigs_are_a_function_of_the_seed_and_named_once() -> None:
    clade = simulate_genomes(0, (2_000,), (9_000, 9_000))
    text = contigs_text(clade, 0)
    assert text == contigs_text(clade, 0) != contigs_text(clade, 1)
    names = re.findall(r"^>(\S+)", text, flags=re.MULTILINE)
    assert len(names) == len(set(names))
    half = next(part for part in text.split(">") if "half_N" in part.split("\n")[0]).split("\n")[1]
    assert half.count("N") / len(half) == pytest.approx(0.5, abs=0.02)


def test_a_demo_that_was_interrupted_leaves_no_report_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(seed: int) -> None:
        raise InputError(f"stopped at seed {seed}")

    monkeypatch.setattr(species_demo, "simulate_genomes", fail)
    for _ in range(2):
        with pytest.raises(InputError, match="stopped at seed 4"):
            species_demo.run_demo(species_demo.DemoOptions(tmp_path / "demo", seed=4))
    assert not (tmp_path / "demo" / "report.html").exists()


def test_numbers_in_the_table_have_six_decimals(
    model_folder: str, contigs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["classify", model_folder, contigs])
    values = [line.split("\t")[3:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert all(re.fullmatch(r"[01]\.\d{6}", value) for row in values for value in row)
    assert np.isclose(sum(map(float, values[0][1:])), 1, atol=5e-6)


def test_sharing_says_what_would_be_uploaded_and_uploads_only_with_push(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[object, ...]] = []

    def push(*given: object, **options: object) -> str:
        pushed.append((*given, options))
        return "address"

    monkeypatch.setattr(hub, "push_model_folder", push)
    assert main(["share", model_folder, "me/model"]) == 0
    printed = capsys.readouterr()
    assert "hf://me/model/model.safetensors" in printed.out and "add --push" in printed.err and not pushed
    assert main(["share", model_folder, "me/model", "--push"]) == 0
    assert capsys.readouterr().out == "address\n"
    assert pushed == [(Path(model_folder), "me/model", {"private": True})]
