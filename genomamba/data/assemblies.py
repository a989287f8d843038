"""The published species tasks: which assemblies, where they lie, which chromosomes are for training and for testing.

Two tasks. *hyena-species* is that of HyenaDNA (Nguyen et al., arXiv 2306.15794, section 4.4): human, lemur, mouse, pig
and hippopotamus, with the assemblies, chromosomes and splits of its public code. *great-apes* is that of the Mamba
paper (Gu & Dao, arXiv 2312.00752, section 4.3.3), which states neither assemblies nor splits: here they are assemblies
whose chromosomes carry the human numbers, and the splits that HyenaDNA's code has for chimpanzee, gorilla and
orangutan.

Chromosomes 1, 3, 12 and 13 are the published test set. HyenaDNA's code keeps 5, 7, 9, 10 and 11 out of training too, so
these are for validation, and nothing that is chosen looks at the test set. A split is stated in numbers; where human's
chromosome 2 is two in the other apes, number 2 stands for 2A and 2B together (`Assembly.named`), which are therefore
always on the same side. Y is not used among the apes: three of the five assemblies are of females and have none.
Gorilla's chromosomes 5 and 17 have exchanged arms compared with the other apes' (a translocation), so that part of its
chromosome 17, trained on, is the counterpart of their 5, which is only for validation; the test set is not concerned.

Checksums are stated where they are known for certain. Where `checksum` is None, `checksum_list` is the text in which
the archive states it: `md5sum.txt` beside the file at UCSC, `md5checksums.txt` in the assembly's folder at NCBI. The
same holds for `size`, which is otherwise what the server says.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mambacore.errors import InputError

UCSC_MIRRORS: Final = ("https://hgdownload.soe.ucsc.edu", "https://hgdownload2.soe.ucsc.edu")
NCBI: Final = "https://ftp.ncbi.nlm.nih.gov/genomes/all"
TEST_NUMBERS: Final = ("1", "3", "12", "13")
VALIDATION_NUMBERS: Final = ("5", "7", "9", "10", "11")
SPLITS: Final = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class AssemblyFile:
    """One file of an assembly.

    Attributes:
        name: in the assembly's folder; gzip.
        urls: where it is, the preferred place first.
        chromosomes: those of its records that are used. A file with `named_by_file` has one record, which is the one
            chromosome listed whatever its header calls it (an accession).
        named_by_file: see `chromosomes`.
        size: bytes; None where it is not known for certain.
        checksum: `md5:...`; None where it is to be read from `checksum_list`.
        checksum_list: address of a text with a line `CHECKSUM FILE` for each file.
    """

    name: str
    urls: tuple[str, ...]
    chromosomes: tuple[str, ...]
    named_by_file: bool = False
    size: int | None = None
    checksum: str | None = None
    checksum_list: str | None = None

    @property
    def plain_name(self) -> str:
        """The file's name once it is decompressed."""
        return self.name.removesuffix(".gz")


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The pinned assembly of one species.

    Attributes:
        species: the class in the task.
        scientific_name: of the organism.
        name: of the assembly; files lie in a folder of this name.
        accession: with version, at NCBI.
        files: all that is needed of it.
    """

    species: str
    scientific_name: str
    name: str
    accession: str
    files: tuple[AssemblyFile, ...]

    @property
    def chromosomes(self) -> tuple[str, ...]:
        """Names of the chromosomes that are used: `chr1`, `chr2A`, `chrX`."""
        return tuple(name for file in self.files for name in file.chromosomes)

    def named(self, numbers: Sequence[str]) -> tuple[str, ...]:
        """Chromosomes of some numbers: `2` is `chr2`, or `chr2A` and `chr2B` where it is two.

        Numbers that the assembly does not have give nothing.
        """
        wanted = {f"chr{number}{arm}" for number in numbers for arm in (("", "A", "B") if number == "2" else ("",))}
        return tuple(name for name in self.chromosomes if name in wanted)

    def path(self, folder: Path, file: AssemblyFile) -> Path:
        """Where a file lies in a folder of downloads: `FOLDER/ASSEMBLY/FILE`."""
        return folder / self.name / file.name


@dataclasses.dataclass(frozen=True)
class SpeciesProtocol:
    """A published task.

    Attributes:
        name: what commands call it.
        title: in words.
        source: publication.
        assemblies: one for each class, in the order of the labels.
        lengths: window lengths of the published table, bp.
        validation_numbers, test_numbers: chromosomes that are never trained on.
    """

    name: str
    title: str
    source: str
    assemblies: tuple[Assembly, ...]
    lengths: tuple[int, ...]
    validation_numbers: tuple[str, ...] = VALIDATION_NUMBERS
    test_numbers: tuple[str, ...] = TEST_NUMBERS

    @property
    def class_names(self) -> tuple[str, ...]:
        """Species, in the order of the labels."""
        return tuple(assembly.species for assembly in self.assemblies)

    def chromosomes(self, assembly: Assembly, split: str) -> tuple[str, ...]:
        """Chromosomes of an assembly that belong to `train`, `valid` or `test`.

        Raises:
            ValueError: another split.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}, only {', '.join(SPLITS)}")
        test, valid = assembly.named(self.test_numbers), assembly.named(self.validation_numbers)
        if split == "train":
            return tuple(name for name in assembly.chromosomes if name not in test and name not in valid)
        return test if split == "test" else valid


