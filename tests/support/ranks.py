"""Several processes on one machine as the ranks of a gloo group, for tests of what runs over ranks."""

import datetime
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

# How long a rank waits for another one, and the test for all of them.
COLLECTIVE_SECONDS = 60
TEST_SECONDS = 200


def run_ranks(worker: Callable[[int, int], Any], count: int, folder: Path) -> list[dict[str, Any]]:
    """Run ``worker(rank, count)`` in ``count`` processes that form the default group.

    Returns:
        For each rank what its worker returned (JSON-able) as ``result``, or the traceback as ``error``; ``error`` says
        so if it was still running when the time was over and had to be stopped.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(worker, rank, count, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TEST_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    answers = []
    for rank, process in enumerate(processes):
        if process.is_alive():
            process.kill()
            process.join()
        report = folder / f"{rank}.json"
        missing = {"error": f"rank {rank} gave no answer within {TEST_SECONDS} seconds"}
        answers.append(json.loads(report.read_text()) if report.exists() else missing)
    return answers


def _run(worker: Callable[[int, int], Any], rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=(folder / "store").as_uri(),
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
        answer = {"result": worker(rank, count)}
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except Exception:
        answer = {"error": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
