"""Random access to a reference genome of any size, from any number of processes.

A file handle shared by two processes gives wrong sequences, because each moves the other's position (pyfaidx issue
211), and an index that is read while it is being written is incomplete (kipoiseq issue 27). Here every process opens
its own handle, and an index is built once, under a lock, and renamed into place when complete.
"""

import contextlib
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import pyfaidx

from genomamba.alphabet import UNKNOWN_SYMBOLS_AS_N, describe_byte, diagnose_invalid_byte, first_invalid_position
from genomamba.io.compression import BYTE_ORDER_MARK, GZIP_MAGIC, LOGGER, is_compressed
from genomamba.tokenizer import TOKEN_OF_BYTE, Tokens
from mambacore.errors import InputError
from mambacore.files import temporary_folder

BLOCK_GZIP_EXTRA: Final = b"BC\x02\x00"
"""The subfield of a gzip header that marks a block of BGZF (SAM specification, section 4.1)."""
_COMPRESSED_NAMES: Final = (".gz", ".bgz")
"""Endings that the index library takes for BGZF, whatever the content."""
_LONGEST_GAP_BYTES: Final = 1 << 20
"""Limit for the header line and blank lines between two sequences."""
_MOST_NEAR_NAMES: Final = 3
_RECORD_BREAK = re.compile(rb"[\r\n]*(?:;[^\r\n]*\r?\n[\r\n]*)*>([^\r\n]*)\r?\n?")


@dataclass(frozen=True)
class _FileIdentity:
    """Properties that identify a file, to detect changes after it was opened."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: str) -> "_FileIdentity":
        status = os.stat(path)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


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
        self._identity = _identity(self.path)
        self._is_compressed = _is_block_gzip(self.path)
        self._index_path = _ensure_index(self.path, self._is_compressed)
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
                self._handle = _open_index(self.path, self._index_path, self._is_compressed)
            return self._handle

    def _require_unchanged(self) -> None:
        if _identity(self.path) != self._identity:
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


def _identity(path: str) -> _FileIdentity:
    try:
        return _FileIdentity.of(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: check the path.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the path and the disk.") from error


def _is_block_gzip(path: str) -> bool:
    """Return whether a file is BGZF; raise if it does not support random access."""
    if path == "-" or not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file, which random access needs: name a FASTA file on disk.")
    try:
        with open(path, "rb") as stream:
            start = stream.read(18)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    if not start:
        raise InputError(f"{path} is empty: give a FASTA file with at least one record.")
    start = start.removeprefix(BYTE_ORDER_MARK)
    if not start:
        raise InputError(f"{path} is empty: give a FASTA file with at least one record.")
    if not start.startswith(GZIP_MAGIC) and is_compressed(path):
        raise InputError(f"{path} is compressed without random access: decompress it, or recompress it with bgzip.")
    named_compressed = path.lower().endswith(_COMPRESSED_NAMES)
    if not start.startswith(GZIP_MAGIC):
        if start[:1] not in b">;\r\n":
            raise InputError(
                f"{path} is not a FASTA file, it starts with {describe_byte(start[0])}: give FASTA, plain or "
                "compressed with bgzip."
            )
        if named_compressed:
            raise InputError(f"{path} is not compressed, although its name says so: rename it to end in .fa.")
        return False
    plain = path[: path.rfind(".")] if named_compressed else f"{path}.fa"
    if start[12:16] != BLOCK_GZIP_EXTRA:
        raise InputError(
            f"{path} is compressed with gzip, which does not allow random access: decompress it "
            f"(`gunzip -c {path} > {plain}`) and name that file, or compress it with bgzip."
        )
    if not named_compressed:
        raise InputError(f"{path} is compressed with bgzip, but its name does not say so: rename it to end in .gz.")
    if importlib.util.find_spec("Bio") is None:
        raise InputError(
            f"{path} is compressed with bgzip, which needs biopython: install it (`pip install biopython`), "
            f"or decompress the file (`gunzip -c {path} > {plain}`) and name that one."
        )
    return True


def _ensure_index(path: str, is_compressed: bool) -> str:
    """Return the path of an index that matches the file; build it if needed, in one process at a time."""
    places = _index_places(path)
    valid = _first_valid(path, places, is_compressed)
    if valid is not None:
        return valid
    with _lock_on(path):
        # Another process may have built it while this one waited.
        valid = _first_valid(path, places, is_compressed)
        if valid is not None:
            return valid
        for place in places:
            if _can_write_in(Path(place).parent):
                _build_index(path, place, is_compressed)
                return place
    raise InputError(
        f"an index of {path} can be written neither beside it nor in {Path(places[-1]).parent}: make one with "
        f"`samtools faidx {path}`, or set XDG_CACHE_HOME to a folder that can be written."
    )


def _index_places(path: str) -> tuple[str, str]:
    """Return possible paths of an index: beside the file, or in the user's cache folder, named by the file's path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return f"{path}.fai", str(cache / "genomamba" / "indexes" / f"{key}.fai")


