"""Work shared by processes: the bytes of one process, and no output when one of them fails or dies."""

import io
import multiprocessing
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from classification_ranks import run_rank
from mambacore.errors import InputError
from mambapipelines.console import WorkProgress
from mambapipelines.species import classify as species_classification
from mambapipelines.species.classify import ClassificationOptions, classify_files
from tiny_species import bases, fasta, write_tiny_model

BAD_RECORD = b">a\nACGT\n>b\nMKLV\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def records() -> bytes:
    # More than wait for each other, with a long one at the end.
    lengths = [number * 37 % 40 for number in range(1100)] + [400, 5]
    return fasta({f"bin{n % 3}_{n} words": bases(length, n) for n, length in enumerate(lengths)})


@pytest.fixture(scope="module")
def expected(model_folder: Path, records: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("expected")
    (folder / "in.fa").write_bytes(records)
    classify_files(ClassificationOptions(model_folder, [str(folder / "in.fa")], folder / "out.tsv", piece_length=256))
    return (folder / "out.tsv").read_bytes()


def test_two_processes_write_the_bytes_of_one_also_from_a_pipe(
    model_folder: Path, records: bytes, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert expected.count(b"\n") == 1102 + 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(records)))
    classify_files(ClassificationOptions(model_folder, ["-"], tmp_path / "out.tsv", piece_length=256, processes=2))
    assert (tmp_path / "out.tsv").read_bytes() == expected


@pytest.mark.parametrize("threads", [2, 3])
def test_the_answers_do_not_depend_on_the_number_of_threads(
    threads: int, model_folder: Path, records: bytes, expected: bytes, tmp_path: Path
) -> None:
    import torch  # noqa: PLC0415

    (tmp_path / "in.fa").write_bytes(records)
    before = torch.get_num_threads()
    try:
        classify_files(
            ClassificationOptions(
                model_folder, [str(tmp_path / "in.fa")], tmp_path / "out.tsv", threads=threads, piece_length=512
            )
        )
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "out.tsv").read_bytes() == expected


def test_a_failure_in_another_process_is_its_sentence_and_leaves_no_file(model_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.fa"
    bad.write_bytes(BAD_RECORD)
    with pytest.raises(InputError, match="record 'b'"):
        classify_files(ClassificationOptions(model_folder, [str(bad)], output=tmp_path / "out.tsv", processes=2))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.fa"]


def test_a_process_that_is_killed_is_told_and_leaves_no_file(
    model_folder: Path, records: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.fa").write_bytes(records)

    def kill_one(*_: object) -> None:
        for child in multiprocessing.active_children()[:1]:
            child.kill()

    monkeypatch.setattr(WorkProgress, "advance", kill_one)
    with pytest.raises(InputError, match="ended by signal 9"):
        classify_files(
            ClassificationOptions(model_folder, [str(tmp_path / "in.fa")], tmp_path / "out.tsv", processes=2)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in.fa"]
    assert not multiprocessing.active_children()


def run_ranks(options: ClassificationOptions) -> list[int | None]:
    """Exit status of two ranks as `torchrun` would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([species_classification.__name__])
    ranks = [context.Process(target=run_rank, args=(rank, 2, port, options), daemon=True) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def test_ranks_of_torchrun_write_the_bytes_of_one_process_or_nothing(
    model_folder: Path, records: bytes, expected: bytes, tmp_path: Path
) -> None:
    (tmp_path / "in.fa").write_bytes(records)
    (tmp_path / "bad.fa").write_bytes(BAD_RECORD)
    options = ClassificationOptions(
        model_folder, [str(tmp_path / "in.fa")], tmp_path / "out.tsv", threads=1, piece_length=256
    )
    assert run_ranks(options) == [0, 0]
    assert (tmp_path / "out.tsv").read_bytes() == expected
    (tmp_path / "out.tsv").unlink()
    assert run_ranks(replace(options, sources=[str(tmp_path / "bad.fa")])) == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.fa", "in.fa"]
