"""Does a selective stack help that weighs the evidence of the Markov models base by base? (docs/experiments.md)

python pipelines/experiments/evidence_gate.py --genome a=a.fa.gz --genome b=b.fa.gz --tested-fold 4

The combination of a classifier's parts gives every order of the Markov models one coefficient per length. Here a stack
reads, at every base, how the classes' log-probabilities of each order lie (their mean and their spread, not which class
is which) and the base, and returns a weight for each order:

    evidence(c) = sum_t sum_k w_k (1 + gate_k(t)) (log P_k(t | c) - mean over the classes)

Being the same for all classes, it cannot memorise which class a stretch belongs to. It is trained on evidence of models
that were fitted without the stretch and its homologues (the folds of `part_fit`); one fold is tested. What `train`
would hold out is not used at all. `--stateless` replaces the stack by a network that sees one base's evidence only.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genomamba.baselines.words import BASES, FIRST_BASE_TOKEN
from genomamba.classification.combination import CountedWeights, PartWindows, fit_combination, fit_counted
from genomamba.classification.holdouts import fold_parts
from genomamba.classification.part_fit import BLOCK_BP, FOLDS, PartSettings, fit_counts, shared_strengths
from genomamba.classification.parts import CountedParts, word_ends
from genomamba.data.genomes import GenomeCollection, GenomeSpecification, load_genomes
from genomamba.data.windows import MAXIMUM_UNKNOWN_FRACTION
from genomamba.tokenizer import Tokens
from mambacore.layers import ResidualStack
from mambapipelines.console import note, use_threads
from mambapipelines.species.train import SpeciesTrainingOptions, hold_out

ORDERS: Final = (1, 3, 5, 7, 8, 9, 10)
PIECE_BP: Final = 4096
BLOCKS: Final = PIECE_BP // BLOCK_BP
TRAINED_LENGTHS_BP: Final = (256, 1024, 4096)
LENGTHS_BP: Final = (*TRAINED_LENGTHS_BP, 16_384, 65_536)
WIDTH, LAYERS, HIDDEN = 32, 2, 64
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.02, 20
PIECES_PER_STEP = 16
FIRST_WEIGHT = 0.15
MOST_WINDOWS, FITTED_PIECES = 6000, 800
CLUSTER_BP: Final = 65_536
"""Neighbouring windows are alike: standard errors are those of means over this many bases."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pieces:
    """Pieces of 4,096 bp with the evidence of models that were fitted without them.

    Attributes:
        evidence: (pieces, length, orders, classes) log-probabilities, averaged over both strands.
        tokens: (pieces, length).
        labels, folds, sequences: (pieces,).
        blocks: (pieces, blocks, parts, classes) evidence of all counted parts, summed over blocks of 256 bp.
        part_names: of the counted parts.
    """

    evidence: npt.NDArray[np.float16]
    tokens: Tokens
    labels: npt.NDArray[np.int64]
    folds: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.float32]
    part_names: tuple[str, ...]


