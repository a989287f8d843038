"""Job 3 of the demo: one exact optimiser step on one sequence of 1,048,576 bases, in the memory of one piece.

python demo/pretrain_at_a_million.py [--length BP]   prints the figures as JSON; a process of its own, whose memory is
the step's
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genomamba.io.sources import read_sequences
from genomamba.models.language_model import load_language_model
from genomamba.scoring.likelihood import is_base
from mambacore.benchmarking import memory_bytes
from mambacore.longsequence import TokenCrossEntropy, backward_in_pieces, next_token_targets
from mambapipelines.console import use_threads
from mambapipelines.pages.html import Section, Table

CONTIGS = Path(__file__).with_name("contigs.fa.gz")
MODEL, RECORD = "shipped://yeast-lm", "cerevisiae_long"
LENGTH_BP, PIECE_BP, SCORED_BP = 1_048_576, 4_096, 16_384
LEARNING_RATE = 1e-4
# Positions on which what an ordinary backward pass keeps is counted; it grows in proportion to the length.
COUNTED_BP = 4_096


def pretrain_at_a_million(threads: int | None, length: int = LENGTH_BP) -> Section:
    """Memory and time of the step, and the loss before and after it."""
    command = [sys.executable, __file__, "--length", str(length)]
    command += [] if threads is None else ["--threads", str(threads)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(finished.stdout.splitlines()[-1])
    rows = [
        ["in pieces of " + f"{PIECE_BP:,}", f"{found['seconds']:.0f}", f"{found['bytes'] / 1e9:.2f}", "measured"],
        ["whole sequence at once", "", f"{found['whole_bytes'] / 1e9:.1f}", f"counted on {COUNTED_BP:,} bases"],
    ]
    text = (
        f"The shipped causal model `yeast-lm` ({found['parameters']:,} parameters) takes one step of AdamW on the "
        f"first {length:,} bases of chromosome VII of S288C, which it was not trained on. The gradient is that of the "
        "whole sequence, no state is cut off: pieces are run forward, then backward from the last to the first, and "
        f"the gradient of the state is handed on. Loss {found['before']:.4f} nats per base before the step and "
        f"{found['after']:.4f} after it (perplexity {np.exp(found['before']):.3f} and {np.exp(found['after']):.3f})."
    )
    return Section(
        "Pretrain: one exact step at a million bases",
        [
            text,
            Table(["backward pass", "seconds", "GB above the model", "how"], rows),
            "The same on your own genome: genomamba pretrain --reference genome.fa --length 1048576 --output model",
        ],
    )


def take_step(length: int) -> dict[str, Any]:
    """One step on the first `length` bases: seconds, bytes, and the loss in nats per base before and after."""
    language_model = load_language_model(MODEL)
    model = language_model.model
    record = next(one for one in read_sequences(str(CONTIGS)) if one.name == RECORD)
    tokens = torch.from_numpy(record.tokens[:length].astype(np.int64))[None]
    targets = next_token_targets(tokens)
    targets[:, :-1][~is_base(tokens[:, 1:])] = -100
    whole = _kept_bytes(model, tokens[:, :COUNTED_BP], targets[:, :COUNTED_BP]) * length / COUNTED_BP
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    resident, begin = memory_bytes("VmRSS"), time.perf_counter()
    before = float(backward_in_pieces(model, tokens, TokenCrossEntropy(targets), piece_length=PIECE_BP).loss)
    optimizer.step()
    seconds, highest = time.perf_counter() - begin, memory_bytes("VmHWM")
    model.eval()
    after = mean_loss(model, tokens, targets)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "bytes": highest - resident,
        "whole_bytes": whole,
        "before": before,
        "after": after,
    }


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> float:
    """The loss of the step, forward only, in nats per base."""
    loss, state, total = TokenCrossEntropy(targets), None, 0.0
    for begin in range(0, tokens.shape[1], SCORED_BP):
        positions = slice(begin, min(begin + SCORED_BP, tokens.shape[1]))
        logits, state = model(tokens[:, positions], state)
        total += float(loss(logits, positions))
    return total


def _kept_bytes(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> int:
    """Bytes of all tensors that an ordinary backward pass over these tokens would keep, the parameters left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = []  # so that no storage is freed and counted under the same address twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TokenCrossEntropy(targets)(model(tokens)[0], slice(0, tokens.shape[1]))
    return sum(kept.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=LENGTH_BP)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    use_threads(options.threads)
    print(json.dumps(take_step(options.length)))
