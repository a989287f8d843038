"""Selective, Mamba-2 and Mamba-3 layers beside each other: on DNA, on audio, on parity, and at 1,048,576 positions.

python pipelines/experiments/mixers.py --output results/mixers --yeasts DIR --digits DIR
python pipelines/experiments/mixers.py --output results/mixers --tasks parity million

DNA: next-base perplexity on chromosome VII of S288C, of models trained on windows of the other chromosomes. Audio: bits
per sample of held-out takes of spoken digits, of U-Nets. Models of a task have the same width and layers; the number of
states is chosen so that the number of parameters is nearest to that of the selective model. The learning rate stays
constant after a short warm-up and the averaged weights are tested, so that one training gives both figures: that after
equal steps and that after equal processor time. Intervals are over blocks of bases or over clips, and those of
differences over the same blocks or clips.

Parity: after every bit of a random sequence, whether the number of ones so far is odd (Mamba-3, arXiv 2603.15569). A
state that only decays cannot count modulo two; one that rotates can. Trained on up to 64 bits, tested on up to 16,384.

Million: processor time and memory of a forward pass at once and of an exact training step in pieces at 1,048,576
positions, each in a process of its own.

A run that was stopped continues after the last finished training.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import Experiment, line_plot, wilson_interval
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from audiomamba.data.clips import ClipCollection, ClipSampler, read_clips
from audiomamba.data.quantisers import Quantiser
from audiomamba.metrics.likelihood import collection_likelihoods
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig
from genomamba.io.fasta import read_records
from genomamba.models.language_model import BASE_COUNT, FIRST_BASE_TOKEN
from mambacore.benchmarking import memory_bytes
from mambacore.errors import InputError
from mambacore.longsequence import backward_in_pieces, next_token_cross_entropy
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig
from mambapipelines.console import use_threads

TASKS = ("parity", "dna", "audio", "million")
REFERENCE = "selective"
MIXERS: Mapping[str, dict[str, Any]] = {
    "selective": {"name": "selective"},
    "mamba2": {"name": "mamba2"},
    "mamba3": {"name": "mamba3"},
}
PARITY_MIXERS: Mapping[str, dict[str, Any]] = {
    "selective": {"name": "selective"},
    "selective, complex": {"name": "selective", "complex_state": True},
    "mamba2": {"name": "mamba2"},
    "mamba3 without rotation": {"name": "mamba3", "rotated_share": 0.0},
    "mamba3": {"name": "mamba3"},
}
STATE_SIZES = range(8, 129, 8)
WARMUP_STEPS, AVERAGE_DECAY = 50, 0.99

BASES, DNA_WIDTH, DNA_LAYERS = BASE_COUNT, 64, 4
DNA_WINDOW, DNA_WINDOWS = 1_024, 4
TEST_CHROMOSOME, TEST_STRAIN, TEST_BASES, TEST_WINDOW = "chrVII", "cerevisiae.S288C", 262_144, 8_192

AUDIO_WIDTH, AUDIO_LAYERS, AUDIO_POOLING = 32, 2, (4, 4)
AUDIO_CLIP, TEST_TAKES, TEST_CLIPS = 8_000, range(40, 50), 50

PARITY_WIDTH, PARITY_STATES, PARITY_LAYERS = 32, 16, 1
PARITY_POSITIONS, PARITY_BITS, PARITY_SHORTEST, PARITY_LENGTHS = 1_024, 64, 4, (64, 128, 256, 1_024, 4_096, 16_384)
PARITY_TEST_POSITIONS, PARITY_MARK = 65_536, 2
# The step size that all mixers begin with: with the usual 0.001 to 0.1, a state turns by a few degrees per position.
PARITY_FIRST_STEP = 1.0
# Mean loss of so many steps, in nats, at which a length counts as learned, and at which the last one ends the training.
LOSSES_AVERAGED, LEARNED_LOSS, ENOUGH_LOSS = 50, 0.05, 0.005

MILLION, MILLION_WIDTH, MILLION_LAYERS, MILLION_PIECE = 2**20, 64, 2, 16_384


def parameters_of(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def with_equal_parameters(build: Callable[[dict[str, Any]], nn.Module], mixer: Mapping[str, Any]) -> dict[str, Any]:
    """The mixer with the number of states that brings a model nearest to the parameters of the selective one."""
    if mixer["name"] == REFERENCE:
        return dict(mixer)
    wanted = parameters_of(build(dict(MIXERS[REFERENCE])))
    choices = [{**mixer, "state_size": size} for size in STATE_SIZES]
    return min(choices, key=lambda one: abs(parameters_of(build(one)) - wanted))


# ---- DNA ----


def dna_model(mixer: dict[str, Any]) -> CausalLanguageModel:
    return CausalLanguageModel(CausalLanguageModelConfig(BASES, DNA_WIDTH, (mixer,) * DNA_LAYERS, tied_head=False))


@cache
def chromosomes(yeasts: Path) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The chromosomes to train on and the bases to test on, without letters that are not bases."""
    training, test = [], None
    for source in sorted(yeasts.glob("*.fa.gz")):
        for record in read_records(str(source)):
            numbers = record.tokens.astype(np.int64) - FIRST_BASE_TOKEN
            bases = numbers[(numbers >= 0) & (numbers < BASES)].astype(np.uint8)
            if record.name != TEST_CHROMOSOME:
                training.append(bases)
            elif source.name.startswith(TEST_STRAIN):
                test = bases[:TEST_BASES]
    if not training or test is None:
        raise InputError(f"{yeasts} lacks {TEST_STRAIN}.fa.gz or other assemblies: name the folder with the yeasts.")
    return tuple(training), test