def _first_valid(path: str, places: Iterable[str], is_compressed: bool) -> str | None:
    return next((place for place in places if _describes(place, path, is_compressed)), None)


def _block_index_path(index_path: str) -> str:
    return f"{index_path.removesuffix('.fai')}.gzi"


@contextlib.contextmanager
def _lock_on(path: str) -> Iterator[None]:
    """Hold the advisory lock of the FASTA file itself, which leaves no lock file behind.

    On file systems without locks several processes may build the same index, each replacing it atomically.
    """
    with open(path, "rb") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _can_write_in(folder: Path) -> bool:
    if not folder.exists():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    return folder.is_dir() and os.access(folder, os.W_OK)


def _build_index(path: str, index_path: str, is_compressed: bool) -> None:
    unfinished = f"{index_path}.{secrets.token_hex(4)}.part"
    blocks, unfinished_blocks = _block_index_path(index_path), f"{unfinished}.gzi"
    before = _identity(path)
    try:
        if _starts_with_mark(path):
            _write_index_behind_mark(path, unfinished)
        else:
            options = {"gzi_indexname": unfinished_blocks} if is_compressed else {}
            pyfaidx.Faidx(path, indexname=unfinished, as_raw=True, **options).close()
        if _identity(path) != before:
            raise InputError(f"{path} changed while it was being indexed: wait until it is complete and start again.")
        if not is_compressed:
            _check_index(unfinished, path)
        if is_compressed:
            _not_older(unfinished_blocks, before)
            os.replace(unfinished_blocks, blocks)
        _not_older(unfinished, before)
        os.replace(unfinished, index_path)
    except InputError:
        raise
    except pyfaidx.FastaIndexingError as error:
        raise InputError(_describe_indexing_error(path, error)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} contains binary data: give a FASTA text file.") from error
    except (ValueError, OSError) as error:
        if "uplicate" in str(error):
            raise InputError(f"{path} has more than one contig of the same name ({error}): rename them.") from error
        raise InputError(f"{path} cannot be indexed ({error}): check the file and the disk.") from error
    finally:
        for leftover in (unfinished, unfinished_blocks):
            Path(leftover).unlink(missing_ok=True)


def _starts_with_mark(path: str) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK


def _write_index_behind_mark(path: str, index_path: str) -> None:
    """Index a plain file that starts with a byte-order mark: a copy without it, with every offset moved by the mark."""
    with temporary_folder() as folder, open(path, "rb") as stream:
        stream.seek(len(BYTE_ORDER_MARK))
        copy = folder / "copy.fa"
        with copy.open("wb") as plain:
            shutil.copyfileobj(stream, plain)
        pyfaidx.Faidx(str(copy), indexname=index_path, as_raw=True).close()
    lines = []
    for line in Path(index_path).read_text(encoding="utf-8").splitlines():
        name, length, offset, *widths = line.split("\t")
        lines.append("\t".join([name, length, str(int(offset) + len(BYTE_ORDER_MARK)), *widths]) + "\n")
    Path(index_path).write_text("".join(lines), encoding="utf-8")


