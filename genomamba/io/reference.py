"""Random access to a reference genome of any size, from any number of processes.

A file handle shared by two processes gives wrong sequences, because each moves the other's position (pyfaidx issue
211). Here every process opens its own handle, of an index that is complete (`genomamba.io.reference_index`).
"""

import difflib
import os
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Final

import numpy as np
import pyfaidx

from genomamba.alphabet import UNKNOWN_SYMBOLS_AS_N, describe_byte, diagnose_invalid_byte, first_invalid_position
from genomamba.io.compression import LOGGER
from genomamba.io.reference_index import ensure_index, identity_of, is_block_gzip, open_index
from genomamba.tokenizer import TOKEN_OF_BYTE, Tokens
from mambacore.errors import InputError

_MOST_NEAR_NAMES: Final = 3


class Reference:
    """The contigs of one FASTA file, with random access.

    The file is plain, or BGZF (block gzip). Objects may be used from several threads, forked and pickled: each process
    opens its own handle. Changes of the file while in use are detected.

    `lengths` maps the name of each contig, in file order, to its length in bp.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a FASTA file; its index is built if it is missing or does not match the file.

        The index is stored beside the file (`.fai`, as in samtools) or, if that folder is not writable, in the user's
        cache folder.

        Raises:
            InputError: if the file is missing, not FASTA, compressed without random access, or has repeated contig
                names or lines of uneven length.
        """
        self.path = os.fspath(path)
        self._identity = identity_of(self.path)
        self._is_compressed = is_block_gzip(self.path)
        self._index_path = ensure_index(self.path, self._is_compressed)
        self._handle: pyfaidx.Faidx | None = None
        self._process_id = 0
        self._warned = False
        self._opening = threading.Lock()
        self.lengths: Mapping[str, int] = MappingProxyType(
            {name: record.rlen for name, record in self._open().index.items()}
        )
        self._require_unchanged()

    def letters(self, contig: str, start: int, end: int, pad: bool = False) -> bytes:
        """Return bases [start, end), 0-based and half-open, as in the file: IUPAC codes in either case.

        With `pad`, positions outside the contig are N; otherwise they are an error.

        Raises:
            InputError: if the contig does not exist (with the nearest names), the range is outside it, a byte is not a
                nucleotide code, or the file has changed since it was opened.
        """
        length = self.length(contig)
        if end < start or (not pad and not 0 <= start <= end <= length):
            raise InputError(
                f"[{start}, {end}) is not a range within the {length} bp of '{contig}' in {self.path}: "
                "give 0-based starts and ends within the contig."
            )
        inside_start, inside_end = min(max(start, 0), length), max(min(end, length), 0)
        inside = self._fetch(contig, inside_start, inside_end) if inside_start < inside_end else b""
        if len(inside) == end - start:
            return inside
        before = min(max(-start, 0), end - start)
        return b"N" * before + inside + b"N" * (end - start - before - len(inside))

    def tokens(self, contig: str, start: int, end: int, pad: bool = False) -> Tokens:
        """Return the tokens of bases [start, end), ignoring case, uint8 of shape (end - start,).

        Raises:
            InputError: as `letters`.
        """
        letters = self.letters(contig, start, end, pad)
        return np.frombuffer(bytearray(letters.translate(TOKEN_OF_BYTE)), dtype=np.uint8)

    def length(self, contig: str) -> int:
        """Return the length of a contig in bp.

        Raises:
            InputError: if the contig does not exist, with the nearest names.
        """
        try:
            return self.lengths[contig]
        except KeyError:
            raise InputError(
                f"{self.path} has no contig named '{contig}': {suggest_names(contig, self.lengths)}."
            ) from None

    def close(self) -> None:
        """Close this process's handle; the next use opens another."""
        with self._opening:
            if self._handle is not None and self._process_id == os.getpid():
                self._handle.close()
            self._handle = None

    def __enter__(self) -> "Reference":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_opening": None, "lengths": dict(self.lengths)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lengths=MappingProxyType(state["lengths"]), _opening=threading.Lock())

    def _fetch(self, contig: str, start: int, end: int) -> bytes:
        self._require_unchanged()
        handle = self._open()
        try:
            letters: bytes = handle.fetch(contig, start + 1, end).encode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path} has byte 0x{error.object[error.start]:02x} in contig '{contig}', which looks like binary "
                "content: give a FASTA text file."
            ) from error
        except (OSError, ValueError, OverflowError, MemoryError, pyfaidx.FetchError) as error:
            raise InputError(
                f"{self.path} cannot be read at '{contig}' ({error}): copy or download it again."
            ) from error
        letters = self._without_symbols(letters)
        invalid = first_invalid_position(letters)
        if invalid is not None:
            byte = letters[invalid]
            raise InputError(
                f"{self.path} has {describe_byte(byte)} at base {start + invalid + 1} of contig '{contig}', "
                f"{'where lines hold only bases: remove spaces' if byte in b' ' else diagnose_invalid_byte(byte)}."
            )
        if len(letters) != end - start:
            raise self._changed()
        return letters

    def _without_symbols(self, letters: bytes) -> bytes:
        """Replace symbols for unknown bases by N, with a warning the first time."""
        replaced = letters.translate(UNKNOWN_SYMBOLS_AS_N)
        if replaced != letters and not self._warned:
            self._warned = True
            LOGGER.warning("%s has letters (*, -, ., ? or X) that are read as N", self.path)
        return replaced

    def _open(self) -> pyfaidx.Faidx:
        if self._process_id != os.getpid():
            # A fork copies the lock in the state another thread left it in: create a new one with the new handle.
            self._opening, self._handle, self._process_id = threading.Lock(), None, os.getpid()
        with self._opening:
            if self._handle is None:
                self._handle = open_index(self.path, self._index_path, self._is_compressed)
            return self._handle

    def _require_unchanged(self) -> None:
        if identity_of(self.path) != self._identity:
            raise self._changed()

    def _changed(self) -> InputError:
        return InputError(f"{self.path} has changed since it was opened: start again.")


def suggest_names(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a missing contig: similar names, or the existing names.

    'chr1' and '1' (UCSC's and Ensembl's style), and 'chrM' and 'MT', count as similar.
    """
    ordered = list(known)
    bare = name.removeprefix("chr")
    other_style = [spelling for spelling in (bare, f"chr{bare}") if spelling != name and spelling in ordered]
    if bare in ("M", "MT"):
        other_style += [spelling for spelling in ("chrM", "MT") if spelling != name and spelling in ordered]
    near = other_style or difflib.get_close_matches(name, ordered, n=_MOST_NEAR_NAMES, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{spelling}'" for spelling in dict.fromkeys(near))
    if not ordered:
        return "it has none"
    shown = ", ".join(ordered[:_MOST_NEAR_NAMES]) + (", ..." if len(ordered) > _MOST_NEAR_NAMES else "")
    return f"the names are {shown}"
