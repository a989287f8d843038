"""Time generation: one sequence, one position after the other, through a stack of blocks (float32, no gradients).

python kernels/benchmarks/step.py
python kernels/benchmarks/step.py --after 0 1000 --layers 4

Every stack first reads `after` positions and is then timed on the ones that follow. A recurrent state costs the same
however much was read; attention's cache grows. `transformers` is MambaForCausalLM's own cached generation step, with a
vocabulary of 16.
"""

import argparse
import functools
import logging
import os
import time
from collections.abc import Callable
from unittest import mock

import torch

from mambacore.benchmarking import machine, print_table
from mambacore.layers import ResidualStack, SelectiveMixer

MODEL_WIDTH = 128
BATCHES = (1, 2, 4, 7, 16, 64)
TIMED_POSITIONS, ROUNDS = 200, 5


def microseconds_per_position(step: Callable[[], object]) -> float:
    """The shortest mean of several rounds."""
    for _ in range(20):
        step()
    shortest = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(TIMED_POSITIONS):
            step()
        shortest = min(shortest, (time.perf_counter() - begin) / TIMED_POSITIONS)
    return shortest * 1e6


def time_stack(mixer: str, layers: int, after: int) -> float:
    """Microseconds per position and layer of our stack after so many positions."""
    torch.manual_seed(0)
    stack = ResidualStack(MODEL_WIDTH, [mixer] * layers).eval()
    with torch.inference_mode():
        state = stack(torch.randn(1, after, MODEL_WIDTH))[1] if after else None
        sequence = torch.randn(1, 1, MODEL_WIDTH)

        def step() -> None:
            nonlocal state
            _, state = stack(sequence, state)

        return microseconds_per_position(step) / layers


def batch_rows(layers: int) -> list[list[str]]:
    """Microseconds per position and layer of a whole batch, and how much that is of as many single sequences."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        stack = ResidualStack(MODEL_WIDTH, ["selective"] * layers).eval().to(dtype)
        alone = 0.0
        for batch in BATCHES:
            sequence = torch.randn(batch, 1, MODEL_WIDTH, dtype=dtype)
            with torch.inference_mode():
                state = stack(sequence)[1]
                found = microseconds_per_position(functools.partial(stack, sequence, state)) / layers
            alone = alone or found
            rows.append(
                [str(dtype), str(batch), f"{found:.1f}", f"{found / alone:.2f}", f"{found / alone / batch:.2f}"]
            )
    return rows


def time_transformers(layers: int, after: int) -> float:
    """Microseconds per position and layer of transformers' Mamba, its embedding and head included."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.disable(logging.WARNING)
    from transformers import MambaConfig, MambaForCausalLM  # noqa: PLC0415  slow to import

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=16, hidden_size=MODEL_WIDTH, num_hidden_layers=layers)
    model = MambaForCausalLM(config).eval()
    with torch.inference_mode():
        cache = model(torch.randint(16, (1, max(after, 4))), use_cache=True).cache_params
        token = torch.zeros(1, 1, dtype=torch.long)
        return microseconds_per_position(lambda: model(token, cache_params=cache, use_cache=True)) / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=int, nargs="+", default=[0, 1000, 20_000])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"Generation, width {MODEL_WIDTH}, {options.layers} layers, batch 1, float32\n{machine()}\n")
    systems: dict[str, Callable[[int], float]] = {
        "selective": lambda after: time_stack("selective", options.layers, after),
        "s4d": lambda after: time_stack("s4d", options.layers, after),
        "attention": lambda after: time_stack("attention", options.layers, after),
        "transformers' Mamba": lambda after: time_transformers(options.layers, min(after, 1000)),
    }
    rows = [[name, *(f"{time_after(after):.1f}" for after in options.after)] for name, time_after in systems.items()]
    with mock.patch.object(SelectiveMixer, "step", lambda *_: None):
        operators = [time_stack("selective", options.layers, after) for after in options.after]
    rows.insert(1, ["selective, operator by operator", *(f"{value:.1f}" for value in operators)])
    print_table(["us per position and layer", *(f"after {after}" for after in options.after)], rows)
    print("\nSelective blocks, several sequences sharing their weights\n")
    print_table(
        ["weights", "batch", "us per position and layer", "by batch 1", "per sequence"], batch_rows(options.layers)
    )


if __name__ == "__main__":
    main()
