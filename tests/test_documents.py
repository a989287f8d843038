"""The documentation: every command exists, every block runs or says what it needs, and the site builds."""

import contextlib
import gzip
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from document_blocks import PAGES, PROGRAMS, REPOSITORY, Block, blocks, program_words
from genomamba.data.targets import TargetDescription
from genomamba.models.sequence_model import save_sequence_model, sequence_model_on
from mambapipelines.cli.audiomamba import main as audio
from mambapipelines.cli.genomamba import main as dna
from tiny_language_models import language_model, model_folder, random_letters, write_fasta
from tiny_species import bases, fasta, write_tiny_model

VCF_HEADER = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
MAINS = {"genomamba": dna, "audiomamba": audio}
SITE_PAGES = [page for page in PAGES if page != REPOSITORY / "README.md"]
BLOCKS = {page: list(blocks(page)) for page in PAGES}
RUN_PAGES = [
    page
    for page in SITE_PAGES
    if any(b.language in {"shell", "python"} and b.mark != "needs data" for b in BLOCKS[page])
]


def page_name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_have_the_options_that_the_page_gives_them(page: Path) -> None:
    calls = [
        (block.name, words)
        for block in BLOCKS[page]
        if block.language == "shell"
        for command in block.commands
        for words in program_words(command)
    ]
    calls += [
        (page.name, shlex.split(code))
        for code in re.findall(
            r"(?<!`)`((?:genomamba|audiomamba) [a-z][^`\n]*)`(?!`)", page.read_text(encoding="utf-8")
        )
        if "X" not in code.split()
    ]
    for where, words in calls:
        command = typer.main.get_command(MAINS[words[0]].application)
        rest = words[1:]
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"{where}: no command {' '.join(words[:3])}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {"--help", "-h"} | {name for one in command.params for name in [*one.opts, *one.secondary_opts]}
        given = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert given <= known, f"{where}: {command.name} has no {given - known}"


