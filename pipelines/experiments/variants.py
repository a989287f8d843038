"""Variants of a block at equal compute, on yeast DNA and spoken digits (arXiv 2312.00752, tables 5, 8 and 10).

python pipelines/experiments/variants.py --yeasts DIR --digits DIR --output results/variants --seeds 0 1

Small causal models that differ in one thing: real or complex states of as many numbers, the size of the state, the
initial state matrix, and, for digits, S4D around selective layers or the reverse. Every model takes as many steps on
the same sequences. DNA: two layers of width 64 on S288C without chromosome VII, on which they are tested. Digits: the
U-Net of the waveform models with one layer at each of three depths, 8-bit mu-law at 8 kHz; takes 5 to 9 of every
speaker are tested, clips are joined end to end.

A difference is that from the first row, over the same test windows and the same seeds, whose means are shown; its
interval is over windows, so it does not hold what another seed of the training would change. The last two columns show
that: the least and the largest difference of a seed. A run that was stopped continues after the last finished model.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import Experiment
from torch import Tensor, nn
from torch.nn import functional as F

from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import read_waveform
from audiomamba.models.configuration import StageConfig, WaveformModelConfig
from audiomamba.models.waveform_model import WaveformModel
from genomamba.io.fasta import read_records
from genomamba.tokenizer import VOCABULARY
from mambacore.errors import InputError
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig
from mambapipelines.console import use_threads

GENOME, TEST_CHROMOSOME = "cerevisiae.S288C.fa.gz", "chrVII"
TEST_TAKES = range(5, 10)
WIDTH, LAYERS = 64, 2  # of the models of DNA
AUDIO_WIDTH, RATE_HZ = 24, 8_000
WINDOW = {"dna": 2_048, "digits": 4_000}
WINDOWS_PER_STEP = 2
TEST_WINDOWS = 64
WARMUP_STEPS = 20
LEARNING_RATE = {"dna": 3e-3, "digits": 6e-3}

S4D = {"name": "s4d", "state_size": 16}
BASELINE: Mapping[str, Any] = {"name": "selective", "state_size": 16}
MIXERS: dict[str, Mapping[str, Any]] = {
    "real, 16 states": BASELINE,
    "complex, 8 states": {"name": "selective", "state_size": 8, "complex_state": True},
    "1 state": {"name": "selective", "state_size": 1},
    "2 states": {"name": "selective", "state_size": 2},
    "4 states": {"name": "selective", "state_size": 4},
    "8 states": {"name": "selective", "state_size": 8},
    "real, constant start": {**BASELINE, "state_matrix": "constant"},
    "real, random start": {**BASELINE, "state_matrix": "random"},
    "complex, S4D-Inv start": {
        "name": "selective",
        "state_size": 8,
        "complex_state": True,
        "state_matrix": "s4d-inv",
    },
    "S4D": S4D,
}
# Outer two depths and centre, of the digits alone.
PLACES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "S4D outside, selective inside": (S4D, BASELINE),
    "selective outside, S4D inside": (BASELINE, S4D),
}
FIRST = next(iter(MIXERS))


def dna_model(name: str) -> nn.Module:
    """A language model of bases."""
    return CausalLanguageModel(CausalLanguageModelConfig(len(VOCABULARY), WIDTH, (MIXERS[name],) * LAYERS))


def digits_model(name: str) -> nn.Module:
    """A waveform model with one layer at each depth."""
    outer, centre = PLACES[name] if name in PLACES else (MIXERS[name],) * 2
    stages = (StageConfig(1, outer), StageConfig(1, outer), StageConfig(1, centre))
    quantiser = Quantiser(sample_rate_hz=RATE_HZ)
    return WaveformModel(WaveformModelConfig(stages, model_width=AUDIO_WIDTH, quantiser=quantiser))


def dna_tokens(folder: Path) -> tuple[Tensor, Tensor]:
    """Training chromosomes end to end, and the test chromosome."""
    records = {record.name: record.tokens for record in read_records(folder / GENOME)}
    if TEST_CHROMOSOME not in records:
        raise InputError(f"{folder / GENOME} has no record {TEST_CHROMOSOME}: give the folder of the yeasts.")
    training = np.concatenate([tokens for name, tokens in records.items() if name != TEST_CHROMOSOME])
    return torch.from_numpy(training), torch.from_numpy(records[TEST_CHROMOSOME].copy())


def digits_tokens(folder: Path) -> tuple[Tensor, Tensor]:
    """Classes of the training clips end to end, and of the test clips."""
    quantiser, parts = Quantiser(sample_rate_hz=RATE_HZ), {False: [], True: []}  # type: ignore[var-annotated]
    for path in sorted(folder.glob("*_*_*.wav")):
        take = int(path.stem.rpartition("_")[2])
        parts[take in TEST_TAKES].append(quantiser.encode(read_waveform(path, RATE_HZ).samples))
    if not all(parts.values()):
        raise InputError(f"{folder} holds no clips DIGIT_SPEAKER_TAKE.wav, or none of takes 5 to 9.")
    return torch.cat(parts[False]), torch.cat(parts[True])


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of sequence.

    Attributes:
        tokens: training and test sequence of a folder.
        model: a new model by the name of its variant.
        variants: names, the first of which the others are compared with.
        unit: of the loss, and nats per unit.
    """

    tokens: Callable[[Path], tuple[Tensor, Tensor]]
    model: Callable[[str], nn.Module]
    variants: tuple[str, ...]
    unit: str
    nats: float