def species_protocol(name: str) -> SpeciesProtocol:
    """Return a task by name.

    Raises:
        InputError: another name.
    """
    if name not in SPECIES_PROTOCOLS:
        raise InputError(f"there is no species task '{name}': use {' or '.join(SPECIES_PROTOCOLS)}.")
    return SPECIES_PROTOCOLS[name]


def _numbered(last: int, *others: str, two_is_two: bool = False) -> tuple[str, ...]:
    """`chr1` to `chr<last>` and others, with `chr2A` and `chr2B` in place of `chr2` if asked."""
    numbers: list[str] = []
    for number in range(1, last + 1):
        numbers += ["2A", "2B"] if number == 2 and two_is_two else [str(number)]
    return tuple(f"chr{number}" for number in (*numbers, *others))


def _from_ucsc(
    species: str,
    scientific_name: str,
    database: str,
    accession: str,
    two_is_two: bool = True,
    size: int | None = None,
    checksum: str | None = None,
) -> Assembly:
    """An assembly as UCSC keeps it: one soft-masked file, records named `chr1`, beside it `md5sum.txt`."""
    place = f"goldenPath/{database}/bigZips"
    file = AssemblyFile(
        name=f"{database}.fa.gz",
        urls=tuple(f"{mirror}/{place}/{database}.fa.gz" for mirror in UCSC_MIRRORS),
        chromosomes=_numbered(22, "X", two_is_two=two_is_two),
        size=size,
        checksum=checksum,
        checksum_list=f"{UCSC_MIRRORS[0]}/{place}/md5sum.txt",
    )
    return Assembly(species, scientific_name, database, accession, (file,))


def _from_ncbi(species: str, scientific_name: str, accession: str, name: str, chromosomes: tuple[str, ...]) -> Assembly:
    """An assembly as NCBI keeps it: one file for each chromosome, whose only record is named by its accession."""
    digits = accession.removeprefix("GCA_").partition(".")[0]
    folder = f"{NCBI}/GCA/{digits[:3]}/{digits[3:6]}/{digits[6:9]}/{accession}_{name}"
    place = f"{folder}/{accession}_{name}_assembly_structure/Primary_Assembly/assembled_chromosomes/FASTA"
    files = tuple(
        AssemblyFile(
            name=f"{chromosome}.fna.gz",
            urls=(f"{place}/{chromosome}.fna.gz",),
            chromosomes=(chromosome,),
            named_by_file=True,
            checksum_list=f"{folder}/md5checksums.txt",
        )
        for chromosome in chromosomes
    )
    return Assembly(species, scientific_name, name, accession, files)


GREAT_APES: Final = SpeciesProtocol(
    name="great-apes",
    title="Great Apes",
    source="Gu & Dao, arXiv 2312.00752, section 4.3.3",
    assemblies=(
        _from_ucsc(
            "human",
            "Homo sapiens",
            "hg38",
            "GCA_000001405.15",
            two_is_two=False,
            size=983_659_424,
            checksum="md5:1c9dcaddfa41027f17cd8f7a82c7293b",
        ),
        _from_ucsc("chimpanzee", "Pan troglodytes", "panTro6", "GCA_002880755.3"),
        _from_ucsc("gorilla", "Gorilla gorilla gorilla", "gorGor6", "GCA_008122165.1"),
        _from_ucsc("orangutan", "Pongo abelii", "ponAbe3", "GCA_002880775.3"),
        _from_ucsc("bonobo", "Pan paniscus", "panPan3", "GCF_013052645.1"),
    ),
    lengths=(1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576),
)
"""The other great apes' assemblies are the last ones whose chromosomes UCSC calls by the human numbers."""

HYENA_SPECIES: Final = SpeciesProtocol(
    name="hyena-species",
    title="HyenaDNA's five mammals",
    source="Nguyen et al., arXiv 2306.15794, section 4.4, and the public code's list of downloads",
    assemblies=(
        _from_ncbi("human", "Homo sapiens", "GCA_009914755.4", "T2T-CHM13v2.0", _numbered(22, "X", "Y")),
        _from_ncbi("lemur", "Lemur catta", "GCA_020740605.1", "mLemCat1.pri", _numbered(27, "X", "Y")),
        _from_ncbi("mouse", "Mus musculus", "GCA_921998355.2", "A_J_v3", _numbered(19, "X")),
        _from_ncbi("pig", "Sus scrofa", "GCA_002844635.1", "USMARCv1.0", _numbered(18, "X", "Y")),
        _from_ncbi("hippo", "Hippopotamus amphibius", "GCA_023065835.1", "ASM2306583v1", _numbered(17, "X")),
    ),
    lengths=(1_024, 32_768, 250_000, 450_000, 1_000_000),
)

SPECIES_PROTOCOLS: Final[dict[str, SpeciesProtocol]] = {
    protocol.name: protocol for protocol in (GREAT_APES, HYENA_SPECIES)
}
