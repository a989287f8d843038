"""Small hostile inputs for the DNA commands, written into a folder; DNA is random with a fixed seed."""

import bz2
import gzip
import lzma
from pathlib import Path

import numpy as np

VCF_HEAD = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def write_hostile_inputs(folder: Path) -> Path:
    """Write all inputs; returns the folder."""
    random = np.random.default_rng(11)

    def dna(length: int) -> str:
        return "".join(random.choice(list("ACGT"), length))

    def put(name: str, content: str | bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    _write_sequences(put, dna)
    _write_tables(put, dna, random)
    _write_variants(put, dna)
    put("models/traversal.json", '{"class_names": ["../../victim", "b", "c"]}')
    put("models/nested.json", "[" * 200_000)
    put(
        "models/sizes.txt",
        "layers 1000000000\nmodel_width 1000000\nfeature_width 1000000000\nkernel_width 1000000000\n",
    )
    return folder


def _write_sequences(put, dna) -> None:  # type: ignore[no-untyped-def]
    first, second = dna(600), dna(800)
    put("fasta/all_n.fa", f">masked\n{'N' * 500}\n>iupac\n{'RYKM' * 50}\n>real\n{first}\n")
    put("fasta/star.fa", f">c1\n{first}*\n>c2\n{second}\n")
    put("fasta/x.fa", f">c1\n{first[:300]}XXXX{first[304:]}\n>c2\n{second}\n")
    put("fasta/dash.fa", f">c1\n{first[:300]}----{first[300:]}\n")
    put("fasta/dot.fq", f"@r1\n{first[:50]}.{first[51:100]}\n+\n{'I' * 100}\n")
    put("fasta/protein.fa", ">p\nMKVLAAGIVGLPQWERTYIPASDFGHKLCVNMEEQLLDRSTPWW\n")
    put("fasta/after_gzip.fa.gz", gzip.compress(f">c1\n{first}\n".encode(), mtime=0) + b"left over by an upload")
    put("fasta/bom.fa", b"\xef\xbb\xbf" + f">c1\n{first}\n".encode())
    put("fasta/blank_before.fa", f"\n\n  >c1\n{first}\n")
    put("fasta/plain.fa.bz2", bz2.compress(f">c1\n{first}\n".encode()))
    put("fasta/plain.fa.xz", lzma.compress(f">c1\n{first}\n".encode()))
    reads = (f"@pair{pair}/{mate}\n{dna(120)}\n+\n{'I' * 120}\n" for pair in range(3) for mate in (1, 2))
    put("fasta/mates.fq", "".join(reads))
    put("fasta/escape.fa", b">bad\x1b[31mname\n" + first.encode() + b"\n")


def _write_tables(put, dna, random) -> None:  # type: ignore[no-untyped-def]
    rows = [(dna(60), f"{random.normal():.3f}") for _ in range(40)]

    def table(name: str, values: list[str]) -> None:
        lines = (f"{sequence}\t{value}\n" for (sequence, _), value in zip(rows, values, strict=True))
        put(f"tables/{name}.tsv", "sequence\ty\n" + "".join(lines))

    numbers = [value for _, value in rows]
    table("one_below_detection", [*numbers[:39], "<0.01"])
    table("one_inf", [*numbers[:39], "inf"])
    table("decimal_comma", [number.replace(".", ",") for number in numbers])
    table("float_classes", ["1.0" if number % 2 else "0.0" for number in range(40)])
    table("na_label", ["NA" if number % 2 else "EU" for number in range(40)])
    indexed = (f"{number},{sequence},{'ab'[number % 2]}\n" for number, (sequence, _) in enumerate(rows))
    put("tables/index_column.csv", ",sequence,label\n" + "".join(indexed))
    put("tables/quoted_name.csv", 'name,sequence\n"a\tb\nFAKE\t5\tu\t0.9",' + rows[0][0] + "\n")
    for part in ("train", "valid", "test"):
        for label in "ab":
            for number in range(15):
                put(f"tables/benchmark/{part}/{label}/{number}.txt", dna(60))


def _write_variants(put, dna) -> None:  # type: ignore[no-untyped-def]
    put("variants/ref.fa", f">chr1\n{dna(1000)}R{dna(2999)}\n")
    put("variants/iupac.vcf", VCF_HEAD + "chr1\t1001\t.\tA\tC\t.\t.\t.\n")
    put("variants/garbage.vcf", "garbage\n")
    put("variants/nothing.vcf", "")
    put("variants/bom.bed", b"\xef\xbb\xbfchr1\t100\t200\n")
    put("variants/mac.bed", "chr1\t100\t200\rchr1\t300\t400\r")
    put("variants/head.bed", "chrom\tstart\tend\nchr1\t100\t200\n")
