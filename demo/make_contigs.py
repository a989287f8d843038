"""Cut the contigs of the demo from public genomes: `demo/contigs.fa.gz`, which the repository holds.

python demo/make_contigs.py --yeasts DIR --bacterium escherichia_coli.MG1655.fa.gz

Pieces of chromosome VII, which none of the shipped models was trained on, of one strain each of three yeasts, and one
piece of *Escherichia coli*. Every header says where a piece is from, 1-based and inclusive.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from genomamba.io.fasta import read_records
from genomamba.tokenizer import CharacterTokenizer
from mambapipelines.files import write_whole

CHROMOSOME = "chrVII"
STRAINS = {"cerevisiae": "S288C", "paradoxus": "CBS432", "arboricola": "Sarb"}
# Yue et al. 2017, Nature Genetics 49:913; S. arboricola H6 is of Liti et al. 2013, BMC Genomics 14:69.
SOURCE = "github.com/yjx1217/Yeast_PacBio_2016"
PIECES = {1_024: 20, 4_096: 12, 16_384: 6, 65_536: 2}  # length in bp: contigs of each species
LONG = ("cerevisiae", 1_048_576)
BACTERIUM_START, BACTERIUM_BP = 1_000_000, 16_384
LARGEST_FILE_BYTES = 1_000_000
LINE_BP = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yeasts", type=Path, required=True, help="folder with SPECIES.STRAIN.fa.gz")
    parser.add_argument(
        "--bacterium", type=Path, required=True, help="FASTA whose first header begins with an accession"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("contigs.fa.gz"))
    options = parser.parse_args()
    decode = CharacterTokenizer().decode
    lines = []

    def add(name: str, description: str, letters: str) -> None:
        lines.append(f">{name} {description}")
        lines.extend(letters[start : start + LINE_BP] for start in range(0, len(letters), LINE_BP))

    random = np.random.default_rng(0)
    for species, strain in STRAINS.items():
        path = options.yeasts / f"{species}.{strain}.fa.gz"
        tokens = next(record.tokens for record in read_records(str(path)) if record.name == CHROMOSOME)
        if species == LONG[0]:
            origin = f"{strain} {CHROMOSOME}:1-{LONG[1]} {SOURCE}"
            add(f"{species}_long", origin, decode(tokens[: LONG[1]]))
        for length, count in PIECES.items():
            # One piece in each of `count` equal stretches, so that none overlap.
            stretch = len(tokens) // count
            for number in range(count):
                start = number * stretch + int(random.integers(stretch - length))
                origin = f"{strain} {CHROMOSOME}:{start + 1}-{start + length} {SOURCE}"
                add(f"{species}_{length}_{number + 1}", origin, decode(tokens[start : start + length]))
    record = next(iter(read_records(str(options.bacterium))))
    end = BACTERIUM_START + BACTERIUM_BP
    origin = f"{record.name}:{BACTERIUM_START + 1}-{end} {record.description}"
    add("escherichia_coli", origin, decode(record.tokens[BACTERIUM_START:end]))
    content = gzip.compress("\n".join([*lines, ""]).encode(), mtime=0)
    if len(content) > LARGEST_FILE_BYTES:
        raise SystemExit(f"the contigs take {len(content):,} bytes, and {LARGEST_FILE_BYTES:,} may be committed")
    write_whole(options.output, content)
    print(f"{options.output}: {len(content):,} bytes, {sum(line.startswith('>') for line in lines)} records")


if __name__ == "__main__":
    main()
