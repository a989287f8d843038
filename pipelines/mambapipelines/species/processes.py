"""Classification by several processes: each computes the evidence of its share of the records, the first merges.

Every process reads the whole input, which is fast, and takes every n-th batch. Batches are a function of the records'
lengths and order, so the merged evidence is identical, to the last bit, to that of one process with as many threads.
Processes are started here (`--processes`) or by `torchrun`; those of `torchrun` must share a temporary folder.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import numpy as np

from genomamba.classification.evidence import RecordEvidence
from genomamba.classification.records import Share
from genomamba.io.compression import STANDARD_INPUT
from mambacore.errors import InputError

SECONDS_BETWEEN_LOOKS = 0.05
_ERROR_SUFFIX, _PART_SUFFIX = ".error", ".part"


EvidenceOfShare = Callable[[Share], Iterator[tuple[int, RecordEvidence]]]
"""Yields (batch, evidence) for the records of a share, in order."""


def torchrun_share() -> Share | None:
    """The share of a process that `torchrun` started; `None` for any other process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    return Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def write_part(evidence: EvidenceOfShare, share: Share, folder: Path) -> None:
    """Write a share's evidence to the folder, or the message of an `InputError` instead."""
    temporary = folder / f"{share.rank}.unfinished"
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for batch, record in evidence(share):
                stream.write(f"{batch}\t{record.to_line()}")
    except InputError as error:
        (folder / f"{share.rank}{_ERROR_SUFFIX}").write_text(str(error), encoding="utf-8")
        raise
    temporary.rename(folder / f"{share.rank}{_PART_SUFFIX}")


def merged_parts(folder: Path, count: int) -> Iterator[RecordEvidence]:
    """The records of all parts in the order of the input.

    Raises:
        InputError: a process left an error message instead of its part, or nothing.
    """
    for rank in range(count):
        sentence = folder / f"{rank}{_ERROR_SUFFIX}"
        if sentence.exists():
            raise InputError(sentence.read_text(encoding="utf-8"))
        if not (folder / f"{rank}{_PART_SUFFIX}").exists():
            raise InputError(f"process {rank + 1} of {count} ended before its records were classified: run it again.")
    with ExitStack() as opened:
        streams = [
            opened.enter_context((folder / f"{rank}{_PART_SUFFIX}").open(encoding="utf-8")) for rank in range(count)
        ]
        waiting = [_next_line(stream) for stream in streams]
        batch = 0
        while any(line is not None for line in waiting):
            rank = batch % count
            while (line := waiting[rank]) is not None and line[0] == batch:
                yield RecordEvidence.from_line(line[1])
                waiting[rank] = _next_line(streams[rank])
            batch += 1


def _next_line(stream: TextIO) -> tuple[int, str] | None:
    line = stream.readline()
    if not line:
        return None
    batch, _, content = line.partition("\t")
    return int(batch), content


@contextmanager
def rereadable_sources(sources: Sequence[str]) -> Iterator[list[str]]:
    """Copy standard input and pipes to temporary files, so that all sources can be read more than once."""
    with ExitStack() as opened:
        paths: list[str] = []
        folder: Path | None = None
        for number, source in enumerate(sources):
            if not _is_stream(source):
                paths.append(source)
                continue
            if folder is None:
                folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="genomamba-")))
            copy = folder / f"{number}"
            try:
                with ExitStack() as streams:
                    stream = sys.stdin.buffer if source == STANDARD_INPUT else streams.enter_context(open(source, "rb"))
                    shutil.copyfileobj(stream, streams.enter_context(copy.open("wb")))
            except OSError as error:
                raise InputError(f"{source} cannot be copied to {folder} ({error.strerror}): set TMPDIR.") from error
            paths.append(str(copy))
        yield paths


def _is_stream(source: str) -> bool:
    if source == STANDARD_INPUT:
        return True
    try:
        return stat.S_ISFIFO(os.stat(source).st_mode) or stat.S_ISCHR(os.stat(source).st_mode)
    except OSError:
        return False


@contextmanager
def evidence_by_processes(
    worker: Callable[..., None], arguments: tuple[object, ...], count: int, watch: Callable[[], None]
) -> Iterator[Iterator[RecordEvidence]]:
    """Start processes, wait for them, and yield the records of all in order.

    Args:
        worker: called as `worker(share, folder, *arguments)` in each process; a module-level function.
        arguments: further arguments of the worker.
        count: number of processes.
        watch: called at intervals while they work.

    Raises:
        InputError: a process has failed; the others are stopped.
    """
    # One process imports everything and is forked; it has no threads yet, which a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__module__])
    with tempfile.TemporaryDirectory(prefix="genomamba-") as name:
        folder = Path(name)
        processes: list[BaseProcess] = [
            context.Process(target=worker, args=(Share(rank, count), name, *arguments), daemon=True)
            for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                _refuse_failed(processes, folder)
                watch()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            _refuse_failed(processes, folder)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                if process.pid is not None:
                    process.join()
        with closing(merged_parts(folder, count)) as records:  # type: ignore[type-var]  # a generator
            yield records


def _refuse_failed(processes: Sequence[BaseProcess], folder: Path) -> None:
    for rank, process in enumerate(processes):
        if not process.exitcode:
            continue
        sentence = folder / f"{rank}{_ERROR_SUFFIX}"
        if sentence.exists():
            raise InputError(sentence.read_text(encoding="utf-8"))
        ended = f"was ended by signal {-process.exitcode}" if process.exitcode < 0 else "failed"
        raise InputError(
            f"process {rank + 1} of {len(processes)} {ended}, so no output was written: give fewer --processes if "
            "memory is short, and run it again."
        )


@contextmanager
def evidence_by_torchrun(evidence: EvidenceOfShare, share: Share) -> Iterator[Iterator[RecordEvidence] | None]:
    """Compute this process's share; the first process receives the records of all, the others `None`.

    Raises:
        InputError: a process has failed; the first one reports it.
    """
    import torch  # noqa: PLC0415
    from torch import distributed  # noqa: PLC0415

    distributed.init_process_group("gloo")
    try:
        with ExitStack() as opened:
            name = opened.enter_context(tempfile.TemporaryDirectory(prefix="genomamba-")) if share.rank == 0 else ""
            encoded = torch.zeros(4096, dtype=torch.uint8)
            content = np.frombuffer(name.encode(), dtype=np.uint8).copy()
            encoded[: len(content)] = torch.from_numpy(content)
            distributed.broadcast(encoded, 0)
            folder = Path(bytes(encoded.tolist()).rstrip(b"\0").decode())
            if not folder.is_dir():
                raise InputError(f"{folder} is not the same folder for all processes: set TMPDIR to one they share.")
            try:
                write_part(evidence, share, folder)
            except InputError:
                if share.rank != 0:
                    distributed.barrier()
                    raise
            distributed.barrier()
            yield merged_parts(folder, share.count) if share.rank == 0 else None
    finally:
        distributed.destroy_process_group()
