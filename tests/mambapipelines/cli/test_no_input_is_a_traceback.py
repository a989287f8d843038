"""Whatever bytes a command is given, it does its work or says in one sentence why not: no exception comes out of it."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from audiomamba.data.quantisers import Quantiser
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, save_waveform_model
from mambapipelines.cli.audiomamba import main as audiomamba_cli
from mambapipelines.cli.genomamba import main as genomamba_cli
from tiny_language_models import model_folder, random_letters, write_fasta
from tiny_species import write_tiny_model

LETTERS = random_letters(300, 1)
few_examples = settings(max_examples=25, deadline=None, database=None)

VCF = (
    b"##fileformat=VCFv4.2\n##contig=<ID=chr1,length=300>\n"
    b'##INFO=<ID=AC,Number=A,Type=Integer,Description="x">\n'
    b"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    b"chr1\t20\trs1\t" + LETTERS[19:20] + b"\tA,<DEL>,CGG\t9\tPASS\tAC=1,2,3\n"
    b"chr1\t200\t.\t" + LETTERS[199:202] + b"\tT\t.\t.\t.\n"
)
BED = b"track name=x\nchr1\t5\t60\tname\t0\t-\nchr1\t100\t300\n#comment\n"
FASTA = b">one first\nACGTNNACGT\nRYKM\n>two\n" + LETTERS[:90] + b"\n"
FASTQ = b"@one\nACGTNACGT\n+\nIIIIIIIII\n@two first\nACG\n+two\n@@@\n"
HUGE = b"99999999999999999999"
WORDS = {
    "vcf": (b"chr1", b"\t", b"\n", b"-1", b"301", HUGE, b"<DEL>", b"*", b".", b"##contig=<ID=chr1>\n"),
    "bed": (b"chr1", b"chr9", b"\t", b" ", b"\n", b"-5", b"60", b"1e3", HUGE, b"browser", b"-", b"+"),
    "reads": (b">", b"@", b"+", b"\n", b"\r", b"ACGT", b"nnnn", b"*", b" ", b";", b"\x00", b"\xff"),
    "wav": (b"RIFF", b"WAVE", b"fmt ", b"data", b"LIST", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"OggS", b"fLaC"),
}


def wav() -> bytes:
    content = io.BytesIO()
    soundfile.write(content, 0.3 * np.sin(np.arange(60)), 8000, format="WAV", subtype="FLOAT")
    return content.getvalue()


def damaged(words: tuple[bytes, ...], *wholes: bytes) -> st.SearchStrategy[bytes]:
    """Arbitrary bytes, or words of the format in any order, or a whole file with pieces replaced, and cut anywhere."""

    @st.composite
    def edited(draw: st.DrawFn) -> bytes:
        data = draw(st.sampled_from(wholes))
        for _ in range(draw(st.integers(1, 4))):
            begin = draw(st.integers(0, len(data)))
            end = begin + draw(st.integers(0, 8))
            data = data[:begin] + draw(st.one_of(st.sampled_from(words), st.binary(max_size=6))) + data[end:]
        return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data

    of_words = st.lists(st.sampled_from(words), max_size=30).map(b"".join)
    return st.one_of(edited(), edited(), of_words, st.binary(max_size=200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind, and a genome."""
    folder = tmp_path_factory.mktemp("files")
    write_fasta(folder / "genome.fa", {"chr1": LETTERS})
    model_folder(folder / "language", "causal")
    write_tiny_model(folder / "species")
    stages = (StageConfig(1, {"name": "selective", "state_size": 2}), StageConfig(1, {"name": "s4d", "state_size": 2}))
    waveforms = WaveformModel(WaveformModelConfig(stages, 4, (2,), quantiser=Quantiser(sample_rate_hz=8000)))
    save_waveform_model(folder / "waveforms", waveforms, details={})
    return folder


def check(program: Callable[[list[str]], int], name: str, data: bytes, command: Callable[[Path], list[str]]) -> None:
    """Run a command that reads a file of these bytes, in an empty folder; what goes wrong leaves nothing behind."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        path.write_bytes(data)
        status = program(command(path))
        assert status in (0, 2)
        # An index beside a file is no output.
        left = [one.name for one in Path(place).iterdir() if one != path]
        assert status == 0 or left == [], left


@few_examples
@given(data=damaged(WORDS["vcf"], VCF))
@example(data=VCF.replace(b"VCFv4.2", b"VCF\x80v4.2"))
def test_score_variants(folder: Path, data: bytes) -> None:
    more = ["--reference", str(folder / "genome.fa"), "--window", "32"]
    check(
        genomamba_cli.main, "x.vcf", data,
        lambda path: ["score-variants", str(folder / "language"), str(path), *more],
    )  # fmt: skip


@few_examples
@given(data=damaged(WORDS["bed"], BED))
def test_embed_regions(folder: Path, data: bytes) -> None:
    def command(path: Path) -> list[str]:
        output = ["--reference", str(folder / "genome.fa"), "--output", str(path.with_name("out.npz"))]
        return ["embed", str(folder / "language"), "--bed", str(path), *output]

    check(genomamba_cli.main, "x.bed", data, command)


@few_examples
@given(data=damaged(WORDS["bed"], BED))
def test_track_of_regions(folder: Path, data: bytes) -> None:
    def command(path: Path) -> list[str]:
        output = ["--reference", str(folder / "genome.fa"), "--output", str(path.with_name("out.bedgraph"))]
        return ["track", str(folder / "language"), "--bed", str(path), *output]

    check(genomamba_cli.main, "x.bed", data, command)


@few_examples
@given(data=damaged(WORDS["reads"], FASTA, FASTQ))
def test_classify(folder: Path, data: bytes) -> None:
    def command(path: Path) -> list[str]:
        return [
            "classify",
            str(folder / "species"),
            str(path),
            "--threads",
            "1",
            "--output",
            str(path.with_name("out")),
        ]

    check(genomamba_cli.main, "x.fa", data, command)


@few_examples
@given(data=damaged(WORDS["wav"], wav()))
def test_generate_from_a_clip(folder: Path, data: bytes) -> None:
    def command(path: Path) -> list[str]:
        length = ["--clips", "1", "--seconds", "0.001", "--output", str(path.with_name("out"))]
        return ["generate", str(folder / "waveforms"), "--continue", str(path), *length]

    check(audiomamba_cli.main, "x.wav", data, command)