@pytest.mark.parametrize("page", SITE_PAGES, ids=page_name)
def test_a_block_is_run_or_says_what_it_needs(page: Path) -> None:
    unexplained = [block.name for block in BLOCKS[page] if block.language == "other" and not block.mark]
    assert not unexplained, "neither commands nor marked: see tests/support/document_blocks.py"
    assert all(block.remark for block in BLOCKS[page] if block.mark in {"needs data", "test adds"})


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:tests|kernels|genomamba|audiomamba|pipelines)/[\w/.*-]+\.\w+)`", page.read_text(encoding="utf-8")
    )
    assert not [name for name in named if not list(REPOSITORY.glob(name))]


def genome(length: int, seed: int) -> bytes:
    return bases(length, seed, gc=0.3 + 0.02 * seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models and files under the names that the pages use."""
    place = tmp_path_factory.mktemp("documents")
    for name in ("model", "yeasts"):
        write_tiny_model(place / name)
    for name in ("MODEL", "pretrained"):
        model_folder(place / name, "causal")
    targets = TargetDescription("classes", ("kind",), ("a", "b"))
    save_sequence_model(
        place / "enhancer-model", sequence_model_on(language_model("causal"), targets, "mean", True).float(), {}
    )
    for seed, name in enumerate(("human", "galago", "mouse", "cow", "dog")):
        record = fasta({"one": genome(60_000, seed), "two": genome(30_000, seed + 10)})
        (place / f"{name}.fa").write_bytes(record)
        (place / f"{name}.fa.gz").write_bytes(gzip.compress(record))
    contigs = fasta({"first": bases(900), "second": bases(400, 1), "bin1_a": bases(300, 2), "bin2_a": bases(300, 3)})
    for name in ("contigs.fa", "bins.fa", "candidates.fa"):
        (place / name).write_bytes(contigs)
        (place / f"{name}.gz").write_bytes(gzip.compress(contigs))
    reads = b"".join(b"@r%d\n%s\n+\n%s\n" % (k, bases(80, k), b"I" * 80) for k in range(8))
    (place / "reads.fastq.gz").write_bytes(gzip.compress(reads))
    letters = {name: random_letters(6000, seed) for seed, name in enumerate(("chr1", "chr2", "chr3", "chr20"))}
    for name in ("genome.fa", "ref.fa"):
        write_fasta(place / name, letters)
    write_fasta(place / "prompts.fa", {"prompt": random_letters(30, 9)})
    (place / "genes.bed").write_text("chr1\t100\t400\tgene\t0\t-\n")
    (place / "regions.bed").write_text("chr1\t100\t200\n")
    (place / "variants.vcf").write_bytes(_vcf("chr1", letters["chr1"]))
    (place / "variants.vcf.gz").write_bytes(gzip.compress(_vcf("chr1", letters["chr1"])))
    _write_tables(place)
    _write_recordings(place)
    return place


def _vcf(contig: str, letters: bytes) -> bytes:
    rows = [f"##fileformat=VCFv4.2\n##contig=<ID={contig},length={len(letters)}>", VCF_HEADER]
    for position in (200, 300):
        reference = chr(letters[position - 1])
        alternative = "T" if reference == "C" else "C"
        rows.append(f"{contig}\t{position}\t.\t{reference}\t{alternative}\t.\t.\t.")
    return ("\n".join(rows) + "\n").encode()


def _write_tables(place: Path) -> None:
    splits = ["train"] * 20 + ["valid"] * 8 + ["test"] * 8
    for name, column in (("promoters.tsv", "promoter"), ("enhancers.tsv", "enhancer")):
        rows = [
            f"p{k}\t{bases(60, k, 0.3 + 0.4 * (k % 2)).decode()}\t{k % 2}\t{split}" for k, split in enumerate(splits)
        ]
        (place / name).write_text("\n".join([f"name\tsequence\t{column}\tsplit", *rows]) + "\n")


def _write_recordings(place: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    for folder in ("recordings", "digits"):
        (place / folder).mkdir()
        for digit in range(3):
            for take in (5, 8, 12, 20, 21, 22, 23, 24):
                wave = 0.3 * np.sin(np.arange(1600) * (0.1 + 0.05 * digit) + take)
                soundfile.write(place / folder / f"{digit}_jackson_{take}.wav", wave, 8000)
    soundfile.write(place / "beginning.wav", 0.3 * np.sin(np.arange(800.0) / 9), 8000)


def with_options(words: list[str], added: list[str]) -> list[str]:
    """A command with options of a test; they replace those that the page gives, and steps replace minutes.

    A folder of the tests that stands where a training writes its model is removed.
    """
    replaced = {word for word in added if word.startswith("--")}
    replaced |= {"--minutes", "--epochs"} if "--steps" in replaced else set()
    kept = [
        word
        for before, word in zip(["", *words[:-1]], words, strict=True)
        if word not in replaced and before not in replaced
    ]
    if {"train", "pretrain", "finetune"} & set(kept[1:2]) and "--resume" not in kept and "--output" in kept:
        shutil.rmtree(kept[kept.index("--output") + 1], ignore_errors=True)
    return kept + added


def run_command(command: str, added: str) -> str:
    """Run one command line, in this process where it is a plain call of a program; returns standard output."""
    words = shlex.split(command, comments=True)
    if words[0] not in PROGRAMS or {"|", "<", "&&"} & set(words) or "$" in command:
        if words[0] == "torchrun":
            command = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run", 1)
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", f"{command} {added}"], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        return done.stdout
    target = None
    if ">" in words:
        target, words = words[words.index(">") + 1], words[: words.index(">")]
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    words = with_options(words, shlex.split(added))
    with contextlib.redirect_stdout(printed):
        status = MAINS[words[0]].main(words[1:])
    assert status == 0, f"{command} ended with {status}"
    printed.seek(0)
    output = printed.read()
    if target is not None:
        Path(target).write_text(output, encoding="utf-8")
        return ""
    return output


def run_block(block: Block, printed: str) -> str:
    """Run a block, or compare it with what the one before printed; returns what it printed."""
    if block.mark == "output":
        assert printed.split() == block.text.split(), block.name
    elif block.mark == "needs data" or block.language not in {"shell", "python"}:
        return ""
    elif block.language == "python":
        exec(compile(block.text, block.name, "exec"), {})
    else:
        return "".join(
            run_command(command, block.remark if block.mark == "test adds" else "") for command in block.commands
        )
    return ""


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("page", RUN_PAGES, ids=page_name)
def test_the_blocks_of_a_page_run(
    page: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    demo = REPOSITORY / "demo"
    if page.name == "first-contig.md" and not (demo / "contigs.fa.gz").is_file():
        pytest.skip("there is no demo/contigs.fa.gz")
    place = tmp_path / "place"
    shutil.copytree(models, place)
    if demo.is_dir():
        (place / "demo").symlink_to(demo)
    if page.name == "first-contig.md":
        shutil.rmtree(place / "yeasts")  # the shipped model is meant
    monkeypatch.chdir(place)
    threads = torch.get_num_threads()
    printed = ""
    try:
        for block in BLOCKS[page]:
            printed = run_block(block, printed)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'genomamba[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr[-4000:]
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "genomamba classify yeasts demo/contigs.fa.gz" in index
    for page, needle in (
        ("reference/commands/genomamba-classify.html", "--unknown-rate"),
        ("reference/python/mambacore.scan.html", "selective_scan"),
        ("repository/kernels/index.html", "zero-order hold"),
    ):
        assert needle in (tmp_path / "site" / page).read_text(encoding="utf-8")
