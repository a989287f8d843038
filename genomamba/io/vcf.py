"""Variants of a VCF file: reading, checking against a reference, and the two haplotypes that each compares.

A model compares a window of the reference with one of the same length that contains the alternative allele. Lengths
must be equal: a longer sequence has a lower likelihood whatever its content, so every insertion would look deleterious
and every deletion beneficial. The windows are those of `haplotype_windows`.
"""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from genomamba.alphabet import reverse_complement
from genomamba.io.compression import (
    BYTE_ORDER_MARK,
    GZIP_MAGIC,
    LONGEST_LINE_BYTES,
    STANDARD_INPUT,
    input_errors,
    is_compressed,
    read_blocks,
    read_lines,
)
from genomamba.io.reference import Reference, suggest_names
from genomamba.io.reference_index import BLOCK_GZIP_EXTRA
from mambacore.errors import InputError
from mambacore.files import temporary_folder

Status = Literal[
    "scored",
    "reference_mismatch",
    "missing_contig",
    "outside_contig",
    "no_alternative",
    "symbolic_allele",
    "unknown_base_in_allele",
    "same_as_reference",
    "allele_too_long",
    "no_bases_to_compare",
]
"""Status of an allele; all but the first are reasons why it has no score."""

_KNOWN_BASES: Final = frozenset("ACGT")
_IS_KNOWN_BASE: Final = np.isin(np.arange(256), np.frombuffer(b"ACGT", dtype=np.uint8))
_BASES_OF_CODE: Final = {
    "R": "AG",
    "Y": "CT",
    "S": "CG",
    "W": "AT",
    "K": "GT",
    "M": "AC",
    "B": "CGT",
    "D": "AGT",
    "H": "ACT",
    "V": "ACG",
}
_SYMBOLS: Final = frozenset("<>[]*")


@dataclass(frozen=True)
class Variant:
    """One record of a VCF file.

    `position` is 1-based, `alternatives` may be empty; `line` is the record as VCF text without its newline, or "" if
    not requested.
    """

    chromosome: str
    position: int
    identifier: str
    reference: str
    alternatives: tuple[str, ...]
    line: str = ""


@dataclass(frozen=True)
class HaplotypeWindows:
    """The two windows compared for one strand of one allele, in the direction of that strand.

    - `context`: letters that both haplotypes share before the first difference.
    - `reference`, `alternative`: their continuations, of equal length.
    - `known`: number of leading bases of both continuations that are A, C, G or T: the rest is not scored.
    - `longest_allele`: bases of the longer allele, without the bases both share at either end.
    - `replaces`: whether both alleles have the same number of bases.
    """

    context: bytes
    reference: bytes
    alternative: bytes
    known: int
    longest_allele: int
    replaces: bool

    @property
    def unknown_bases(self) -> int:
        """Letters of the reference window that are not A, C, G or T."""
        return int((~is_known(self.context + self.reference)).sum())


