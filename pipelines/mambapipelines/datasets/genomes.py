"""Public data sets of DNA: the assemblies of the published species tasks, and the human genome."""

from __future__ import annotations

import gzip
import shutil
import zlib
from pathlib import Path
from typing import Final

from genomamba.data.assemblies import SPECIES_PROTOCOLS, SpeciesProtocol
from mambacore.errors import InputError
from mambapipelines.datasets.downloads import RemoteFile
from mambapipelines.datasets.fetch import DataSet, SetFile
from mambapipelines.files import written_whole

BASENJI: Final = "https://storage.googleapis.com/basenji_barnyard2"
COPIED_BYTES: Final = 1 << 22


def decompress(archive: Path, ready: Path) -> None:
    """Decompress a gzip file: random access needs plain FASTA.

    Raises:
        InputError: the archive is damaged, or the disk is full.
    """
    try:
        with gzip.open(archive) as compressed, written_whole(ready) as plain:
            shutil.copyfileobj(compressed, plain, COPIED_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{archive} is damaged ({error}): remove it and run the same command again.") from None


def _of_protocol(protocol: SpeciesProtocol) -> DataSet:
    parts = {
        assembly.species: tuple(
            SetFile(
                RemoteFile(file.name, file.urls, file.size, file.checksum, file.checksum_list), folder=assembly.name
            )
            for file in assembly.files
        )
        for assembly in protocol.assemblies
    }
    return DataSet(protocol.name, f"{protocol.title} ({protocol.source})", parts)


HG38: Final = DataSet(
    "hg38",
    "the human genome and the windows that HyenaDNA, Caduceus and the Mamba paper pretrain on",
    {
        "genome": (
            SetFile(RemoteFile("hg38.ml.fa.gz", (f"{BASENJI}/hg38.ml.fa.gz",)), ready="hg38.ml.fa", prepare=decompress),
        ),
        "intervals": (SetFile(RemoteFile("human-sequences.bed", (f"{BASENJI}/sequences_human.bed",))),),
    },
)
"""Hosted where the public code of HyenaDNA (arXiv 2306.15794) fetches them; the server states their checksums."""

DNA_SETS: Final = {data.name: data for data in (*map(_of_protocol, SPECIES_PROTOCOLS.values()), HG38)}
