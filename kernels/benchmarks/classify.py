"""Throughput of `genomamba classify`: many short records beside one long record, the same model and threads.

    python kernels/benchmarks/classify.py --records 10000 --threads 2

Prints, for 10,000 records of 500 to 3,000 bp and for one record of 1,048,576 bp, the megabases that are classified each
second, table rows included, and the ratio of the two. With `--profile` it also prints where the time of the short
records goes.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import time

import numpy as np
import torch

from genomamba.models import SpeciesClassifier, SpeciesClassifierConfig
from mambapipelines.recipes import load_recipe
from mambapipelines.species_classification import RecordClassifier, table_row

SHORTEST_BP, LONGEST_BP, LONG_RECORD_BP = 500, 3_000, 1 << 20
CLASS_NAMES = ("first", "second", "third")
ROUNDS = 2


def fasta_of(lengths_bp: list[int], seed: int) -> bytes:
    """Records of random bases with the given lengths as FASTA text."""
    random = np.random.default_rng(seed)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    return b"".join(
        b">record%d\n%s\n" % (number, letters[random.integers(0, 4, length_bp)].tobytes())
        for number, length_bp in enumerate(lengths_bp)
    )


def megabases_per_second(classifier: RecordClassifier, text: bytes, bases: int, rounds: int) -> float:
    """The best of some rounds of reading, classifying and formatting."""
    best_seconds = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for row in classifier.classify(io.BytesIO(text)):
            table_row(row, len(CLASS_NAMES))
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return bases / best_seconds / 1e6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help="short records")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", default="small", help="whose model is measured")
    parser.add_argument("--profile", action="store_true", help="print where the time of the short records goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = SpeciesClassifier(
        SpeciesClassifierConfig(class_names=CLASS_NAMES, **load_recipe(arguments.recipe).model)
    ).eval()
    classifier = RecordClassifier(model)
    lengths = np.random.default_rng(1).integers(SHORTEST_BP, LONGEST_BP + 1, arguments.records).tolist()
    short_text, long_text = fasta_of(lengths, 2), fasta_of([LONG_RECORD_BP], 3)
    long_speed = megabases_per_second(classifier, long_text, LONG_RECORD_BP, ROUNDS)
    short_speed = megabases_per_second(classifier, short_text, sum(lengths), 1)
    print(f"recipe {arguments.recipe}, float32, {arguments.threads} CPU threads")
    print("input\tbases\tMbp/s")
    print(f"1 record of {LONG_RECORD_BP:,} bp\t{LONG_RECORD_BP}\t{long_speed:.3f}")
    print(f"{len(lengths):,} records of {SHORTEST_BP} to {LONGEST_BP:,} bp\t{sum(lengths)}\t{short_speed:.3f}")
    print(f"short / long\t\t{short_speed / long_speed:.2f}")
    if arguments.profile:
        with cProfile.Profile() as profile:
            list(classifier.classify(io.BytesIO(short_text)))
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
