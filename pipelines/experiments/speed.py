"""Speed on a CPU (Gu & Dao, arXiv 2312.00752, section 4.5): scan against attention by length, and generation.

python pipelines/experiments/speed.py --output results/speed
python pipelines/experiments/speed.py --output results/speed --threads 2 --longest 65536
python pipelines/experiments/speed.py --output results/generation --only generation

First the operators alone: the selective scan over 256 channels with 16 states, and causal attention with 4 heads of 64
channels, forward, and forward with backward. Then generation: a stack of selective blocks beside a Transformer of the
same number of parameters with a cache of keys and values, token by token after prompts of growing length.

Times are processor time of one thread, medians of several runs: what other programs do on the machine matters little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment, line_plot
from matplotlib.figure import Figure
from torch.nn import functional as F

from mambacore import selective_scan
from mambacore.layers import ResidualStack
from mambapipelines.console import use_threads

CHANNELS, STATES, HEADS = 256, 16, 4
SHORTEST = 256
WIDTH, BLOCKS = 128, 8
# Hidden channels of the Transformer's feed-forward layers: its blocks then have about the parameters of ours.
FEED_FORWARD_WIDTH = 136
PROMPTS = (128, 512, 2_048, 8_192, 32_768)
NEW_TOKENS = 32
KINDS = ("selective", "transformer")
# A pass that takes longer than this ends the series of its operator.
LONGEST_SECONDS = 20.0


def processor_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time of several runs after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return statistics.median(taken)


def scan_pass(length: int, backward: bool) -> Callable[[], object]:
    """One pass of the scan with all its optional parts but the gate."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, length, CHANNELS, generator=generator)
    step_size = torch.randn(1, length, CHANNELS, generator=generator) - 4
    state_matrix = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    matrices = [torch.randn(1, length, 1, STATES, generator=generator) for _ in range(2)]
    arguments = [inputs, step_size, state_matrix, *matrices]

    def run() -> None:
        for one in arguments:
            one.requires_grad_(backward).grad = None
        outputs = selective_scan(*arguments, step_softplus=True)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if backward:
            outputs.sum().backward()

    return run