def dna_loss(model: nn.Module, step: int, options: argparse.Namespace) -> Tensor:
    """Mean loss of random windows, a function of the seed and the step."""
    sequences, _ = chromosomes(options.yeasts)
    lengths = np.array([len(one) for one in sequences], dtype=np.float64)
    random = np.random.default_rng([options.seed, step])
    windows = []
    for number in random.choice(len(sequences), size=DNA_WINDOWS, p=lengths / lengths.sum()):
        begin = random.integers(len(sequences[number]) - DNA_WINDOW)
        windows.append(sequences[number][begin : begin + DNA_WINDOW + 1])
    tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
    return F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())


def dna_test(model: nn.Module, options: argparse.Namespace) -> list[float]:
    """Mean loss of each test window, nats per base."""
    tokens = torch.from_numpy(chromosomes(options.yeasts)[1].astype(np.int64)).view(-1, TEST_WINDOW)
    logits = (model(row[None, :-1])[0] for row in tokens)
    return [float(F.cross_entropy(one[0].float(), row[1:])) for one, row in zip(logits, tokens, strict=True)]


# ---- audio ----


def audio_model(mixer: dict[str, Any]) -> WaveformModel:
    stages = (StageConfig(AUDIO_LAYERS, mixer),) * (len(AUDIO_POOLING) + 1)
    return WaveformModel(
        WaveformModelConfig(
            stages, AUDIO_WIDTH, AUDIO_POOLING, quantiser=Quantiser(scheme="mu-law", bits=8, sample_rate_hz=8_000)
        )
    )


