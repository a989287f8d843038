"""Throughput of `genomamba classify`: many short records beside one long record, the same model and threads.

    python pipelines/benchmarks/classify.py --threads 2
    taskset --cpu-list 1 python pipelines/benchmarks/classify.py --records 1500 --long-bases 262144 --threads 1

Prints, for 10,000 records of 500 to 3,000 bp and for one record of 1,048,576 bp, the megabases that are classified each
second, reading and table rows included, and the ratio of the two. The short records are cut into three parts and
measured in turns with the long one, so that other programs slow down both alike; what is printed is the median of the
three. Megabases per second of processor time are beside them, which other programs disturb less. With `--profile` it
also prints where the time of the short records goes.

    python pipelines/benchmarks/classify.py --threads 1 --model yeasts
    python pipelines/benchmarks/classify.py --threads 1 --model yeasts --only chrVII,chrXI --sequences a.fa.gz b.fa.gz

Prints instead, for records that are cut from these sequences (random ones without), the speed of both precisions
beside float32 through PyTorch's operators, in turns, which was all there was before blocks were calls of the native
library; and the share of records that each calls like float32 through the operators.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from genomamba.io.sources import read_sequences
from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig, load_classifier
from genomamba.tokenizer import CharacterTokenizer
from mambacore.benchmarking import print_target
from mambacore.layers import SelectiveMixer
from mambapipelines.device import choose
from mambapipelines.species.classify import RecordClassifier, table_row
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.training.recipe import load_task_recipe

SHORTEST_BP, LONGEST_BP, LONG_RECORD_BP = 500, 3_000, 1 << 20
CLASS_NAMES = ("first", "second", "third")
ROUNDS = 3
TARGET_RATIO, TARGET_EQUAL = 2.0, 99.9

Speed = tuple[float, float]
"""Megabases a second of the clock, and of processor time."""


def fasta_of(lengths_bp: Sequence[int], seed: int) -> bytes:
    """Records of random bases with the given lengths as FASTA text."""
    random = np.random.default_rng(seed)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    return b"".join(
        b">record%d\n%s\n" % (number, letters[random.integers(0, 4, length_bp)].tobytes())
        for number, length_bp in enumerate(lengths_bp)
    )


def speed_of(classifier: RecordClassifier, lengths_bp: Sequence[int], seed: int) -> Speed:
    """Read, classify and format records once."""
    text = fasta_of(lengths_bp, seed)
    clock, processor = time.perf_counter(), time.process_time()
    for row in classifier.classify(io.BytesIO(text)):
        table_row(row, len(CLASS_NAMES))
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    megabases = sum(lengths_bp) / 1e6
    return megabases / clock, megabases / processor


def median_of(speeds: Sequence[Speed]) -> Speed:
    """The median of each of the two."""
    return statistics.median(clock for clock, _ in speeds), statistics.median(processor for _, processor in speeds)


def records_of(paths: Sequence[str], only: Sequence[str], record_bp: int, every: int) -> list[bytes]:
    """Every so-manieth stretch of so many bases of the named sequences, as FASTA text in `ROUNDS` parts."""
    letters = CharacterTokenizer().decode
    records = []
    for number, path in enumerate(paths):
        for sequence in read_sequences(path):
            if only and sequence.name not in only:
                continue
            for begin in range(0, len(sequence.tokens) - record_bp + 1, record_bp * every):
                bases = letters(sequence.tokens[begin : begin + record_bp])
                records.append(f">{number}.{sequence.name}.{begin}\n{bases}\n".encode())
    return [b"".join(records[part::ROUNDS]) for part in range(ROUNDS)]


def compare_precisions(classifier: RecordClassifier, parts: Sequence[bytes]) -> None:
    """Print the speed of both precisions by that of float32 through the operators, and the share of equal calls."""
    ways = {
        "float32, by operators": ("float32", False), "float32": ("float32", True), "bfloat16": ("bfloat16", True)
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    calls: dict[str, list[str]] = {way: [] for way in ways}
    for part in parts:
        for way, (precision, SelectiveMixer.steps_many) in ways.items():
            with choose("cpu", precision).autocast():
                began = time.process_time()
                calls[way] += [row.call for row in classifier.classify(io.BytesIO(part))]
                seconds[way].append(time.process_time() - began)
    megabases, (first, *others) = sum(map(len, parts)) / 1e6, ways
    print(f"{first}: {megabases / sum(seconds[first]):.3f} Mbp per second of processor time")
    for way in others:
        ratio = statistics.median(slow / fast for slow, fast in zip(seconds[first], seconds[way], strict=True))
        equal = sum(one == other for one, other in zip(calls[first], calls[way], strict=True))
        share = 100 * equal / len(calls[first])
        print(f"{way}: {ratio:.2f} x as fast, equal calls {share:.2f} % of {len(calls[first]):,} records")
    what = "classify --precision bfloat16 by float32 through the operators, speed"
    print_target(what, ratio, TARGET_RATIO, at_least=True)
    print_target("calls equal to those in float32, per cent", share, TARGET_EQUAL, at_least=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help="short records, over all three rounds")
    parser.add_argument("--long-bases", type=int, default=LONG_RECORD_BP, help="length of the long record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", default="small", help="whose model is measured")
    parser.add_argument("--profile", action="store_true", help="print where the time of the short records goes")
    parser.add_argument("--model", help="folder of a trained classifier: compare its precisions on --sequences")
    parser.add_argument("--sequences", nargs="+", default=[], metavar="FASTA", help="what records are cut from")
    parser.add_argument("--only", default="", metavar="NAME[,NAME...]", help="names of the sequences that are used")
    parser.add_argument("--record-bases", type=int, default=1024, help="length of the records that are cut")
    parser.add_argument("--every", type=int, default=1, help="use every so-manieth record only")
    arguments = parser.parse_args()
    if arguments.model is not None:
        torch.set_num_threads(arguments.threads)
        only = [name for name in arguments.only.split(",") if name]
        parts = records_of(arguments.sequences, only, arguments.record_bases, arguments.every)
        if not arguments.sequences:
            each = [arguments.record_bases] * (arguments.records // ROUNDS)
            parts = [fasta_of(each, seed) for seed in range(ROUNDS)]
        compare_precisions(RecordClassifier(load_classifier(arguments.model)[0]), parts)
        return
    if arguments.records < ROUNDS or arguments.long_bases < 1:
        parser.error(f"give at least {ROUNDS} records and 1 base")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = SpeciesClassifier(
        SpeciesClassifierConfig(class_names=CLASS_NAMES, **load_task_recipe(SpeciesRecipe, arguments.recipe).model)
    ).eval()
    classifier = RecordClassifier(model)
    lengths = np.random.default_rng(1).integers(SHORTEST_BP, LONGEST_BP + 1, arguments.records).tolist()
    speed_of(classifier, lengths[:20], 0)  # the first call loads libraries
    short_speeds, long_speeds = [], []
    for number in range(ROUNDS):
        long_speeds.append(speed_of(classifier, [arguments.long_bases], number))
        short_speeds.append(speed_of(classifier, lengths[number::ROUNDS], number))
    short, long = median_of(short_speeds), median_of(long_speeds)
    print(f"recipe {arguments.recipe}, float32, {arguments.threads} CPU threads, medians of {ROUNDS} in turns")
    print("input\tbases\tMbp/s\tMbp per second of processor time")
    print(f"1 record of {arguments.long_bases:,} bp\t{arguments.long_bases}\t{long[0]:.3f}\t{long[1]:.3f}")
    records = f"{len(lengths):,} records of {SHORTEST_BP} to {LONGEST_BP:,} bp"
    print(f"{records}\t{sum(lengths)}\t{short[0]:.3f}\t{short[1]:.3f}")
    print(f"short / long\t\t{short[0] / long[0]:.2f}\t{short[1] / long[1]:.2f}")
    if arguments.profile:
        with cProfile.Profile() as profile:
            speed_of(classifier, lengths[::ROUNDS], 0)
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
