"""Small genomes for language models: sequence that can be predicted, and FASTA files of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

WIDTH = 60


def predictable_dna(length: int, seed: int = 0, noise: float = 0.1) -> bytes:
    """Each base follows from the two before it, except for a share that is drawn at random."""
    random = np.random.default_rng(seed)
    follows = np.random.default_rng(99).permutation(np.arange(16) % 4)
    drawn, at_random = random.integers(0, 4, length), random.random(length) < noise
    bases = drawn.copy()
    for position in range(2, length):
        if not at_random[position]:
            bases[position] = follows[4 * bases[position - 2] + bases[position - 1]]
    return np.frombuffer(b"ACGT", dtype=np.uint8)[bases].tobytes()


def write_genome(path: Path, records: Mapping[str, bytes]) -> str:
    """A FASTA file with lines of one length; returns its path."""
    lines = []
    for name, letters in records.items():
        lines.append(b">" + name.encode())
        lines += [letters[start : start + WIDTH] for start in range(0, len(letters), WIDTH)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def yeast_like(folder: Path, name: str = "alba", seed: int = 0, length: int = 6000) -> str:
    """A genome of four chromosomes."""
    records = {f"chr{number}": predictable_dna(length, 10 * seed + number) for number in range(1, 5)}
    return write_genome(folder / f"{name}.fa", records)
