"""The published species tasks: their assemblies, download locations, and splits by chromosome.

There are two tasks. *hyena-species* is that of HyenaDNA (Nguyen et al., arXiv 2306.15794, section 4.4): human, lemur,
mouse, pig and hippopotamus, with the assemblies, chromosomes and splits of its public code. *great-apes* is that of the
Mamba paper (Gu & Dao, arXiv 2312.00752, section 4.3.3), which specifies neither assemblies nor splits: here it uses
assemblies with human chromosome numbering, and the splits of HyenaDNA's code for chimpanzee, gorilla and orangutan.

Chromosomes 1, 3, 12 and 13 are the published test set. HyenaDNA's code also excludes 5, 7, 9, 10 and 11 from training,
so these are used for validation, and the test set is not used for any choice. Splits are given in human numbers; where
human chromosome 2 corresponds to two in the other apes, number 2 stands for both 2A and 2B (`Assembly.named`), which
are therefore always in the same split. Y is not used for the apes: three of the five assemblies are of females and lack
it. Gorilla chromosomes 5 and 17 are the product of a translocation, so part of its chromosome 17, a training
chromosome, is homologous to chromosome 5 of the others, a validation chromosome; the test set is not affected.

Checksums are given where they are known for certain. If `checksum` is None, it is read from `checksum_list`, published
by the archive: `md5sum.txt` beside the file at UCSC, `md5checksums.txt` in the assembly's folder at NCBI. Likewise a
`size` of None is taken from the server.
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
        name: file name in the assembly's folder; gzip-compressed.
        urls: its locations, in order of preference.
        chromosomes: its records that are used. A file with `named_by_file` has a single record, which is the listed
            chromosome whatever the name in its header (an accession).
        named_by_file: see `chromosomes`.
        size: size in bytes; None if not known for certain.
        checksum: `md5:...`; None if it is to be read from `checksum_list`.
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
        """Name of the decompressed file."""
        return self.name.removesuffix(".gz")


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The pinned assembly of one species.

    Attributes:
        species: class name in the task.
        scientific_name: scientific name of the organism.
        name: name of the assembly and of the folder of its files.
        accession: NCBI accession with version.
        files: the required files.
    """

    species: str
    scientific_name: str
    name: str
    accession: str
    files: tuple[AssemblyFile, ...]

    @property
    def chromosomes(self) -> tuple[str, ...]:
        """Names of the chromosomes used, such as `chr1`, `chr2A`, `chrX`."""
        return tuple(name for file in self.files for name in file.chromosomes)

    def named(self, numbers: Sequence[str]) -> tuple[str, ...]:
        """Return the chromosomes with the given numbers: `2` is `chr2`, or both `chr2A` and `chr2B`.

        Numbers that the assembly lacks are ignored.
        """
        wanted = {f"chr{number}{arm}" for number in numbers for arm in (("", "A", "B") if number == "2" else ("",))}
        return tuple(name for name in self.chromosomes if name in wanted)

    def path(self, folder: Path, file: AssemblyFile) -> Path:
        """Return the path of a file in a folder of downloads: `FOLDER/ASSEMBLY/FILE`."""
        return folder / self.name / file.name


@dataclasses.dataclass(frozen=True)
class SpeciesProtocol:
    """A published task.

    Attributes:
        name: name used in commands.
        title: descriptive title.
        source: the publication.
        assemblies: one per class, in the order of the labels.
        lengths: window lengths of the published table, bp.
        validation_numbers, test_numbers: chromosome numbers excluded from training.
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
        """Names of the species, in the order of the labels."""
        return tuple(assembly.species for assembly in self.assemblies)

    def chromosomes(self, assembly: Assembly, split: str) -> tuple[str, ...]:
        """Return the chromosomes of an assembly in the split `train`, `valid` or `test`.

        Raises:
            ValueError: if the split is unknown.
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
        InputError: if the name is unknown.
    """
    if name not in SPECIES_PROTOCOLS:
        raise InputError(f"there is no species task '{name}': use {' or '.join(SPECIES_PROTOCOLS)}.")
    return SPECIES_PROTOCOLS[name]


def _numbered(last: int, *others: str, two_is_two: bool = False) -> tuple[str, ...]:
    """`chr1` to `chr<last>` and others, with `chr2A` and `chr2B` in place of `chr2` if requested."""
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
    """Describe an assembly at UCSC: one soft-masked file with records such as `chr1`, and `md5sum.txt`."""
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
    """Describe an assembly at NCBI: one file per chromosome, whose only record is named by its accession."""
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
"""The assemblies of the other great apes are the last ones at UCSC with human chromosome numbering."""

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