def attention_pass(length: int, backward: bool) -> Callable[[], object]:
    """One pass of causal attention over as many channels; PyTorch chooses the kernel, which never writes the scores."""
    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(1, HEADS, length, CHANNELS // HEADS, generator=generator) for _ in range(3)]

    def run() -> None:
        for one in arguments:
            one.requires_grad_(backward).grad = None
        outputs = F.scaled_dot_product_attention(*arguments, is_causal=True)
        if backward:
            outputs.sum().backward()

    return run


OPERATORS = {"scan": scan_pass, "attention": attention_pass}


def time_operator(name: str, backward: bool, longest: int) -> dict[str, Any]:
    """Microseconds per position by length, until a pass takes too long."""
    found: dict[str, float] = {}
    length = SHORTEST
    while length <= longest:
        seconds = processor_seconds(OPERATORS[name](length, backward), 3 if length > 4096 else 7)
        found[str(length)] = seconds / length * 1e6
        print(f"{name}, backward {backward}, length {length}: {found[str(length)]:.2f} us/position", flush=True)
        if seconds > LONGEST_SECONDS:
            break
        length *= 2
    return {"microseconds": found}


def stack_of(kind: str) -> ResidualStack:
    """Selective blocks, or a Transformer: as many blocks of attention, each with a feed-forward layer."""
    torch.manual_seed(0)
    if kind == "selective":
        return ResidualStack(WIDTH, ["selective"] * BLOCKS).eval()
    return ResidualStack(WIDTH, ["attention"] * BLOCKS, feed_forward_width=FEED_FORWARD_WIDTH).eval()


@torch.inference_mode()
def time_generation(kind: str, prompt: int) -> dict[str, Any]:
    """Tokens per second of processor time after a prompt, one sequence."""
    stack = stack_of(kind)
    begin = stack(torch.randn(1, prompt, WIDTH))[1]
    position = torch.randn(1, 1, WIDTH)

    def steps() -> None:
        state = begin
        for _ in range(NEW_TOKENS):
            _, state = stack(position, state)

    speed = NEW_TOKENS / processor_seconds(steps, 3)
    print(f"{kind}: {speed:.0f} tokens/s after {prompt}", flush=True)
    return {"tokens_per_second": speed, "parameters": sum(one.numel() for one in stack.parameters())}


def crossover(scan: dict[str, float], attention: dict[str, float]) -> str:
    """The shortest length from which on the scan takes less time than attention."""
    lengths = sorted(set(scan) & set(attention), key=int)
    faster = [length for length in lengths if scan[length] < attention[length]]
    return f"from {int(faster[0]):,} positions on" if faster else f"at no length up to {int(lengths[-1]):,}"


def operator_rows(experiment: Experiment, longest: int) -> tuple[list[list[str]], list[str], Figure]:
    """Rows, notes and plot of the passes of both operators."""
    passes = {"forward": False, "forward and backward": True}
    times = {
        (name, which): experiment.part(
            f"{name}-{'backward' if backward else 'forward'}",
            lambda name=name, backward=backward: time_operator(name, backward, longest),  # type: ignore[misc]
        )["microseconds"]
        for which, backward in passes.items()
        for name in OPERATORS
    }
    rows, notes = [], []
    for which in passes:
        scan, attention = times["scan", which], times["attention", which]
        for length in sorted(set(scan) | set(attention), key=int):
            both = length in scan and length in attention
            ratio = f"{attention[length] / scan[length]:.2f}" if both else ""
            cells = [f"{times[name, which][length]:.2f}" if length in times[name, which] else "" for name in OPERATORS]
            rows.append([f"{which}, us per position", f"{int(length):,}", *cells, ratio])
        notes.append(f"{which.capitalize()}: the scan is faster {crossover(scan, attention)}.\n")
    curves = {
        f"{name}, {which}": ([int(length) for length in found], list(found.values()))
        for (name, which), found in times.items()
    }
    return rows, notes, line_plot(curves, "length", "us per position, one thread", logarithmic=True)


def generation_rows(experiment: Experiment) -> tuple[list[list[str]], list[str], Figure]:
    """Rows, notes and plot of generation."""
    found = {
        (kind, prompt): experiment.part(
            f"generation-{kind}-{prompt}",
            lambda kind=kind, prompt=prompt: time_generation(kind, prompt),  # type: ignore[misc]
        )
        for prompt in PROMPTS
        for kind in KINDS
    }
    rows = []
    for prompt in PROMPTS:
        ours, other = (found[kind, prompt]["tokens_per_second"] for kind in KINDS)
        rows.append(
            ["generation, tokens/s after a prompt", f"{prompt:,}", f"{ours:.0f}", f"{other:.1f}", f"{ours / other:.2f}"]
        )
    ours, other = (found[kind, PROMPTS[0]]["parameters"] for kind in KINDS)
    note = (
        f"Generation: {BLOCKS} blocks of width {WIDTH}, {ours:,} parameters beside {other:,} of the Transformer, "
        "float32, batch 1.\n"
    )
    curves = {kind: (list(PROMPTS), [found[kind, one]["tokens_per_second"] for one in PROMPTS]) for kind in KINDS}
    return rows, [note], line_plot(curves, "prompt", "tokens per second, one thread", logarithmic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--longest", type=int, default=32_768, help="positions of the longest pass")
    parser.add_argument("--only", choices=("operators", "generation"), help="one half instead of both")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    use_threads(options.threads)
    experiment = Experiment("speed", options.output, {"longest": options.longest, "threads": options.threads})
    rows, notes, picture = [], [], None
    if options.only != "operators":
        rows, notes, picture = generation_rows(experiment)
    if options.only != "generation":
        of_operators, noted, picture = operator_rows(experiment, options.longest)
        rows, notes = [*of_operators, *rows], [*noted, *notes]
    experiment.write(["what", "length", "scan or selective", "attention", "ratio"], rows, picture, notes)


if __name__ == "__main__":
    main()
