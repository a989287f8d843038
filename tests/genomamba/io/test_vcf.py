"""Variants: reading VCF of any kind, why an allele has no score, and windows of equal length for both haplotypes."""

import gzip
import io
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genomamba.alphabet import reverse_complement
from genomamba.io import vcf as variants_module
from genomamba.io.reference import Reference
from genomamba.io.vcf import (
    Variant,
    VariantFile,
    allele_windows,
    check_allele,
    haplotype_windows,
    read_chromosome_map,
    require_shared_contigs,
    trimmed_lengths,
)
from mambacore.errors import InputError
from tiny_language_models import write_fasta

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
DNA = st.text("ACGT", min_size=1, max_size=8)


def vcf_line(chromosome: str, position: int, reference: str, alternatives: str, identifier: str = ".") -> str:
    return f"{chromosome}\t{position}\t{identifier}\t{reference}\t{alternatives}\t.\t.\t.\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_records_come_in_the_order_of_the_file_sorted_or_not(tmp_path: Path, compressed: bool) -> None:
    text = HEADER + vcf_line("2", 9, "a", "c,<DEL>,*", "rs1") + vcf_line("1", 3, "AC", ".") + vcf_line("1", 1, "A", "T")
    path = tmp_path / "variants.vcf"
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    with VariantFile(path) as opened:
        for _ in range(2):  # more than once
            assert list(opened.records()) == [
                Variant("2", 9, "rs1", "a", ("c", "<DEL>", "*")),
                Variant("1", 3, ".", "AC", ()),
                Variant("1", 1, ".", "A", ("T",)),
            ]
        assert [record.line for record in opened.records(with_lines=True)] == text.splitlines()[2:]


@pytest.mark.parametrize("compressed", [False, True])
def test_standard_input_is_read_twice_and_its_copy_removed(compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (HEADER + vcf_line("1", 3, "A", "C")).encode()
    content = gzip.compress(content) if compressed else content
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    with VariantFile("-") as opened:
        assert len(list(opened.records())) == len(list(opened.records())) == 1
        copy = Path(opened._path)
        assert copy.exists()
    assert not copy.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b">a\nACGT\n", "is not a readable VCF file"),
        (gzip.compress(HEADER.encode() * 9, mtime=0)[:40], "truncated"),
        (HEADER.encode() + b"1\tx\t.\tA\tC\t.\t.\t.\n", "is damaged at record 1"),
        (HEADER.encode() + b"1\t1\t.\tA\tC\t.\t.\t.\n1\t2\n", "is damaged at record 2"),
    ],
)
def test_what_is_no_vcf_is_refused_in_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "variants.vcf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(VariantFile(path).records())
    with pytest.raises(InputError, match="does not exist"):
        VariantFile(tmp_path / "none.vcf")


def test_without_pysam_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pysam, which is not installed: `pip install 'genomamba\[variants\]'`"):
        VariantFile(tmp_path / "variants.vcf")