class VariantFile:
    """A VCF or BCF file, plain or compressed, "-" for standard input; its records may be read more than once.

    `contig_lengths` are those that the header states (`##contig`), in bp; None where it states none.

    Raises:
        InputError: if it is missing or not VCF, or pysam is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if importlib.util.find_spec("pysam") is None:
            raise InputError("reading VCF needs pysam, which is not installed: `pip install 'genomamba[variants]'`.")
        self.label = "standard input" if os.fspath(path) == STANDARD_INPUT else os.fspath(path)
        self._opened = contextlib.ExitStack()
        self._path = os.fspath(path)
        if os.path.isdir(self._path):
            raise InputError(f"{self.label} is a directory: give a VCF file, plain or compressed.")
        if self._path != STANDARD_INPUT and not os.path.exists(self._path):
            raise InputError(f"{self.label} does not exist: give a VCF file, plain or compressed.")
        self._check_content()
        with self._open() as opened:
            try:
                self.header_text = str(opened.header)
                self.contig_lengths = {name: contig.length for name, contig in opened.header.contigs.items()}
            except UnicodeDecodeError as error:
                self.close()
                raise InputError(
                    f"{self.label} has a header that is not UTF-8 ({error}): convert it with `iconv`, or correct it."
                ) from error

    def records(self, with_lines: bool = False) -> Iterator[Variant]:
        """Yield the records in file order, whether it is sorted or not.

        Raises:
            InputError: if a record cannot be read, with its number.
        """
        number = 0
        with self._open(drop_samples=not with_lines) as opened:
            while True:
                number += 1
                try:
                    record = next(opened)
                    yield _variant(record, with_lines)
                except StopIteration:
                    return
                except (OSError, ValueError, UnicodeDecodeError) as error:
                    raise InputError(
                        f"{self.label} is damaged at record {number} ({error}): check it with `bcftools view`."
                    ) from error

    def _check_content(self) -> None:
        """Read everything once: reject excessively long lines, and copy what the library cannot read twice."""
        needs_copy = self._path == STANDARD_INPUT or not os.path.isfile(self._path) or _needs_copy(self._path)
        blocks = _with_short_lines(read_blocks(self._path, self.label), self.label)
        if not needs_copy:
            for _ in blocks:
                pass
            return
        try:
            copy = self._opened.enter_context(temporary_folder()) / "copy.vcf"
            with copy.open("wb") as stream:
                stream.writelines(blocks)
            self._path = str(copy)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise InputError(
                    f"{self.label} cannot be copied to {tempfile.gettempdir()} ({error.strerror or error}): set "
                    "TMPDIR to a folder with more space."
                ) from error
            raise

    def close(self) -> None:
        """Delete the temporary copy, if there is one."""
        self._opened.close()

    def __enter__(self) -> "VariantFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _open(self, drop_samples: bool = True) -> Iterator[Any]:
        import pysam  # noqa: PLC0415 - an extra

        before = pysam.set_verbosity(0)  # htslib would print what the errors below report
        try:
            try:
                opened = pysam.VariantFile(self._path, drop_samples=drop_samples)
            except (OSError, ValueError, UnicodeDecodeError, NotImplementedError) as error:
                empty = os.path.getsize(self._path) == 0
                self.close()
                if "EOF marker" in str(error):
                    raise InputError(f"{self.label} is cut off: its last block is missing; copy it again.") from error
                reason = "is empty" if empty else "is not a readable VCF file"
                raise InputError(
                    f"{self.label} {reason}: give VCF or BCF with its header, plain or compressed."
                ) from error
            with opened:
                yield opened
        finally:
            pysam.set_verbosity(before)


def _needs_copy(path: str) -> bool:
    """Return whether a file is compressed other than by bgzip, which the library reads, or has a byte-order mark."""
    with input_errors(path), open(path, "rb") as stream:
        start = stream.read(16)
    if start.startswith(GZIP_MAGIC):
        return start[12:16] != BLOCK_GZIP_EXTRA
    return start.startswith(BYTE_ORDER_MARK) or is_compressed(path)


def _with_short_lines(blocks: Iterable[bytes], label: str) -> Iterator[bytes]:
    """Yield blocks of text, or of BCF, and reject excessively long lines."""
    length, binary = 0, None
    for block in blocks:
        if binary is None:
            binary = block.startswith(b"BCF")
        last = block.rfind(b"\n")
        length = length + len(block) if last < 0 else len(block) - last
        if not binary and length > LONGEST_LINE_BYTES:
            raise InputError(f"{label} has a line of more than {LONGEST_LINE_BYTES:,} characters: it is damaged.")
        yield block


def _variant(record: Any, with_line: bool) -> Variant:
    return Variant(
        record.chrom,
        record.pos,
        record.id or ".",
        record.ref or ".",
        tuple(record.alts or ()),
        str(record).rstrip("\n") if with_line else "",
    )


def read_chromosome_map(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read pairs of contig names in the VCF file and in the reference, one per line, separated by whitespace.

    Raises:
        InputError: if the file cannot be read, a line has another form, or a name is repeated.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, f"the chromosome map {path}"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 2:
            raise InputError(
                f"{path}, line {number} has {len(words)} words: write the name in the VCF and the one in the reference."
            )
        if words[0] in names:
            raise InputError(f"{path}, line {number} names '{words[0]}' again: give each name once.")
        names[words[0]] = words[1]
    return names


def require_shared_contigs(
    chromosomes: Sequence[str], contig_lengths: Mapping[str, int], variants_label: str, reference_label: str
) -> None:
    """Check that a reference has any of the chromosomes; otherwise it is another assembly or naming style.

    Raises:
        InputError: if it has none; the message suggests the nearest names.
    """
    if chromosomes and not any(name in contig_lengths for name in chromosomes):
        raise InputError(
            f"none of the chromosomes of {variants_label} is in {reference_label}, such as '{chromosomes[0]}': "
            f"{suggest_names(chromosomes[0], contig_lengths)}; use the reference of the VCF file, or translate names "
            "with --chromosome-map."
        )


def require_equal_contigs(
    stated: Mapping[str, int | None], contig_lengths: Mapping[str, int], variants_label: str, reference_label: str
) -> None:
    """Check that contigs have the length that the VCF header states; otherwise it is another assembly.

    Args:
        stated: of contigs with variants, their length in the header, bp; None for none.
        contig_lengths: lengths in the reference, bp.
        variants_label, reference_label: names of the files.

    Raises:
        InputError: for the first contig of another length.
    """
    for name, length in stated.items():
        there = contig_lengths.get(name, length)
        if length is not None and length != there:
            raise InputError(
                f"{variants_label} states {length:,} bp for '{name}', which has {there:,} bp in {reference_label}: use "
                "the reference of the VCF file, or correct its header (`bcftools reheader --fai`)."
            )


def check_allele(variant: Variant, alternative: str | None, contig: str, genome: Reference, longest: int) -> Status:
    """Return whether an allele can be scored, and if not, why; `None` stands for a record without alleles.

    The letters of the record are compared with the reference in upper case. `longest` is in bp.
    """
    if contig not in genome.lengths:
        return "missing_contig"
    start, end = variant.position - 1, variant.position - 1 + len(variant.reference)
    if start < 0 or end > genome.lengths[contig]:
        return "outside_contig"
    reference = variant.reference.upper()
    letters = genome.letters(contig, start, end).upper().replace(b"U", b"T").decode()
    if len(letters) != len(reference) or not all(map(_agrees, letters, reference)):
        return "reference_mismatch"
    return "no_alternative" if alternative is None else _check_letters(reference, alternative.upper(), longest)


def _agrees(letter: str, base: str) -> bool:
    """Whether a letter of the reference is compatible with a base of REF.

    VCF has concrete bases for ambiguity codes of the reference (VCF 4.3, section 1.6.1: the alphabetically first;
    callers write others too); a gap (N) is N.
    """
    return letter == base or base in _BASES_OF_CODE.get(letter, "")


def _check_letters(reference: str, alternative: str, longest: int) -> Status:
    if _SYMBOLS & set(alternative) or alternative.startswith(".") or alternative.endswith("."):
        return "symbolic_allele"
    if not set(reference + alternative) <= _KNOWN_BASES:
        return "unknown_base_in_allele"
    if reference == alternative:
        return "same_as_reference"
    return "allele_too_long" if max(trimmed_lengths(reference, alternative)) > longest else "scored"


def trimmed_lengths(reference: str, alternative: str) -> tuple[int, int]:
    """Return the lengths of two alleles without the bases that they share at their starts and ends."""
    prefix = _shared(reference, alternative)
    suffix = _shared(reference[prefix:][::-1], alternative[prefix:][::-1])
    return len(reference) - prefix - suffix, len(alternative) - prefix - suffix


def _shared(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def allele_windows(
    variant: Variant, alternative: str, contig: str, genome: Reference, length: int, both_strands: bool = True
) -> list[HaplotypeWindows]:
    """Return the windows of `length` bp compared for an allele: of the given strand, then of the other.

    Those of the other strand are the windows of the reverse-complemented reference and variant, so that the mean of
    both is the same whichever strand the file describes.
    """
    start, end = variant.position - 1, variant.position - 1 + len(variant.reference)
    # An indel within a repeat can shift by the length of the repeat: up to one more window is examined.
    before = genome.letters(contig, max(0, start - 2 * length), start).upper()
    after = genome.letters(contig, end, min(genome.lengths[contig], end + 2 * length)).upper()
    sides = (before, variant.reference.upper().encode(), alternative.upper().encode(), after)
    windows = [haplotype_windows(*sides, length)]
    if both_strands:
        other_before, other_reference, other_alternative, other_after = map(reverse_complement, sides)
        windows.append(haplotype_windows(other_after, other_reference, other_alternative, other_before, length))
    return windows


def haplotype_windows(
    before: bytes, reference: bytes, alternative: bytes, after: bytes, length: int
) -> HaplotypeWindows:
    """Return windows of equal length, up to `length` bp, around the first base in which the haplotypes differ.

    The (length - 1) // 2 bases before it are shared; then follow equally long continuations of both haplotypes: with a
    deletion the alternative window extends further into the reference, with an insertion less far. The result does not
    depend on the placement of an indel within a repeat, since all placements give the same haplotypes.

    Args:
        before, after: upper-case letters of the reference on both sides, fewer than requested only at contig ends.
        reference, alternative: the alleles, upper-case and different.
        length: window length, bp.
    """
    haplotypes = [before + allele + after for allele in (reference, alternative)]
    shorter = min(len(haplotype) for haplotype in haplotypes)
    first, second = (np.frombuffer(haplotype, dtype=np.uint8, count=shorter) for haplotype in haplotypes)
    differing = np.flatnonzero(first != second)
    start = int(differing[0]) if len(differing) else shorter
    context = (length - 1) // 2
    size = min(length - context, shorter - start)
    continuations = [haplotype[start : start + size] for haplotype in haplotypes]
    unknown = np.flatnonzero(~(is_known(continuations[0]) & is_known(continuations[1])))
    return HaplotypeWindows(
        context=haplotypes[0][max(0, start - context) : start],
        reference=continuations[0],
        alternative=continuations[1],
        known=int(unknown[0]) if len(unknown) else size,
        longest_allele=max(trimmed_lengths(reference.decode(), alternative.decode())),
        replaces=len(reference) == len(alternative),
    )


def is_known(letters: bytes) -> npt.NDArray[np.bool_]:
    """Return for each letter whether it is an upper-case A, C, G or T."""
    return _IS_KNOWN_BASE[np.frombuffer(letters, dtype=np.uint8)]