TASKS = {
    "dna": Task(dna_tokens, dna_model, tuple(MIXERS), "nats per base", 1.0),
    "digits": Task(digits_tokens, digits_model, (*MIXERS, *PLACES), "bits per sample", math.log(2)),
}


def windows_at(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """(starts, length + 1) tokens, int64."""
    return tokens[starts.unsqueeze(1) + torch.arange(length + 1)].long()


def losses_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss in nats of each window."""
    logits = model(windows[:, :-1])[0]
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


def measure(task_name: str, name: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant and return the loss of every test window, in the task's unit."""
    task, length = TASKS[task_name], WINDOW[task_name]
    training, test = task.tokens(folder)
    torch.manual_seed(seed)
    model = task.model(name)
    rate = LEARNING_RATE[task_name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.05 + 0.95 * (1 + math.cos(math.pi * step / options.steps)) / 2),
    )
    for step in range(options.steps):
        random = np.random.default_rng([seed, step])
        starts = torch.from_numpy(random.integers(len(training) - length - 1, size=WINDOWS_PER_STEP))
        loss = losses_of(model, windows_at(training, starts, length)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    starts = torch.linspace(0, len(test) - length - 1, TEST_WINDOWS).long()
    with torch.inference_mode():
        losses = torch.cat([losses_of(model, windows_at(test, some, length)) for some in starts.split(4)])
    print(f"{task_name}, {name}, seed {seed}: {losses.mean() / task.nats:.4f} {task.unit}", flush=True)
    return {
        "losses": (losses / task.nats).tolist(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yeasts", type=Path, metavar="DIR", help="folder of the yeasts; DNA is left out without it")
    parser.add_argument("--digits", type=Path, metavar="DIR", help="folder of the digits; left out without it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    known = [*MIXERS, *PLACES]
    parser.add_argument("--digits-variants", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--steps", type=int, default=200, help="of each model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    use_threads(options.threads)
    names = ("steps", "threads")
    experiment = Experiment("variants", options.output, {name: getattr(options, name) for name in names})
    rows = []
    for task_name, folder in (("dna", options.yeasts), ("digits", options.digits)):
        if folder is None:
            continue
        task = TASKS[task_name]
        chosen = [name for name in task.variants if task_name == "dna" or name in (FIRST, *options.digits_variants)]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        # Seed by seed, so that a run that was stopped has compared all variants.
        for seed in options.seeds:
            for name in chosen:
                part = experiment.part(
                    f"{task_name}-{task.variants.index(name):02}-{seed}",
                    lambda task_name=task_name, name=name, seed=seed, folder=folder: measure(  # type: ignore[misc]
                        task_name, name, seed, folder, options
                    ),
                )
                found[name].append(part)
        base = np.array([part["losses"] for part in found[FIRST]])  # (seeds, windows)
        for name, parts in found.items():
            losses = np.array([part["losses"] for part in parts])
            row = [f"{task_name}, {task.unit}", name, f"{parts[0]['parameters']:,}", f"{losses.mean():.4f}"]
            if name == FIRST:
                rows.append([*row, "", "", "", f"{losses.mean(1).min():.4f}", f"{losses.mean(1).max():.4f}"])
                continue
            differences = losses - base
            windows, seeds = differences.mean(0), differences.mean(1)
            half = 1.96 * windows.std(ddof=1) / len(windows) ** 0.5
            shown = (windows.mean(), windows.mean() - half, windows.mean() + half, seeds.min(), seeds.max())
            rows.append([*row, *(f"{value:+.4f}" for value in shown)])
    if not rows:
        parser.error("give --yeasts, --digits or both")
    header = ["task", "variant", "parameters", "loss", "difference from the first row", "low", "high"]
    header += ["least of a seed", "largest of a seed"]
    experiment.write(header, rows, None)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"variants.py: {error}") from error