@settings(max_examples=120, deadline=None)
@given(content=st.binary(max_size=80).map(lambda tail: HEADER.encode() + tail) | st.binary(max_size=120))
def test_no_bytes_crash_the_reader(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variants.vcf"
        path.write_bytes(content)
        try:
            with VariantFile(path) as opened:
                list(opened.records(with_lines=True))
        except InputError as error:
            assert str(error).endswith(".")


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(
        st.tuples(st.integers(1, 10**6), DNA, st.lists(DNA | st.sampled_from(["<DEL>", "*", "N"]), max_size=3)),
        max_size=6,
    )
)
def test_any_records_come_back_as_they_were_written(records: list[tuple[int, str, list[str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variants.vcf"
        path.write_text(
            HEADER
            + "".join(vcf_line("c", place, letters, ",".join(others) or ".") for place, letters, others in records)
        )
        with VariantFile(path) as opened:
            found = [(one.position, one.reference, list(one.alternatives)) for one in opened.records()]
        assert found == [(place, letters, others) for place, letters, others in records]


@pytest.fixture
def genome(tmp_path: Path) -> Reference:
    return Reference(write_fasta(tmp_path / "genome.fa", {"chr1": b"ACGTacgtNNACGTRCGT" + b"A" * 40, "chr2": b"GGGG"}))


@pytest.mark.parametrize(
    ("contig", "position", "reference", "alternative", "status"),
    [
        ("chr1", 1, "A", "G", "scored"),
        ("chr1", 5, "A", "g", "scored"),  # lower case on either side
        ("chr1", 5, "ac", "AT", "scored"),
        ("chr1", 1, "C", "G", "reference_mismatch"),
        ("chr1", 1, "C", "<DEL>", "reference_mismatch"),
        ("chr3", 1, "A", "G", "missing_contig"),
        ("chr1", 0, "A", "G", "outside_contig"),
        ("chr2", 4, "GG", "G", "outside_contig"),
        ("chr1", 1, "A", None, "no_alternative"),
        ("chr1", 1, "A", "<DEL>", "symbolic_allele"),
        ("chr1", 1, "A", "*", "symbolic_allele"),
        ("chr1", 1, "A", "A[chr2:3[", "symbolic_allele"),
        ("chr1", 1, "A", ".T", "symbolic_allele"),
        ("chr1", 9, "N", "A", "unknown_base_in_allele"),
        ("chr1", 15, "R", "A", "unknown_base_in_allele"),
        ("chr1", 1, "A", "N", "unknown_base_in_allele"),
        ("chr1", 1, "A", "a", "same_as_reference"),
        ("chr1", 1, "A", "A" + "C" * 9, "scored"),
        ("chr1", 1, "A", "A" + "C" * 10, "allele_too_long"),
    ],
)
def test_every_allele_is_scored_or_has_a_reason(
    genome: Reference, contig: str, position: int, reference: str, alternative: str | None, status: str
) -> None:
    variant = Variant(contig, position, ".", reference, () if alternative is None else (alternative,))
    assert check_allele(variant, alternative, contig, genome, longest=9) == status


@given(before=DNA, after=DNA, reference=DNA, alternative=DNA)
def test_shared_ends_do_not_count_as_part_of_an_allele(
    before: str, after: str, reference: str, alternative: str
) -> None:
    first, second = trimmed_lengths(before + reference + after, before + alternative + after)
    assert first - second == len(reference) - len(alternative)
    assert 0 <= first <= len(reference)
    assert 0 <= second <= len(alternative)


@settings(max_examples=200)
@given(
    before=st.text("ACGTN", max_size=40),
    after=st.text("ACGTN", max_size=40),
    reference=DNA,
    alternative=DNA,
    length=st.integers(16, 40),
)
def test_both_windows_are_equally_long_and_differ_from_the_first_base_on(
    before: str, after: str, reference: str, alternative: str, length: int
) -> None:
    if reference == alternative:
        return
    sides = [text.encode() for text in (before, reference, alternative, after)]
    windows = haplotype_windows(sides[0], sides[1], sides[2], sides[3], length)
    assert len(windows.reference) == len(windows.alternative) <= length - (length - 1) // 2
    assert len(windows.context) <= (length - 1) // 2
    haplotypes = [sides[0] + sides[1] + sides[3], sides[0] + sides[2] + sides[3]]
    for haplotype, continuation in zip(haplotypes, (windows.reference, windows.alternative), strict=True):
        assert windows.context + continuation in haplotype
    if windows.reference:
        assert windows.reference[0] != windows.alternative[0]
    assert not set(windows.reference[: windows.known] + windows.alternative[: windows.known]) - set(b"ACGT")


def test_where_in_a_repeat_the_file_places_an_indel_does_not_matter() -> None:
    left, repeat, right = b"GATTACAGTC", b"CACACA", b"TTGACCGATT"
    placements = [
        haplotype_windows(left + repeat[: 2 * shift], b"CA", b"", repeat[2 * shift + 2 :] + right, 16)
        for shift in range(3)
    ]
    anchored = haplotype_windows(left[:-1], b"CCA", b"C", repeat[2:] + right, 16)
    assert placements[0] == placements[1] == placements[2] == anchored


def test_the_other_strand_is_what_the_turned_reference_and_variant_give(tmp_path: Path) -> None:
    letters = b"GATTACAGTCCACACATTGACCNGATT"
    genome = Reference(write_fasta(tmp_path / "given.fa", {"c": letters}))
    turned = Reference(write_fasta(tmp_path / "turned.fa", {"c": reverse_complement(letters)}))
    for position, reference, alternative in [
        (8, "GT", "G"),
        (11, "C", "CAAT"),
        (1, "G", "T"),
        (27, "T", "TA"),
        (3, "TTA", "GC"),
    ]:
        end = position - 1 + len(reference)
        other = Variant(
            "c",
            len(letters) - end + 1,
            ".",
            reverse_complement(reference.encode()).decode(),
            (),
        )
        given_windows = allele_windows(Variant("c", position, ".", reference, ()), alternative, "c", genome, 16)
        turned_windows = allele_windows(other, reverse_complement(alternative.encode()).decode(), "c", turned, 16)
        assert given_windows == turned_windows[::-1]


def test_names_of_another_style_are_refused_with_the_remedy() -> None:
    require_shared_contigs(["chr1", "2"], {"chr1": 5}, "v.vcf", "ref.fa")
    require_shared_contigs([], {"chr1": 5}, "v.vcf", "ref.fa")
    with pytest.raises(InputError, match=r"none of the chromosomes of v.vcf .*did you mean 'chr1'.*--chromosome-map"):
        require_shared_contigs(["1", "2"], {"chr1": 5}, "v.vcf", "ref.fa")


def test_a_chromosome_map_is_pairs_of_names(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("# from\tto\n1\tchr1\n\nMT chrM\n")
    assert read_chromosome_map(path) == {"1": "chr1", "MT": "chrM"}
    for text, message in [("1\n", "line 1 has 1 words"), ("1 a\n1 b\n", "line 2 names '1' again")]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_chromosome_map(path)
    with pytest.raises(InputError, match="there is no file"):
        read_chromosome_map(tmp_path / "none")
