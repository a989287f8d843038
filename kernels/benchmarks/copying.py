"""Train a stack on the copy task: read symbols, then say them again in order.

python kernels/benchmarks/copying.py
python kernels/benchmarks/copying.py --config my.yaml
python kernels/benchmarks/copying.py --mixers selective s4d attention linear_attention retention rwkv gru

A row is `length` positions with `symbols` symbols among blanks, then as many positions that ask for them; only these
count. With `selective: false` the symbols come first and blanks follow; with `selective: true` they are scattered,
so that a model must tell what to remember. A row is a function of the seed and its number.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.benchmarking import machine, print_table
from mambacore.errors import InputError
from mambacore.layers import MIXERS, ResidualStack
from mambacore.layers.configuration import layer_descriptions

CONFIGURATION = Path(__file__).with_name("copying.yaml")
EVALUATION_ROWS = 512


def copying_rows(task: Mapping[str, Any], rows: int, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """Tokens (rows, length + symbols) and what is to be said at the last positions (rows, symbols).

    Symbols are numbered from 0; ``kinds`` is the blank, ``kinds + 1`` asks for a symbol.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
    kinds, count, length = task["kinds"], task["symbols"], task["length"]
    symbols = torch.randint(kinds, (rows, count), generator=generator)
    tokens = torch.full((rows, length + count), kinds)
    tokens[:, length:] = kinds + 1
    if task["selective"]:
        places = torch.rand(rows, length, generator=generator).argsort(1)[:, :count].sort(1).values
    else:
        places = torch.arange(count).expand(rows, -1)
    return tokens.scatter(1, places, symbols), symbols


class CopyingModel(nn.Module):
    """Embedding, stack and a choice of a symbol at every position."""

    def __init__(self, task: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task["kinds"] + 2, model["width"])
        self.stack = ResidualStack(model["width"], layer_descriptions(model["mixer"], model["layers"], {}))
        self.head = nn.Linear(model["width"], task["kinds"])

    def forward(self, tokens: Tensor, asked: int) -> Tensor:
        """Logits (batch, asked, kinds) at the last ``asked`` positions of (batch, length) tokens."""
        hidden, _ = self.stack(self.embedding(tokens))
        return self.head(hidden[:, -asked:])


def train(configuration: Mapping[str, Any]) -> tuple[float, float, float]:
    """First loss in nats, accuracy on new rows in the end, and seconds per step."""
    task, training = configuration["task"], configuration["training"]
    torch.manual_seed(training["seed"])
    model = CopyingModel(task, configuration["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=training["learning_rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training["learning_rate"], total_steps=training["steps"], pct_start=0.1
    )
    first_loss, begin = float("nan"), time.perf_counter()
    for step in range(training["steps"]):
        tokens, symbols = copying_rows(task, training["batch"], training["seed"], (step + 1) * EVALUATION_ROWS)
        loss = F.cross_entropy(model(tokens, task["symbols"]).flatten(0, 1), symbols.flatten())
        first_loss = float(loss.detach()) if step == 0 else first_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = (time.perf_counter() - begin) / training["steps"]
    tokens, symbols = copying_rows(task, EVALUATION_ROWS, training["seed"], 0)
    with torch.no_grad():
        said = model(tokens, task["symbols"]).argmax(-1)
    return first_loss, float((said == symbols).float().mean()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGURATION)
    parser.add_argument("--mixers", nargs="+", help="train one model with each instead of the configuration's")
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    parser.add_argument("--threads", type=int, default=1, help="default: 1, the fastest for such small tensors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    configuration = yaml.safe_load(options.config.read_text())
    if options.steps:
        configuration["training"]["steps"] = options.steps
    chance = 1 / configuration["task"]["kinds"]
    print(f"Copying, {configuration['task']}, {configuration['training']}, chance {chance:.3f}\n{machine()}\n")
    rows = []
    for mixer in options.mixers or [configuration["model"]["mixer"]]:
        model = configuration["model"] | {"mixer": mixer}
        _, accuracy, seconds = train(configuration | {"model": model})
        rows.append([str(mixer), f"{accuracy:.3f}", f"{seconds * 1e3:.0f}"])
        print(f"{mixer}: {accuracy:.3f}", flush=True)
    print()
    print_table(["mixer", "accuracy", "ms / step"], rows)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        raise SystemExit(f"copying.py: {error}; mixers are {', '.join(sorted(MIXERS))}") from error
