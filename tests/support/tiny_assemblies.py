"""Small assemblies in the layout of the published species tasks' downloads."""

import gzip
from pathlib import Path

import numpy as np

from genomamba.data.assemblies import SpeciesProtocol


def write_assemblies(folder: Path, protocol: SpeciesProtocol, chromosome_bp: int) -> dict[tuple[str, str], bytes]:
    """Write every file of a task with chromosomes of random letters; species differ in their share of G and C.

    Records that the file names are called by an invented accession. Returns (species, chromosome) -> letters.
    """
    letters: dict[tuple[str, str], bytes] = {}
    random = np.random.default_rng(8)
    for label, assembly in enumerate(protocol.assemblies):
        strong = 0.3 + 0.1 * label
        odds = [(1 - strong) / 2, strong / 2, strong / 2, (1 - strong) / 2]
        for file in assembly.files:
            path = assembly.path(folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = b""
            for chromosome in file.chromosomes:
                bases = random.choice(np.frombuffer(b"ACGT", dtype=np.uint8), size=chromosome_bp, p=odds).tobytes()
                letters[assembly.species, chromosome] = bases
                name = f"CM{len(letters):06d}.1" if file.named_by_file else chromosome
                text += b">" + name.encode() + b"\n" + bases + b"\n"
            path.write_bytes(gzip.compress(text, mtime=0))
    return letters
