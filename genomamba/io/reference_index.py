"""Indexes of FASTA files (`.fai`, and `.gzi` of BGZF), as `genomamba.io.reference` reads them.

An index that is read while it is being written is incomplete (kipoiseq issue 27): it is built once, under a lock, and
renamed into place when complete.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import pyfaidx

from genomamba.alphabet import describe_byte
from genomamba.io.compression import BYTE_ORDER_MARK, GZIP_MAGIC, is_compressed
from mambacore.errors import InputError
from mambacore.files import temporary_folder

BLOCK_GZIP_EXTRA: Final = b"BC\x02\x00"
"""The subfield of a gzip header that marks a block of BGZF (SAM specification, section 4.1)."""
_COMPRESSED_NAMES: Final = (".gz", ".bgz")
"""Endings that the index library takes for BGZF, whatever the content."""
_LONGEST_GAP_BYTES: Final = 1 << 20
"""Limit for the header line and blank lines between two sequences."""
_RECORD_BREAK = re.compile(rb"[\r\n]*(?:;[^\r\n]*\r?\n[\r\n]*)*>([^\r\n]*)\r?\n?")


@dataclass(frozen=True)
class FileIdentity:
    """Properties that identify a file, to detect changes after it was opened."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: str) -> "FileIdentity":
        """Return those of a file."""
        status = os.stat(path)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


def identity_of(path: str) -> FileIdentity:
    """Return what identifies a file.

    Raises:
        InputError: if it is missing or cannot be read.
    """
    try:
        return FileIdentity.of(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: check the path.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the path and the disk.") from error


def is_block_gzip(path: str) -> bool:
    """Return whether a file is BGZF.

    Raises:
        InputError: if it does not support random access.
    """
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


def ensure_index(path: str, is_compressed: bool) -> str:
    """Return the path of an index that matches the file; build it if needed, in one process at a time.

    Raises:
        InputError: if the file cannot be indexed, or no index can be written.
    """
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
    before = identity_of(path)
    try:
        if _starts_with_mark(path):
            _write_index_behind_mark(path, unfinished)
        else:
            options = {"gzi_indexname": unfinished_blocks} if is_compressed else {}
            pyfaidx.Faidx(path, indexname=unfinished, as_raw=True, **options).close()
        if identity_of(path) != before:
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


def _not_older(index_path: str, identity: FileIdentity) -> None:
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


def open_index(path: str, index_path: str, is_compressed: bool) -> pyfaidx.Faidx:
    """Open a file by its index.

    Raises:
        InputError: if one of them cannot be opened, or has two contigs of the same name.
    """
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
