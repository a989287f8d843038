"""Train on a machine whose cores others use, too: bases per second of processor time, alone and beside busy processes.

    python pipelines/benchmarks/shared_machine.py
    python pipelines/benchmarks/shared_machine.py --busy 8 --seconds 30

Time that a process spends waiting for its turn costs it nothing here; what is measured is how much of its own processor
time is lost: to threads that wait by spinning, to memory that is given back and asked for again, to caches that others
have filled, to cores that share their units.
Each case is a process of its own; the cases take turns, and medians of the rounds are printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time

LENGTH, MICRO_BATCHES = 8192, 4
TARGET_BASES = 70_000
# Variables of a process: none, as a command runs; waiting threads that spin; the heap as the C library has it.
WAITS = {
    "as it comes": {},
    "spinning": {"OMP_WAIT_POLICY": "active"},
    "memory given back": {"GLIBC_TUNABLES": ""},
}
HARMLESS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def train(seconds: float, threads: int, replica_count: int) -> dict[str, float]:
    """Steps of the demo model for so long; what they took of the processor."""
    importlib.import_module("mambapipelines")  # first, as in a command: it sets up waiting threads and the heap
    import torch  # noqa: PLC0415  in the measured process only
    from torch import nn  # noqa: PLC0415

    from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig  # noqa: PLC0415
    from mambapipelines.species.recipe import SpeciesRecipe  # noqa: PLC0415
    from mambapipelines.training.recipe import load_task_recipe  # noqa: PLC0415
    from mambapipelines.training.replicas import Replicas  # noqa: PLC0415

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    recipe = load_task_recipe(SpeciesRecipe, "demo", ["precision=float32"])
    config = SpeciesClassifierConfig.from_dict({"class_names": list("abcde"), **recipe.model})
    model = SpeciesClassifier(config)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-3)
    replicas = Replicas(model, replica_count, threads)
    batches = [(torch.randint(5, 9, (1, LENGTH), dtype=torch.uint8), torch.tensor([0])) for _ in range(MICRO_BATCHES)]

    def backward(replica: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        loss = replica.loss(tokens, labels)["loss"]  # type: ignore[operator]
        loss.backward()
        return {"loss": float(loss.detach())}

    def step() -> None:
        replicas.accumulate(batches, backward)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    before, begin, steps = os.times(), time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        step()
        steps += 1
    after, wall = os.times(), time.perf_counter() - begin
    user, system = after.user - before.user, after.system - before.system
    bases = steps * MICRO_BATCHES * LENGTH
    return {
        "per_processor_second": bases / (user + system),
        "per_second": bases / wall,
        "system": system / (user + system),
    }


def run_case(options: argparse.Namespace, wait: str, busy: int) -> dict[str, float]:
    """One case in a fresh process beside so many busy ones."""
    environment = {name: value for name, value in os.environ.items() if name not in HARMLESS} | WAITS[wait]
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [
            sys.executable,
            __file__,
            "--case",
            "--seconds",
            str(options.seconds),
            "--threads",
            str(options.threads),
        ]
        command += ["--replicas", str(options.replicas)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of every case")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=4, help="processes that do nothing but compute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=2, help="micro-batches at once; 1: threads share operations")
    parser.add_argument("--waits", nargs="+", choices=WAITS, default=list(WAITS))
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(train(options.seconds, options.threads, options.replicas)))
        return
    from mambacore.benchmarking import machine, print_table, print_target  # noqa: PLC0415  not in the measured process

    cases = [(wait, busy) for wait in options.waits for busy in (0, options.busy)]
    found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            found[case].append(run_case(options, *case))
    print(f"{machine()}; demo model, {options.replicas} micro-batches of {LENGTH} bp at once\n")

    def median(case: tuple[str, int], name: str) -> float:
        return statistics.median(run[name] for run in found[case])

    first = median(cases[0], "per_processor_second")
    rows = [
        [
            wait, str(busy), f"{median((wait, busy), 'per_processor_second'):,.0f}",
            f"{median((wait, busy), 'per_processor_second') / first:.2f}",
            f"{median((wait, busy), 'per_second'):,.0f}", f"{median((wait, busy), 'system'):.0%}",
        ]
        for wait, busy in cases
    ]  # fmt: skip
    header = ["waiting threads", "busy processes", "bases per processor second", "by the first", "bases per second",
              "in the kernel"]  # fmt: skip
    print_table(header, rows)
    if ("as it comes", options.busy) in found:
        bases = median(("as it comes", options.busy), "per_processor_second")
        what = f"training beside {options.busy} busy processes, bases per second of processor time"
        print_target(what, bases, TARGET_BASES, at_least=True, shown=",.0f")


if __name__ == "__main__":
    main()
