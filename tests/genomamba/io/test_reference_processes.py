"""A reference genome is read rightly from any number of processes and threads, and its index built once."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.io import reference_index
from genomamba.io.reference import Reference
from genomamba.tokenizer import CharacterTokenizer
from tiny_references import CONTIGS, block_gzip, fasta_bytes

WORKERS = 8
FETCHES_PER_WORKER = 60


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_bytes(CONTIGS))
    return path


def _fetch_many(arguments: tuple[Reference | str, int]) -> int:
    """Compare random ranges with the truth; returns how many were wrong."""
    source, seed = arguments
    genome = Reference(source) if isinstance(source, str) else source
    random = np.random.default_rng(seed)
    wrong = 0
    for _ in range(FETCHES_PER_WORKER):
        name = ("chr1", "chr2")[random.integers(2)]
        start, end = np.sort(random.integers(len(CONTIGS[name]) + 1, size=2)).tolist()
        wrong += genome.letters(name, start, end) != CONTIGS[name][start:end]
    return wrong


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_eight_workers_with_one_object_get_the_right_letters(genome: Path, method: str) -> None:
    shared = Reference(genome)
    shared.letters("chr1", 5, 500)  # its handle is open before the workers exist
    context = multiprocessing.get_context(method)
    workers = WORKERS if method == "fork" else 2  # each spawned one imports everything again
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        assert sum(pool.map(_fetch_many, [(shared, seed) for seed in range(2 * workers)])) == 0


_INHERITED: list[Reference] = []


def _fetch_with_inherited(seed: int) -> int:
    return _fetch_many((_INHERITED[0], seed))


def test_eight_forked_workers_do_not_use_the_handle_they_inherit(genome: Path) -> None:
    _INHERITED[:] = [Reference(genome)]
    _INHERITED[0].letters("chr1", 5, 500)
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
        assert sum(pool.map(_fetch_with_inherited, range(2 * WORKERS))) == 0


def test_threads_share_one_object(genome: Path) -> None:
    shared = Reference(genome)
    with ThreadPoolExecutor(WORKERS) as pool:
        assert sum(pool.map(_fetch_many, [(shared, seed) for seed in range(WORKERS)])) == 0


def _first_use(
    path: str,
    barrier: "threading.Barrier",
    builds: "multiprocessing.sharedctypes.Synchronized[int]",
    wrong: "multiprocessing.sharedctypes.Synchronized[int]",
) -> None:
    build = reference_index._build_index

    def counted(*arguments: object) -> None:
        with builds.get_lock():
            builds.value += 1
        time.sleep(0.2)  # long enough for the others to come by
        build(*arguments)  # type: ignore[arg-type]

    reference_index._build_index = counted  # type: ignore[assignment]
    barrier.wait()
    mistakes = _fetch_many((path, os.getpid()))
    with wrong.get_lock():
        wrong.value += mistakes


@pytest.mark.parametrize("stale", [False, True])
def test_concurrent_first_use_builds_the_index_once(genome: Path, stale: bool) -> None:
    if stale:
        Path(f"{genome}.fai").write_text("chr1\t5\t6\t5\t6\n", encoding="utf-8")
    context = multiprocessing.get_context("fork")
    barrier, builds, wrong = context.Barrier(WORKERS), context.Value("i", 0), context.Value("i", 0)
    workers = [context.Process(target=_first_use, args=(str(genome), barrier, builds, wrong)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * WORKERS
    assert (builds.value, wrong.value) == (1, 0)
    assert sorted(path.name for path in genome.parent.iterdir()) == ["genome.fa", "genome.fa.fai"]


class _Windows(torch.utils.data.Dataset[torch.Tensor]):
    """Windows of one reference that every worker of a DataLoader shares."""

    def __init__(self, genome: Reference) -> None:
        self.genome = genome

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.genome.tokens("chr1", 50 * index, 50 * index + 100))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores, on purpose
@pytest.mark.parametrize("workers", [0, 8])
def test_the_workers_of_a_data_loader_get_the_right_tokens(genome: Path, workers: int) -> None:
    opened = Reference(genome)
    opened.letters("chr1", 0, 10)  # the workers inherit an open handle
    loader = torch.utils.data.DataLoader(_Windows(opened), batch_size=10, num_workers=workers)
    tokens = torch.cat(list(loader))
    whole = CharacterTokenizer().encode(CONTIGS["chr1"])
    expected = np.stack([whole[50 * index : 50 * index + 100] for index in range(200)])
    np.testing.assert_array_equal(tokens.numpy(), expected)


@pytest.mark.parametrize("block_bytes", [0xFF00, 997])
def test_block_gzip_gives_the_same_letters(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(block_gzip(fasta_bytes(CONTIGS), block_bytes))
    genome = Reference(path)
    assert genome.lengths == {name: len(letters) for name, letters in CONTIGS.items()}
    for name, letters in CONTIGS.items():
        for start in range(0, len(letters), 331):
            assert genome.letters(name, start, start + 400, pad=True) == letters[start : start + 400].ljust(400, b"N")
    index = Path(f"{path}.fai")
    before = index.stat().st_mtime_ns
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        assert sum(pool.map(_fetch_many, [(genome, seed) for seed in range(WORKERS)])) == 0
    assert index.stat().st_mtime_ns == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["genome.fa.gz", "genome.fa.gz.fai", "genome.fa.gz.gzi"]
