"""One training step (AdamW) of a classifier on a whole sequence of 2^20 tokens, backpropagated in pieces.

    python kernels/benchmarks/longsequence.py --threads 2
    python kernels/benchmarks/longsequence.py --threads 2 --length 131072 --piece-lengths 1024 2048 4096 8192 16384

An embedding of 16 tokens, 8 selective layers (model width 128, state 16), mean pooling, 5 classes, batch 1, float32.
Each case is the first step of a process of its own: its memory is the highest resident size during the step above the
resident size before it, gradients and the optimizer's state included. A shorter sequence is also done by ordinary
backpropagation, and in float64 the gradients of both ways are compared.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

from mambacore.benchmarking import machine, memory_bytes, print_table
from mambacore.layers import ResidualStack
from mambacore.longsequence import PIECE_LENGTH, backward_at_once, backward_in_pieces, pooled_cross_entropy

VOCABULARY, MODEL_WIDTH, LAYERS, STATE_SIZE, CLASSES = 16, 128, 8, 16, 5
LABELS = torch.tensor([3])


class Model(nn.Module):
    """Embedding and stack; the head reads what is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, MODEL_WIDTH)
        self.stack = ResidualStack(MODEL_WIDTH, [{"name": "selective", "state_size": STATE_SIZE}] * LAYERS)
        self.head = nn.Linear(MODEL_WIDTH, CLASSES)

    def forward(self, tokens: Tensor, state=None):
        return self.stack(self.embedding(tokens), state)


def backpropagate(model: Model, tokens: Tensor, piece_length: int) -> None:
    """Leave the gradients in ``.grad``; at once when ``piece_length`` is 0."""
    loss = pooled_cross_entropy(LABELS, model.head, pooling="mean")
    if piece_length:
        backward_in_pieces(model, tokens, loss, piece_length=piece_length)
    else:
        backward_at_once(model, tokens, loss)


def step(length: int, piece_length: int) -> dict[str, float]:
    """Seconds and bytes of one optimizer step."""
    torch.manual_seed(0)
    model, tokens = Model(), torch.randint(VOCABULARY, (1, length))
    optimizer = torch.optim.AdamW(model.parameters())
    before, begin = memory_bytes("VmRSS"), time.perf_counter()
    backpropagate(model, tokens, piece_length)
    optimizer.step()
    return {"seconds": time.perf_counter() - begin, "bytes": memory_bytes("VmHWM") - before}


def gradient_difference(length: int, piece_length: int) -> dict[str, float]:
    """The largest difference of any parameter's gradient in float64, relative to that parameter's largest gradient."""
    torch.manual_seed(0)
    model, tokens = Model().double(), torch.randint(VOCABULARY, (1, length))
    backpropagate(model, tokens, 0)
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    backpropagate(model, tokens, piece_length)
    pairs = zip(model.parameters(), expected, strict=True)
    return {"difference": max(float((one.grad - two).abs().max() / two.abs().max()) for one, two in pairs)}


CASES = {"step": step, "difference": gradient_difference}


def run_in_process(case: str, length: int, piece_length: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", case, str(length), str(piece_length)]
    if options.threads:
        command += ["--threads", str(options.threads)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{case} at {length} failed: {finished.stderr.strip()}")
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2**20, help="tokens of the step in pieces")
    parser.add_argument("--whole-length", type=int, default=2**14, help="tokens of the comparison; 0 leaves it out")
    parser.add_argument("--piece-lengths", type=int, nargs="+", default=[PIECE_LENGTH])
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.case:
        case, length, piece_length = options.case
        print(json.dumps(CASES[case](int(length), int(piece_length))))
        return
    print(
        f"One step of {LAYERS} selective layers, width {MODEL_WIDTH}, state {STATE_SIZE}, mean pooling, "
        f"{CLASSES} classes, batch 1, float32\n{machine()}\n"
    )
    cases = [(options.length, piece_length) for piece_length in options.piece_lengths]
    if options.whole_length:
        cases += [(options.whole_length, piece_length) for piece_length in (*options.piece_lengths, 0)]
    rows = []
    for length, piece_length in cases:
        found = run_in_process("step", length, piece_length, options)
        rows.append(
            [
                str(length),
                str(piece_length) if piece_length else "at once",
                f"{found['seconds']:.1f}",
                f"{found['seconds'] / length * 1e6:.1f}",
                f"{found['bytes'] / 1e9:.3f}",
            ]
        )
    print_table(["length", "piece length", "seconds", "us/token", "GB above before"], rows)
    if options.whole_length:
        differences = [
            run_in_process("difference", options.whole_length, piece_length, options)["difference"]
            for piece_length in options.piece_lengths
        ]
        print(
            f"\nLargest relative difference of gradients at {options.whole_length} in float64, pieces of "
            f"{', '.join(map(str, options.piece_lengths))}: {', '.join(f'{number:.1e}' for number in differences)}"
        )


if __name__ == "__main__":
    main()
