"""The genomes of a published species task, from a folder of downloads laid out by `genomamba.data.assemblies`."""

import dataclasses
from pathlib import Path

from genomamba.data.assemblies import SPLITS, Assembly, AssemblyFile, SpeciesProtocol
from genomamba.data.genomes import GenomeCollection, GenomeSequence, GenomeSpecification, SequenceStore, load_genomes
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError


@dataclasses.dataclass(frozen=True)
class ProtocolGenomes:
    """Training, validation and test sequences from disjoint chromosomes, with the same labels."""

    train: GenomeCollection
    valid: GenomeCollection
    test: GenomeCollection


def load_protocol_genomes(protocol: SpeciesProtocol, folder: Path) -> ProtocolGenomes:
    """Read the assemblies of a task from `FOLDER/ASSEMBLY/FILE`.

    Decompressed files, named without `.gz`, are read through an index. Compressed ones are held in memory, 1 byte per
    base.

    Raises:
        InputError: if a file is missing, or a file lacks a chromosome; the message names the first.
    """
    missing = [
        assembly.path(folder, file)
        for assembly in protocol.assemblies
        for file in assembly.files
        if _present(folder, assembly, file) is None
    ]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{missing[0]}{others} of the task {protocol.name} is missing: fetch the assemblies with "
            f"`genomamba fetch {protocol.name}`, or name the folder they are in with --data."
        )
    sequences = {
        (assembly.species, sequence.name): sequence
        for assembly in protocol.assemblies
        for file in assembly.files
        for sequence in _chromosomes(folder, assembly, file)
    }
    parts = [
        GenomeCollection(
            protocol.class_names,
            tuple(
                sequences[assembly.species, name]
                for assembly in protocol.assemblies
                for name in protocol.chromosomes(assembly, split)
            ),
        )
        for split in SPLITS
    ]
    return ProtocolGenomes(*parts)


@dataclasses.dataclass(frozen=True)
class _RenamedStore:
    """A store whose record has been renamed."""

    store: SequenceStore
    record_name: str

    def fetch(self, name: str, start: int, end: int) -> Tokens:
        return self.store.fetch(self.record_name, start, end)


def _chromosomes(folder: Path, assembly: Assembly, file: AssemblyFile) -> list[GenomeSequence]:
    """Return the used records of a file, named by chromosome."""
    path = _present(folder, assembly, file)
    records = load_genomes([GenomeSpecification(assembly.species, (str(path),))]).sequences
    if file.named_by_file:
        if len(records) != 1:
            raise InputError(
                f"{path} must contain only {file.chromosomes[0]}, but has {len(records)} records: fetch it again."
            )
        record = records[0]
        return [dataclasses.replace(record, name=file.chromosomes[0], store=_RenamedStore(record.store, record.name))]
    by_name = {record.name: record for record in records}
    for name in file.chromosomes:
        if name not in by_name:
            raise InputError(f"{path} has no record {name}, which {assembly.name} must have: fetch it again.")
    return [by_name[name] for name in file.chromosomes]


def _present(folder: Path, assembly: Assembly, file: AssemblyFile) -> Path | None:
    """Return the decompressed file if it exists, else the compressed one, else None."""
    path = assembly.path(folder, file)
    for candidate in (path.with_name(file.plain_name), path):
        if candidate.is_file():
            return candidate
    return None