def _not_older(index_path: str, identity: _FileIdentity) -> None:
    """Give an index at least the time stamp of its file, which a wrong clock may have set to the future."""
    modified_ns = max(os.stat(index_path).st_mtime_ns, identity.modified_ns)
    os.utime(index_path, ns=(modified_ns, modified_ns))


def _describe_indexing_error(path: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "not consistent" in text:
        place = text.partition("found in >")[2].rstrip(".")
        return (
            f"{path} has lines of uneven length ({place}), which do not allow random access: rewrite it with "
            "lines of equal length (`seqtk seq -l 60`)."
        )
    return f"{path} cannot be indexed ({text.rstrip('.')}): give a FASTA file of nucleotides."


def _describes(index_path: str, path: str, is_compressed: bool) -> bool:
    """Return whether an index exists, is not older than the file, and matches it."""
    needed = [index_path, _block_index_path(index_path)] if is_compressed else [index_path]
    try:
        modified_ns = os.stat(path).st_mtime_ns
        if any(os.stat(place).st_mtime_ns < modified_ns for place in needed):
            return False
        if not is_compressed:
            _check_index(index_path, path)
    except (OSError, InputError, UnicodeDecodeError):
        return False
    return True


def _check_index(index_path: str, path: str) -> None:
    """Check that an index accounts for every byte of a plain file.

    A time stamp is no proof, as copies can keep an old one. So between the end of each contig and the start of the
    next there must be exactly one header with the right name, and nothing after the last. Only headers are read.
    """
    with open(index_path, encoding="utf-8", newline="\n") as lines, open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        end = len(BYTE_ORDER_MARK) if _starts_with_mark(path) else 0
        for line in lines:
            try:
                name, *numbers = line.rstrip("\n").split("\t")
                length, offset, line_bases, line_bytes = map(int, numbers)
                whole_lines, rest = divmod(length, line_bases) if line_bases else (0, 0)
            except ValueError:
                raise _unfit(index_path, path) from None
            gap = _read_between(stream, end, offset)
            header = _RECORD_BREAK.fullmatch(gap) if gap is not None else None
            if header is None or header[1].split()[:1] != [name.encode()]:
                if gap is not None and re.search(rb"\r(?!\n)", gap):
                    raise InputError(f"{path} has classic Mac OS line endings (CR): rewrite it with `tr '\\r' '\\n'`.")
                raise _unfit(index_path, path)
            end = min(offset + whole_lines * line_bytes + rest, size)
            if offset + length > size:
                raise _unfit(index_path, path)
        tail = _read_between(stream, end, size)
        if tail is None or tail.strip(b"\r\n"):
            raise _unfit(index_path, path)


def _unfit(index_path: str, path: str) -> InputError:
    return InputError(
        f"{path} has a layout that does not match its index {index_path}: rewrite it with lines of equal length "
        "(`seqtk seq -l 60`)."
    )


def _read_between(stream: BinaryIO, start: int, end: int) -> bytes | None:
    if not 0 <= end - start <= _LONGEST_GAP_BYTES:
        return None
    stream.seek(start)
    return stream.read(end - start)


def _open_index(path: str, index_path: str, is_compressed: bool) -> pyfaidx.Faidx:
    # An index is never built here: if it has disappeared, a worker raises instead of racing to build another.
    open_faidx = functools.partial(pyfaidx.Faidx, path, indexname=index_path, as_raw=True)
    if is_compressed:
        open_faidx = functools.partial(open_faidx, gzi_indexname=_block_index_path(index_path))
    try:
        return open_faidx(build_index=False, rebuild=False)
    except ValueError as error:
        raise InputError(f"{path} has more than one contig of the same name ({error}): rename them.") from error
    except (OSError, pyfaidx.FastaNotFoundError, pyfaidx.IndexNotFoundError) as error:
        raise InputError(f"{path} or its index {index_path} cannot be opened ({error}): start again.") from error
