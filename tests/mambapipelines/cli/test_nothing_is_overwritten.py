"""No output replaces an input or a file of a model, no run is written among its data, absurd sizes are a sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mambapipelines.cli.audiomamba.main import main as audiomamba
from mambapipelines.cli.genomamba.main import main as genomamba
from tiny_language_models import model_folder, random_letters, write_fasta
from tiny_species import write_tiny_model
from waveform_runs import training_command, write_tones

LETTERS = random_letters(300, 1)
VCF = (
    "##fileformat=VCFv4.2\n##contig=<ID=chr1,length=300>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    f"chr1\t20\t.\t{LETTERS[19:20].decode()}\tN\t.\t.\t.\n"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_tiny_model(folder / "species")
    model_folder(folder / "language", "causal")
    write_fasta(folder / "genome.fa", {"chr1": LETTERS})
    (folder / "x.vcf").write_text(VCF)
    (folder / "x.bed").write_text("chr1\t0\t64\n")
    (folder / "rows.bed").write_text("chr1\t0\t64\ttrain\nchr1\t64\t128\ttest\n")
    (folder / "map.tsv").write_text("1\tchr1\n")
    (folder / "groups.tsv").write_text("chr1\tone\n")
    return folder


SCORE = "score-variants language x.vcf --reference genome.fa --window 32"
CLASSIFY = "classify species genome.fa"
COMMANDS = {
    **{f"{SCORE} --output {name}": name for name in ("x.vcf", "genome.fa", "language/config.json")},
    f"{SCORE} --chromosome-map map.tsv --output map.tsv": "map.tsv",
    "generate language --length 8 --prompt genome.fa --output genome.fa": "genome.fa",
    "generate language --length 8 --output language/model.safetensors": "language/model.safetensors",
    "track language --reference genome.fa --bed x.bed --output x.bed": "x.bed",
    "perplexity language --reference genome.fa --intervals rows.bed --lengths 32 --output rows.bed": "rows.bed",
    "intervals audit --intervals rows.bed --reference genome.fa --length 32 --rule hyenadna --fix drop "
    "--output rows.bed": "rows.bed",
    "intervals make --reference genome.fa --valid x --test y --length 32 --output genome.fa": "genome.fa",
    **{f"{CLASSIFY} {option} genome.fa": "genome.fa" for option in ("--output", "--report", "--kraken-report")},
    **{f"{CLASSIFY} --output {name}": name for name in ("species/config.json", "species/model.safetensors", "-")},
    f"{CLASSIFY} --group-by groups.tsv --groups-output groups.tsv": "groups.tsv",
    "evaluate species --genome alba=genome.fa --plot genome.fa": "genome.fa",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_replaces_neither_an_input_nor_a_model(
    command: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert genomamba(command.split()) == 2
    said = capsys.readouterr().err
    assert any(words in said for words in ("also an input", "file of the model", "standard output"))
    path = Path(COMMANDS[command])
    assert not path.exists() or path.read_bytes() == (whole / path).read_bytes()


@pytest.mark.parametrize("command", [training_command, None], ids=["train", "train-classifier"])
def test_a_run_is_not_written_among_its_clips(
    command: Callable[..., list[str]] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tones(tmp_path / "tones", 6)
    output = tmp_path / "tones" / "model"
    words = ["train-classifier", str(tmp_path / "tones"), "--output", str(output)]
    assert audiomamba(command(tmp_path / "tones", output, 1) if command else words) == 2
    assert "would be taken for clips" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--threads", str(10**20)],
        ["--threads", "1000000"],
        ["--seed", str(2**64)],
        ["--length", str(10**14)],
        ["--output", "-"],
    ],
)
def test_sizes_beyond_reason_end_in_a_sentence(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tones(tmp_path / "tones", 6)
    assert audiomamba([*training_command(Path("tones"), Path("run"), 1), *options]) == 2
    assert "rror" in capsys.readouterr().err
    assert not Path("-").exists()