class EvidenceGate(nn.Module):
    """A weight for every order at every base."""

    def __init__(self, orders: int, *, stateless: bool = False) -> None:
        """Start with the same weight everywhere."""
        super().__init__()
        self.inputs = nn.Linear(2 * orders + BASES + 1, WIDTH)
        self.stack = ResidualStack(WIDTH, ["selective"] * LAYERS) if not stateless else None
        layers = (nn.SiLU(), nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH)) if stateless else ()
        self.local = nn.Sequential(*layers)
        self.gate = nn.Linear(WIDTH, orders)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.weights = nn.Parameter(torch.full((orders,), FIRST_WEIGHT))
        self.log_scale = nn.Parameter(torch.zeros(len(TRAINED_LENGTHS_BP)))

    def forward(self, evidence: Tensor, tokens: Tensor, state: object = None) -> tuple[Tensor, object]:
        """Map (batch, length, orders, classes) and tokens (batch, length) to (batch, length, classes), and a state."""
        mean = evidence.mean(-1)
        deviations = evidence - mean.unsqueeze(-1)
        spread = deviations.square().mean(-1).sqrt()
        bases = F.one_hot((tokens.long() - FIRST_BASE_TOKEN + 1).clamp(0, BASES), BASES + 1)
        # Scaled to about one: log 4 is the log-probability of a base without any information, negated.
        hidden = self.inputs(torch.cat([3 * spread, mean + np.log(BASES), bases], dim=-1))
        hidden, state = (self.local(hidden), None) if self.stack is None else self.stack(hidden, state)
        weights = self.weights * (1 + self.gate(hidden))
        return torch.einsum("blk,blkc->blc", weights, deviations), state

    def loss(self, evidence: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over the windows of the trained lengths."""
        found, _ = self(evidence, tokens)
        losses = []
        for length, log_scale in zip(TRAINED_LENGTHS_BP, self.log_scale, strict=True):
            sums = found.unflatten(1, (-1, length)).sum(2) * log_scale.exp()
            losses.append(F.cross_entropy(sums.flatten(0, 1), labels.repeat_interleave(sums.shape[1])))
        return torch.stack(losses).mean()


def read_pieces(training: GenomeCollection, most_bases: int, seed: int) -> Pieces:
    """Fit the counted parts without each fold, and read the evidence of its sequences."""
    found: list[tuple[npt.NDArray[np.float16], Tokens, npt.NDArray[np.float32]]] = []
    rows: list[tuple[int, int, int]] = []
    strengths: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    per_class = most_bases // (FOLDS * len(training.class_names))
    for fold, (fitting, tested) in enumerate(fold_parts(training, FOLDS)):
        strengths = strengths or shared_strengths(fitting, tested, max(ORDERS))
        parts = fit_counts(fitting, PartSettings(words=False), strengths, seed)
        names = parts.names
        for label, name in enumerate(training.class_names):
            left = per_class
            for sequence in sorted(tested.sequences_of(name), key=lambda sequence: -sequence.length):
                length = min(sequence.length, left) // PIECE_BP * PIECE_BP
                if not length:
                    continue
                left -= length
                tokens = sequence.tokens(0, length)
                known = ((tokens >= FIRST_BASE_TOKEN) & (tokens < FIRST_BASE_TOKEN + BASES)).reshape(-1, PIECE_BP)
                kept = known.mean(axis=1) >= 1 - MAXIMUM_UNKNOWN_FRACTION
                blocks = parts.block_evidence(tokens, BLOCK_BP).reshape(len(kept), BLOCKS, len(names), -1)
                evidence = evidence_along(parts, tokens).reshape(len(kept), PIECE_BP, len(ORDERS), -1)
                found.append((evidence[kept], tokens.reshape(-1, PIECE_BP)[kept], blocks[kept].astype(np.float32)))
                rows += [(label, fold, len(found))] * int(kept.sum())
        note(f"fold {fold + 1} of {FOLDS}: {len(rows):,} pieces")
    labels, folds, sequences = np.array(rows, dtype=np.int64).T
    evidence, tokens, blocks = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return Pieces(evidence, tokens, labels, folds, sequences, blocks, names)


def evidence_along(parts: CountedParts, tokens: Tokens) -> npt.NDArray[np.float16]:
    """(length, orders, classes) of the Markov models of `ORDERS`; 0 where the context is not known."""
    codes, known = word_ends(tokens, max(ORDERS) + 1)
    evidence = np.zeros((len(tokens), len(ORDERS), parts.class_count), dtype=np.float16)
    for place, order in enumerate(ORDERS):
        values = parts.tables[parts.names.index(f"markov {order}")].take(codes & (BASES ** (order + 1) - 1), axis=0)
        evidence[:, place] = np.where((known > order)[:, None], values, 0)
    return evidence


def train(gate: EvidenceGate, pieces: Pieces, seconds: float, tested_fold: int, seed: int) -> int:
    """Train on the other folds for `seconds` of processor time, equally on every class; return the steps."""
    random = np.random.default_rng(seed)
    classes = [np.flatnonzero((pieces.folds != tested_fold) & (pieces.labels == c)) for c in np.unique(pieces.labels)]
    per_class = max(2, PIECES_PER_STEP // len(classes))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    begun, steps = time.process_time(), 0
    while (share := (time.process_time() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (steps + 1) / WARMUP_STEPS) * (1 - share)
        chosen = np.sort(
            np.concatenate([random.choice(own, per_class, replace=len(own) < per_class) for own in classes])
        )
        evidence, tokens, labels = (
            torch.from_numpy(v[chosen]) for v in (pieces.evidence, pieces.tokens, pieces.labels)
        )
        optimizer.zero_grad()
        gate.loss(evidence.float(), tokens, labels).backward()
        nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


@torch.inference_mode()
def gated_blocks(gate: EvidenceGate, pieces: Pieces, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(pieces, blocks, 1, classes) evidence of the gate, summed over blocks."""
    gate.eval()
    found = []
    for part in np.array_split(chosen, max(1, len(chosen) // 32)):
        evidence, tokens = torch.from_numpy(pieces.evidence[part]).float(), torch.from_numpy(pieces.tokens[part])
        found.append(gate(evidence, tokens)[0].unflatten(1, (BLOCKS, BLOCK_BP)).sum(2).numpy())
    return np.concatenate(found)[:, :, None]


def windows_of(
    pieces: Pieces, chosen: npt.NDArray[np.int64], blocks: npt.NDArray[np.float32], length: int
) -> PartWindows:
    """Mean evidence per base of the windows of a length in the chosen pieces; long ones overlap by half."""
    if length <= PIECE_BP:
        count = length // BLOCK_BP
        per_piece = BLOCKS // count
        sums = blocks.reshape(len(chosen) * per_piece, count, *blocks.shape[2:]).sum(axis=1)
        labels, folds = (np.repeat(of[chosen], per_piece) for of in (pieces.labels, pieces.folds))
        return PartWindows(sums.astype(np.float64) / length, labels, folds)
    count, by_piece = length // PIECE_BP, blocks.sum(axis=1, dtype=np.float64)
    sums, firsts = [], []
    for sequence in np.unique(pieces.sequences[chosen]):
        own = np.flatnonzero(pieces.sequences[chosen] == sequence)
        for start in range(0, len(own) - count + 1, count // 2):
            sums.append(by_piece[own[start : start + count]].sum(axis=0))
            firsts.append(chosen[own[start]])
    shape = (len(sums), *blocks.shape[2:])
    return PartWindows(np.reshape(sums, shape) / length, pieces.labels[firsts], pieces.folds[firsts])


def compare(gate: EvidenceGate, pieces: Pieces, tested_fold: int, seed: int) -> list[str]:
    """Rows of a table: the combination as it is, and with the gate as one more part, on the tested fold."""
    random = np.random.default_rng(seed)
    trained, tested = np.flatnonzero(pieces.folds != tested_fold), np.flatnonzero(pieces.folds == tested_fold)
    some = np.sort(random.permutation(trained)[:FITTED_PIECES])
    joined, seen = (
        np.concatenate([pieces.blocks[chosen], gated_blocks(gate, pieces, chosen)], axis=2) for chosen in (tested, some)
    )
    counted, gated = {}, {}
    for length in LENGTHS_BP:
        every, part = (
            windows_of(pieces, trained, pieces.blocks[trained], length),
            windows_of(pieces, some, seen, length),
        )
        keep = np.sort(random.permutation(len(every.labels))[:MOST_WINDOWS])
        if _has_every_class(pieces, every.labels[keep]) and _has_every_class(pieces, part.labels):
            counted[length] = PartWindows(every.evidence[keep], every.labels[keep], every.folds[keep])
            gated[length] = part
    combination = fit_combination(counted, pieces.part_names)
    with_gate = fit_counted(gated, np.ones(len(pieces.part_names) + 1, dtype=bool))
    rows = ["length\twindows\taccuracy\twith gate\tcross-entropy\twith gate\tgain\tstandard error"]
    for length in counted:
        windows = windows_of(pieces, tested, joined, length)
        if not _has_every_class(pieces, windows.labels):
            continue
        before, right = _losses(combination.counted, windows, windows.evidence[:, :-1], length)
        after, right_gated = _losses(with_gate, windows, windows.evidence, length)
        gains = before - after
        cluster = max(1, CLUSTER_BP // length)
        means = gains[: len(gains) // cluster * cluster].reshape(-1, cluster).mean(axis=1)
        error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else np.nan
        shares = f"{right.mean():.4f}\t{right_gated.mean():.4f}\t{before.mean():.4f}\t{after.mean():.4f}"
        rows.append(f"{length}\t{len(gains)}\t{shares}\t{gains.mean():.4f}\t{error:.4f}")
    return rows


def _has_every_class(pieces: Pieces, labels: npt.NDArray[np.int64]) -> bool:
    return bool((np.bincount(labels, minlength=int(pieces.labels.max()) + 1) >= 2).all())


def _losses(
    weights: CountedWeights, windows: PartWindows, evidence: FloatArray, length: int
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    logits = torch.from_numpy(weights.logits(evidence, np.full(len(windows.labels), length)))
    loss = F.cross_entropy(logits, torch.from_numpy(windows.labels), reduction="none")
    return loss.numpy(), logits.argmax(dim=1).numpy() == windows.labels


def main() -> None:
    """Read the options, train the gate and print the table."""
    parser = argparse.ArgumentParser(description="Compare the combination of counted parts with and without a gate.")
    parser.add_argument("--genome", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--holdout", default="", help="names of sequences not to use, separated by commas")
    parser.add_argument(
        "--bases", type=int, default=18_000_000, help="of all classes, at most: 42 bytes per class each"
    )
    parser.add_argument("--tested-fold", type=int, default=FOLDS - 1)
    parser.add_argument("--minutes", type=float, default=2.0, help="of processor time for training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stateless", action="store_true")
    options = parser.parse_args()
    use_threads(options.threads)
    named = [genome.partition("=") for genome in options.genome]
    specifications = [GenomeSpecification(name, tuple(paths.split(","))) for name, _, paths in named]
    held = tuple(name for name in options.holdout.split(",") if name)
    plan = hold_out(SpeciesTrainingOptions(specifications, PIECE_BP, Path(), held), load_genomes(specifications))
    pieces = read_pieces(plan.training, options.bases, options.seed)
    torch.manual_seed(options.seed)
    gate = EvidenceGate(len(ORDERS), stateless=options.stateless)
    steps = train(gate, pieces, 60 * options.minutes, options.tested_fold, options.seed)
    note(f"{steps:,} steps, {sum(weight.numel() for weight in gate.parameters()):,} weights")
    print("\n".join(compare(gate, pieces, options.tested_fold, options.seed)))


if __name__ == "__main__":
    main()