@cache
def clips(digits: Path) -> tuple[ClipCollection, ClipCollection]:
    """The clips to train on and those to test on: the same speakers, other takes."""
    quantiser = audio_model(dict(MIXERS[REFERENCE])).config.quantiser
    parts: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(digits.glob("*_*_*.wav")):
        parts[int(path.stem.split("_")[2]) in TEST_TAKES].append(path)
    if not all(parts):
        raise InputError(f"{digits} lacks clips DIGIT_SPEAKER_TAKE.wav: name the folder of the spoken digits.")
    spread = parts[1][:: len(parts[1]) // TEST_CLIPS][:TEST_CLIPS]
    training, test = (read_clips(paths, quantiser, folder=digits) for paths in (parts[0], spread))
    return training, test


@cache
def audio_sampler(digits: Path, seed: int) -> ClipSampler:
    return ClipSampler(clips(digits)[0], AUDIO_CLIP, seed)


def audio_loss(model: nn.Module, step: int, options: argparse.Namespace) -> Tensor:
    assert isinstance(model, WaveformModel)
    example = audio_sampler(options.digits, options.seed).sample_batch(step, 1).without_common_padding()
    total, count, _ = model.loss(example.inputs, example.targets)
    return total / count


def audio_test(model: nn.Module, options: argparse.Namespace) -> list[float]:
    """Nats per sample of each test clip."""
    assert isinstance(model, WaveformModel)
    found = collection_likelihoods(model, clips(options.digits)[1], AUDIO_CLIP)
    return [one.nats / one.samples for one in found.values()]


# ---- training ----


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int, argparse.Namespace], Tensor],
    test: Callable[[nn.Module, argparse.Namespace], list[float]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train until both steps and processor time of the options are used up; test the averaged weights at each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE_DECAY)
    )
    found: dict[str, Any] = {}
    spent, step = 0.0, 0
    while "steps" not in found or "time" not in found:
        begin = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = loss_of(model, step, options)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        spent, step = spent + time.process_time() - begin, step + 1
        reached = {"steps": step >= options.steps, "time": spent >= options.seconds}
        for which, whether in reached.items():
            if whether and which not in found:
                averaged.eval()
                with torch.inference_mode():
                    found[which] = {"losses": test(averaged.module, options), "steps": step, "training_seconds": spent}
                print(f"  {which}: step {step}, {spent:.0f} s, {np.mean(found[which]['losses']):.4f}", flush=True)
    return found


TRAINED: Mapping[str, tuple[Callable[..., nn.Module], Callable[..., Tensor], Callable[..., list[float]]]] = {
    "dna": (dna_model, dna_loss, dna_test),
    "audio": (audio_model, audio_loss, audio_test),
}


