"""Embeddings of records and windows: the run behind `genomamba embed`, to Parquet, .npz and AnnData."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from genomamba.data.bed import read_bed
from genomamba.io.reference import Reference
from genomamba.io.sources import read_sequences
from genomamba.models.language_model import LanguageModel, load_language_model
from genomamba.scoring.embeddings import Embedder, Piece, as_the_model_reads, embed_pieces, require_windows, windows_of
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError
from mambapipelines.console import WorkProgress, counted, note
from mambapipelines.device import begin_computing
from mambapipelines.files import check_writable_place, written_whole

ENDINGS = {".parquet": "pyarrow", ".npz": None, ".h5ad": "anndata"}
"""What the name of the output ends in, and the library that writes it beyond those that are always there."""


COLUMNS = ("name", "start", "end")
COLUMNS_OF_REGIONS = (*COLUMNS, "region", "strand")
"""What is written beside each vector; with regions also the name and the strand of each in the BED file."""


@dataclass(frozen=True)
class EmbeddingOptions:
    """Options of `genomamba embed`; its `--help` describes each."""

    model: str
    fasta: list[str]
    bed: str | None
    reference: str | None
    output: Path
    pooling: str
    layer: int | None
    both_strands: bool
    window: int | None
    stride: int | None
    threads: int | None
    device: str = "auto"
    precision: str = "float32"


def run_embedding(options: EmbeddingOptions) -> None:
    """Write one vector per record, region or window.

    Raises:
        InputError: the files or options contradict each other.
    """
    ending = options.output.suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"--output {options.output} has no known ending: name a file .parquet, .npz or .h5ad.")
    library = ENDINGS[ending]
    if library is not None and importlib.util.find_spec(library) is None:
        raise InputError(
            f"writing {ending} needs {library}, which is not installed: `pip install 'genomamba[tables]'`, or name a "
            "file that ends in .npz."
        )
    check_writable_place(options.output, "--output", (*options.fasta, options.bed, options.reference))
    require_windows(options.window, options.stride)
    if (options.bed is None) != (options.reference is None):
        raise InputError("--bed and --reference belong together: give both, or FASTA files.")
    if bool(options.fasta) == (options.bed is not None):
        raise InputError("give FASTA files, or --bed with --reference, and not both.")
    placement = begin_computing(options.device, options.precision, options.threads)
    language_model = load_language_model(options.model).to(placement.device)
    embedder = Embedder(language_model, options.pooling, options.layer, options.both_strands)
    columns = COLUMNS if options.bed is None else COLUMNS_OF_REGIONS
    count = bases = empty = 0
    with (
        _WRITERS[ending](options.output, embedder.width, columns, _details(options, language_model)) as writer,
        WorkProgress("embedding", None, lines_elsewhere=True) as progress,
        placement.autocast(),
    ):
        for pieces, vectors in embed_pieces(embedder, _pieces(options, language_model)):
            writer.write(pieces, vectors)
            count += len(pieces)
            bases += sum(len(piece.tokens) for piece in pieces)
            empty += sum(not len(piece.tokens) for piece in pieces)
            progress.advance(sum(len(piece.tokens) for piece in pieces), f"{count} vectors")
    without = f", {empty} of them NaN because their record has no bases" if empty else ""
    note(f"{counted(count, 'vector')} of {embedder.width} channels from {counted(bases, 'base')}{without}")


def _details(options: EmbeddingOptions, language_model: LanguageModel) -> dict[str, Any]:
    """What the file says about its vectors; what does not apply is left out."""
    stated = {
        "model": options.model,
        "objective": language_model.objective,
        "layer": options.layer or "last",
        "pooling": options.pooling,
        "strands": "both" if options.both_strands else "given",
        "window_bp": options.window,
        "stride_bp": options.stride,
        "sequences": ", ".join(options.fasta) or options.bed,
        "reference": options.reference,
    }
    return {"program": "genomamba embed"} | {key: value for key, value in stated.items() if value is not None}


def _pieces(options: EmbeddingOptions, language_model: LanguageModel) -> Iterator[Piece]:
    if options.bed is None:
        for path in options.fasta:
            for record in read_sequences(path):
                tokens = as_the_model_reads(language_model, record.tokens)
                yield from windows_of(record.name, tokens, 0, options.window, options.stride)
        return
    assert options.reference is not None  # the options have been checked
    tokenizer = CharacterTokenizer()
    with Reference(options.reference) as genome:
        for region in read_bed(options.bed, genome.lengths, options.reference):
            tokens = genome.tokens(region.contig, region.start, region.end)
            # Windows are cut first: their positions are those of the contig, whatever the strand.
            for piece in windows_of(region.contig, tokens, region.start, options.window, options.stride):
                read = tokenizer.reverse_complement(piece.tokens) if region.strand == "-" else piece.tokens
                tokens_read = as_the_model_reads(language_model, read)
                yield Piece(piece.name, piece.start, piece.end, tokens_read, region.name, region.strand)


class _Writer(Protocol):
    def write(self, pieces: Sequence[Piece], vectors: npt.NDArray[np.float32]) -> None: ...


class _Parquet:
    """Writes row groups as they arrive, so memory does not grow with the number of vectors."""

    def __init__(self, opened: Any, schema: Any) -> None:
        self._opened, self._schema = opened, schema

    def write(self, pieces: Sequence[Piece], vectors: npt.NDArray[np.float32]) -> None:
        import pyarrow  # noqa: PLC0415 - an extra

        flat = pyarrow.array(vectors.ravel())
        *fields, _ = self._schema
        columns = [pyarrow.array([getattr(piece, field.name) for piece in pieces], field.type) for field in fields]
        columns.append(pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
        self._opened.write_table(pyarrow.Table.from_arrays(columns, schema=self._schema))


class _Held:
    """Collects all vectors in memory and writes them at the end, as the other formats require."""

    def __init__(self, width: int, columns: Sequence[str]) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in columns}
        self._vectors = [np.empty((0, width), dtype=np.float32)]

    def write(self, pieces: Sequence[Piece], vectors: npt.NDArray[np.float32]) -> None:
        for name, column in self.columns.items():
            column += [getattr(piece, name) for piece in pieces]
        self._vectors.append(vectors)

    def vectors(self) -> npt.NDArray[np.float32]:
        return np.concatenate(self._vectors)


@contextmanager
def _parquet(path: Path, width: int, columns: Sequence[str], details: Mapping[str, Any]) -> Iterator[_Writer]:
    import pyarrow  # noqa: PLC0415 - an extra
    import pyarrow.parquet  # noqa: PLC0415

    schema = pyarrow.schema(
        [
            *((name, pyarrow.int64() if name in ("start", "end") else pyarrow.string()) for name in columns),
            ("embedding", pyarrow.list_(pyarrow.float32(), width)),
        ],
        metadata={"genomamba": json.dumps(details)},
    )
    with written_whole(path) as stream, pyarrow.parquet.ParquetWriter(stream, schema) as opened:
        yield _Parquet(opened, schema)


@contextmanager
def _npz(path: Path, width: int, columns: Sequence[str], details: Mapping[str, Any]) -> Iterator[_Writer]:
    held = _Held(width, columns)
    yield held
    arrays: dict[str, Any] = {
        name: np.array(values, dtype=np.int64 if name in ("start", "end") else np.str_)
        for name, values in held.columns.items()
    }
    with written_whole(path) as stream:
        np.savez(stream, embedding=held.vectors(), details=np.array(json.dumps(details)), **arrays)


@contextmanager
def _anndata(path: Path, width: int, columns: Sequence[str], details: Mapping[str, Any]) -> Iterator[_Writer]:
    import anndata  # noqa: PLC0415 - an extra
    import h5py  # noqa: PLC0415 - comes with anndata
    import pandas  # noqa: PLC0415 - comes with anndata

    held = _Held(width, columns)
    yield held
    vectors = held.vectors()
    rows = pandas.DataFrame(held.columns, index=[str(row) for row in range(len(vectors))])
    table = anndata.AnnData(vectors, obs=rows, uns={"genomamba": dict(details)})
    # The file is locked already while it is written.
    with written_whole(path) as stream, h5py.File(stream.name, "w", locking=False) as opened:
        anndata.io.write_elem(opened, "/", table)


_WRITERS = {".parquet": _parquet, ".npz": _npz, ".h5ad": _anndata}
