"""Time generation: one sequence, one position after the other, through a stack of blocks (float32, no gradients).

python kernels/benchmarks/step.py
python kernels/benchmarks/step.py --after 0 1000 --layers 4

Every stack first reads `after` positions and is then timed on the ones that follow. A recurrent state costs the same
however much was read; attention's cache grows. `transformers` is MambaForCausalLM's own cached generation step, with a
vocabulary of 16.
"""

import argparse
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch

from mambacore.benchmarking import machine, print_table
from mambacore.layers import MIXERS, ResidualStack

MODEL_WIDTH = 128
BATCHES = (1, 2, 4, 7, 16, 64)
NATIVE = ("selective", "mamba2", "mamba3")
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


def batch_rows(layers: int, batches: Sequence[int]) -> list[list[str]]:
    """Microseconds per position and layer of a whole batch, and how much that is of as many single sequences."""
    rows = []
    for mixer, dtype in itertools.product(NATIVE, (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        stack = ResidualStack(MODEL_WIDTH, [mixer] * layers).eval().to(dtype)
        alone = 0.0
        for batch in batches:
            sequence = torch.randn(batch, 1, MODEL_WIDTH, dtype=dtype)
            with torch.inference_mode():
                state = stack(sequence)[1]
                found = microseconds_per_position(functools.partial(stack, sequence, state)) / layers
            alone = alone or found
            rows.append(
                [mixer, str(dtype), str(batch), f"{found:.1f}", f"{found / alone:.2f}", f"{found / alone / batch:.2f}"]
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
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="sequences that share their weights")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"Generation, width {MODEL_WIDTH}, {options.layers} layers, batch 1, float32\n{machine()}\n")
    rows = []
    for mixer in (*NATIVE, "s4d", "attention"):
        stepped = [time_stack(mixer, options.layers, after) for after in options.after]
        rows.append([mixer, *(f"{value:.1f}" for value in stepped)])
        if mixer in NATIVE:
            with mock.patch.object(MIXERS[mixer], "step", lambda *_: None):
                operators = [time_stack(mixer, options.layers, after) for after in options.after]
            rows.append([f"{mixer}, operator by operator", *(f"{value:.1f}" for value in operators)])
            times = (slow / fast for slow, fast in zip(operators, stepped, strict=True))
            rows.append([f"{mixer}, times as fast", *(f"{value:.1f}" for value in times)])
    peer = [time_transformers(options.layers, min(after, 1000)) for after in options.after]
    rows.append(["transformers' Mamba", *(f"{value:.1f}" for value in peer)])
    print_table(["us per position and layer", *(f"after {after}" for after in options.after)], rows)
    print("\nBlocks whose step is one operator, several sequences sharing their weights\n")
    titles = ["mixer", "weights", "batch", "us per position and layer", "by batch 1", "per sequence"]
    print_table(titles, batch_rows(options.layers, options.batches))


if __name__ == "__main__":
    main()