def measure(task: str, mixer: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model of one task."""
    build, loss_of, test = TRAINED[task]
    chosen = with_equal_parameters(build, MIXERS[mixer])
    torch.manual_seed(seed)
    model = build(chosen)
    print(f"{task}, {mixer}, seed {seed}: {chosen}, {parameters_of(model):,} parameters", flush=True)
    settings = argparse.Namespace(**{**vars(options), "seed": seed})
    return {"mixer": chosen, "parameters": parameters_of(model), **train(model, loss_of, test, settings)}


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t)."""
    array = np.asarray(values)
    return float(array.mean()), float(stats.sem(array) * stats.t.ppf(0.975, len(array) - 1))


def rows_of_task(task: str, found: Mapping[tuple[str, int], dict[str, Any]]) -> list[list[object]]:
    """Rows of the table: the mean over seeds, with intervals over blocks or clips, and the difference to selective."""
    rows: list[list[object]] = []
    seeds = sorted({seed for _, seed in found})
    for which in ("steps", "time"):
        # Losses of a block are averaged over the seeds first: blocks are the independent samples.
        losses = {
            mixer: np.mean([found[mixer, seed][which]["losses"] for seed in seeds], axis=0)
            for mixer in dict.fromkeys(mixer for mixer, _ in found)
        }
        for mixer, values in losses.items():
            first = found[mixer, seeds[0]]
            mean, half = mean_interval(values)
            if task == "dna":
                figure, low, high = (f"{math.exp(value):.4f}" for value in (mean, mean - half, mean + half))
            else:
                figure, low, high = (f"{value / math.log(2):.4f}" for value in (mean, mean - half, mean + half))
            of_seeds = [np.mean(found[mixer, seed][which]["losses"]) for seed in seeds]
            spread = max(of_seeds) - min(of_seeds)
            difference, width = mean_interval(values - losses[REFERENCE])
            seconds = np.mean([found[mixer, seed][which]["training_seconds"] for seed in seeds])
            steps = np.mean([found[mixer, seed][which]["steps"] for seed in seeds])
            rows.append(
                [
                    {"dna": "yeast, perplexity per base", "audio": "digits, bits per sample"}[task],
                    f"equal {which}",
                    mixer,
                    first["mixer"].get("state_size", "default"),
                    first["parameters"],
                    f"{steps:,.0f}",
                    f"{seconds:.0f}",
                    figure,
                    f"{low} to {high}",
                    "" if mixer == REFERENCE else f"{1000 * difference:+.1f} +- {1000 * width:.1f}",
                    f"{1000 * spread:.1f}",
                ]
            )
    return rows


# ---- parity ----


def bits(length: int, rows: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A mark and random bits, (rows, 1 + length), and the parity after each of these.

    Without the mark a rotating state has nothing to be compared with: only differences of angles can be seen.
    """
    found = torch.from_numpy(np.random.default_rng(list(seed)).integers(2, size=(rows, length)))
    return F.pad(found, (1, 0), value=PARITY_MARK), F.pad(found.cumsum(1) % 2, (1, 0))


def parity(mixer: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train on sequences whose length doubles whenever it is learned; test on longer ones."""
    torch.manual_seed(seed)
    layer = {**PARITY_MIXERS[mixer], "state_size": PARITY_STATES}
    model = CausalLanguageModel(
        CausalLanguageModelConfig(PARITY_MARK + 1, PARITY_WIDTH, (layer,) * PARITY_LAYERS, tied_head=False)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("step_bias"):
            nn.init.constant_(parameter, math.log(math.expm1(PARITY_FIRST_STEP)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.parity_learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    losses: deque[float] = deque(maxlen=LOSSES_AVERAGED)
    length, step = PARITY_SHORTEST, 0
    for step in range(1, options.parity_steps + 1):
        tokens, answers = bits(length, PARITY_POSITIONS // length, (seed, 0, step))
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) < LOSSES_AVERAGED or np.mean(losses) > (LEARNED_LOSS if length < PARITY_BITS else ENOUGH_LOSS):
            continue
        if length == PARITY_BITS:
            break
        length *= 2
        losses.clear()
    result: dict[str, Any] = {
        "parameters": parameters_of(model),
        "loss": float(np.mean(losses)),
        "length": length,
        "steps": step,
        "correct": {},
        "sequences": {},
    }
    model.eval()
    for tested in PARITY_LENGTHS:
        rows = max(4, PARITY_TEST_POSITIONS // tested)
        tokens, answers = bits(tested, rows, (seed, 1, tested))
        with torch.inference_mode():
            found = model(tokens)[0].argmax(-1)
        # Of the last bit of each sequence, which are independent.
        result["correct"][str(tested)] = int((found[:, -1] == answers[:, -1]).sum())
        result["sequences"][str(tested)] = rows
    print(
        f"parity, {mixer}, seed {seed}: step {step}, {length} bits, loss {result['loss']:.4f}, {result['correct']}",
        flush=True,
    )
    return result


# ---- a million positions ----


def million(case: str, mixer: str) -> dict[str, Any]:
    """Processor time, and memory above that before it, of one pass at 1,048,576 positions."""
    torch.manual_seed(0)
    layer = {**MIXERS[mixer]}
    model = CausalLanguageModel(
        CausalLanguageModelConfig(BASES, MILLION_WIDTH, (layer,) * MILLION_LAYERS, tied_head=False)
    )
    tokens = torch.randint(BASES, (1, MILLION))
    before, begin = memory_bytes("VmRSS"), time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        if case == "forward":
            with torch.inference_mode():
                model(tokens)
        else:
            optimizer = torch.optim.AdamW(model.parameters())
            backward_in_pieces(model, tokens, next_token_cross_entropy(tokens), piece_length=MILLION_PIECE)
            optimizer.step()
    return {
        "training_seconds": time.process_time() - begin,
        "bytes": memory_bytes("VmHWM") - before,
        "parameters": parameters_of(model),
    }


def million_in_process(case: str, mixer: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, whose peak of memory is that of the pass."""
    command = [sys.executable, __file__, "--output", str(options.output), "--case", case, mixer]
    finished = subprocess.run(
        [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise InputError(f"{case} of {mixer} at {MILLION} positions failed: {finished.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    print(f"million, {case}, {mixer}: {result}", flush=True)
    return result


# ---- all ----


def tables(experiment: Experiment, options: argparse.Namespace) -> None:
    """Run what is not finished yet, and write one table per kind of figure."""
    wide = ["task", "at", "mixer", "states", "parameters", "steps", "processor s", "figure", "95 % interval"]
    header = [*wide, "difference to selective, thousandths of a nat", "seeds' spread, thousandths of a nat"]
    rows: list[list[object]] = []
    for task in [one for one in TRAINED if one in options.tasks]:
        found = {
            (mixer, seed): experiment.part(
                f"{task}-{mixer}-{seed}", lambda task=task, mixer=mixer, seed=seed: measure(task, mixer, seed, options)
            )
            for seed in options.seeds
            for mixer in MIXERS
        }
        rows += rows_of_task(task, found)
    blank = [""] * 2
    if "million" in options.tasks:
        for case in ("forward", "step"):
            for mixer in MIXERS:
                result = experiment.part(
                    f"million-{case}-{mixer}", lambda case=case, mixer=mixer: million_in_process(case, mixer, options)
                )
                what = {"forward": "a forward pass", "step": "an exact training step"}[case]
                gigabytes = f"{result['bytes'] / 2**30:.2f} GiB"
                rows.append(
                    [what, f"{MILLION:,} positions", mixer, "default", result["parameters"], 1,
                     f"{result['training_seconds']:.0f}", gigabytes, "", *blank]
                )  # fmt: skip
    curves = {}
    if "parity" in options.tasks:
        for mixer in PARITY_MIXERS:
            results = [
                experiment.part(f"parity-{mixer}-{seed}", lambda mixer=mixer, seed=seed: parity(mixer, seed, options))
                for seed in options.seeds
            ]
            shares = []
            for length in PARITY_LENGTHS:
                correct, sequences = (sum(one[key][str(length)] for one in results) for key in ("correct", "sequences"))
                low, high = (f"{100 * bound:.1f}" for bound in wilson_interval(correct, sequences))
                shares.append(100 * correct / sequences)
                of_seeds = [100 * one["correct"][str(length)] / one["sequences"][str(length)] for one in results]
                seconds = np.mean([one["processor_seconds"] for one in results])
                rows.append(
                    ["parity, % of last bits", f"{length:,} bits", mixer, PARITY_STATES, results[0]["parameters"],
                     max(one["steps"] for one in results), f"{seconds:.0f}", f"{shares[-1]:.1f}", f"{low} to {high}",
                     "", ", ".join(f"{one:.0f} %" for one in of_seeds)]
                )  # fmt: skip
            curves[mixer] = (PARITY_LENGTHS, shares)
    picture = line_plot(curves, f"bits (trained on up to {PARITY_BITS})", "accuracy (%)") if curves else None
    if picture is not None:
        picture.axes[0].axvline(PARITY_BITS, color="0.6", linestyle="--", linewidth=1)
        picture.axes[0].axhline(50, color="0.8", linewidth=1)
    experiment.write(header, rows, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--yeasts", type=Path, metavar="DIR", help="folder of the yeasts' assemblies, for dna")
    parser.add_argument("--digits", type=Path, metavar="DIR", help="folder of the spoken digits, for audio")
    parser.add_argument("--steps", type=int, default=300, help="at which models are compared")
    parser.add_argument("--seconds", type=float, default=30.0, help="of processor time at which they are compared")
    parser.add_argument("--parity-steps", type=int, default=2000)
    parser.add_argument("--parity-learning-rate", type=float, default=5e-3)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    use_threads(options.threads)
    if options.case is not None:
        print(json.dumps(million(*options.case)))
        return
    for task, folder in (("dna", "yeasts"), ("audio", "digits")):
        if task in options.tasks and getattr(options, folder) is None:
            raise InputError(f"the task {task} needs --{folder}: name the folder with its data, or choose --tasks.")
    names = ("steps", "seconds", "parity_steps", "parity_learning_rate", "learning_rate", "precision", "threads")
    tables(Experiment("mixers", options.output, {name: getattr(options, name) for name in names}), options)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"mixers.py: {error}") from error
