"""The published species tasks: what is pinned, how chromosomes are split, and how downloads are read."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from genomamba.data.assemblies import GREAT_APES, HYENA_SPECIES, SPECIES_PROTOCOLS, SPLITS, species_protocol
from genomamba.data.assembly_genomes import load_protocol_genomes
from mambacore.errors import InputError
from tiny_assemblies import write_assemblies


@pytest.mark.parametrize("protocol", SPECIES_PROTOCOLS.values(), ids=SPECIES_PROTOCOLS)
def test_every_chromosome_is_in_exactly_one_split(protocol) -> None:
    for assembly in protocol.assemblies:
        parts = [protocol.chromosomes(assembly, split) for split in SPLITS]
        assert sorted(name for part in parts for name in part) == sorted(assembly.chromosomes)
        assert set(parts[2]) == {"chr1", "chr3", "chr12", "chr13"}
        assert set(parts[1]) == {"chr5", "chr7", "chr9", "chr10", "chr11"}


def test_number_2_is_2a_and_2b_where_human_chromosome_2_is_two() -> None:
    human, chimpanzee = GREAT_APES.assemblies[:2]
    assert human.named(["2", "3"]) == ("chr2", "chr3")
    assert chimpanzee.named(["2", "3"]) == ("chr2A", "chr2B", "chr3")
    assert not set(chimpanzee.named(["1"])) & {"chr2A", "chr10"}
    assert {"chr2A", "chr2B"} <= set(GREAT_APES.chromosomes(chimpanzee, "train"))


def test_assemblies_are_pinned_with_their_addresses() -> None:
    assert GREAT_APES.class_names == ("human", "chimpanzee", "gorilla", "orangutan", "bonobo")
    assert HYENA_SPECIES.class_names == ("human", "lemur", "mouse", "pig", "hippo")
    lemur = HYENA_SPECIES.assemblies[1]
    assert lemur.files[0].urls == (
        "https://ftp.ncbi.nlm.nih.gov/genomes/all/GCA/020/740/605/GCA_020740605.1_mLemCat1.pri/"
        "GCA_020740605.1_mLemCat1.pri_assembly_structure/Primary_Assembly/assembled_chromosomes/FASTA/chr1.fna.gz",
    )
    for protocol in SPECIES_PROTOCOLS.values():
        for assembly in protocol.assemblies:
            assert "." in assembly.accession
            assert all(file.checksum or file.checksum_list for file in assembly.files)


@pytest.mark.parametrize("protocol", SPECIES_PROTOCOLS.values(), ids=SPECIES_PROTOCOLS)
def test_downloads_are_read_by_chromosome_whatever_records_are_called(protocol, tmp_path: Path) -> None:
    letters = write_assemblies(tmp_path, protocol, chromosome_bp=120)
    genomes = load_protocol_genomes(protocol, tmp_path)
    assert {sequence.name for sequence in genomes.test.sequences} == {"chr1", "chr3", "chr12", "chr13"}
    for collection in (genomes.train, genomes.valid, genomes.test):
        assert collection.class_names == protocol.class_names
        for sequence in collection.sequences:
            codes = np.array([b"ACGT".index(letter) + 7 for letter in letters[sequence.class_name, sequence.name]])
            assert np.array_equal(sequence.tokens(5, 100), codes[5:100])


def test_a_decompressed_file_is_as_good(tmp_path: Path) -> None:
    write_assemblies(tmp_path, GREAT_APES, chromosome_bp=60)
    compressed = tmp_path / "hg38" / "hg38.fa.gz"
    (tmp_path / "hg38" / "hg38.fa").write_bytes(gzip.decompress(compressed.read_bytes()))
    compressed.unlink()
    assert len(load_protocol_genomes(GREAT_APES, tmp_path).train.sequences) > 0


def test_missing_files_and_chromosomes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hg38.fa.gz and 4 more of the task great-apes is missing"):
        load_protocol_genomes(GREAT_APES, tmp_path)
    write_assemblies(tmp_path, GREAT_APES, chromosome_bp=60)
    path = tmp_path / "panTro6" / "panTro6.fa.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b">chr2A\n", b">chr2_A\n")))
    with pytest.raises(InputError, match=r"panTro6.fa.gz has no record chr2A"):
        load_protocol_genomes(GREAT_APES, tmp_path)
    with pytest.raises(InputError, match="there is no species task 'apes'"):
        species_protocol("apes")
