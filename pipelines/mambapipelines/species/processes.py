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
from datetime import timedelta
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

from genomamba.classification.evidence import RecordEvidence
from genomamba.classification.records import Share
from genomamba.io.compression import STANDARD_INPUT
from mambacore.errors import InputError
from mambacore.files import temporary_folder
from mambapipelines.heartbeat import Heartbeat, rank_timeout_seconds
from mambapipelines.processes import end_with_parent

SECONDS_BETWEEN_LOOKS = 0.05
LONGEST_TEMPORARY_FOLDER = 70
"""Bytes: the fork server adds a folder and a name of its own."""
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
        temporary.write_text(str(error), encoding="utf-8")
        temporary.rename(folder / f"{share.rank}{_ERROR_SUFFIX}")
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
                folder = opened.enter_context(temporary_folder())
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


def _context() -> ForkServerContext | SpawnContext:
    """How processes are started.

    One process imports everything and is forked; it has no threads yet, which a fork would lose. It listens on a socket
    in the temporary folder, and the path of a socket is short (107 bytes): elsewhere every process imports for itself.
    """
    folder = os.fsencode(tempfile.gettempdir())
    if len(folder) > LONGEST_TEMPORARY_FOLDER:
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")


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
    context = _context()
    context.set_forkserver_preload([worker.__module__])
    with temporary_folder() as folder:
        processes: list[BaseProcess] = [
            context.Process(target=_work, args=(worker, Share(rank, count), folder, arguments), daemon=True)
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


def _work(worker: Callable[..., None], share: Share, folder: Path, arguments: tuple[object, ...]) -> None:
    end_with_parent(folder)
    worker(share, folder, *arguments)


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
        InputError: a process has failed, or does not answer.
    """
    from torch import distributed  # noqa: PLC0415

    timeout = timedelta(seconds=rank_timeout_seconds())
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        shared, _, _ = next(distributed.rendezvous("env://", timeout=timeout))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = distributed.TCPStore(address, port, is_master=False, timeout=timeout)
        with ExitStack() as opened:
            heartbeat = opened.enter_context(Heartbeat(own, share.rank, share.count, timeout.total_seconds()))
            if share.rank == 0:
                folder = opened.enter_context(temporary_folder())
                shared.set(f"folder/{attempt}", str(folder))
            else:
                folder = Path(shared.get(f"folder/{attempt}").decode())
            if not folder.is_dir():
                raise InputError(f"{folder} is not the same folder for all processes: set TMPDIR to one they share.")
            failure = None
            try:
                write_part(evidence, share, folder)
            except InputError as error:
                failure = error
            if share.rank == 0:
                while not all(_has_ended(folder, rank) for rank in range(share.count)):
                    heartbeat.check()
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                yield merged_parts(folder, share.count)
                return
            # The first process has read everything when it removes the folder.
            while folder.is_dir():
                time.sleep(SECONDS_BETWEEN_LOOKS)
                if folder.is_dir():
                    heartbeat.check()
            if failure is not None:
                raise failure
            yield None
    except distributed.DistError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the {share.count} processes do not find each other ({reason}): start all again.") from error


def _has_ended(folder: Path, rank: int) -> bool:
    return any((folder / f"{rank}{suffix}").exists() for suffix in (_PART_SUFFIX, _ERROR_SUFFIX))
