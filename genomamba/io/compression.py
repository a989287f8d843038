"""Opening of files, streams and standard input, with decompression by content and readable error messages.

gzip, bzip2, xz and Zstandard are recognised by their first bytes, whatever the file name. At most one block is read
ahead, so memory is bounded however well a file is compressed.
"""

import bz2
import contextlib
import gzip
import importlib.util
import io
import logging
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO, Final, Protocol

from mambacore.errors import InputError

LOGGER = logging.getLogger("genomamba")
"""Warnings about input that is accepted nevertheless; by default Python prints them on standard error."""

Source = str | os.PathLike[str] | BinaryIO
"""A path, "-" for standard input, or a binary stream (which stays open)."""

STANDARD_INPUT: Final = "-"
GZIP_MAGIC: Final = b"\x1f\x8b"
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
BLOCK_BYTES: Final = 1 << 20
LONGEST_LINE_BYTES: Final = 1 << 28
"""Limit for texts that are read line by line; a line of a table may hold a chromosome arm."""
MOST_BLANK_BYTES: Final = 1 << 26
"""Limit of consecutive whitespace and newlines, beyond which a file is not a table."""

_ZSTANDARD_BYTES: Final = 256
"""Compressed bytes that are decompressed at once: every 4 of them can expand to 128 KiB."""

_MAGICS: Final[dict[bytes, str]] = {
    GZIP_MAGIC: "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    # Frames that are skipped; parallel compressors begin with one.
    **{bytes([first]) + b"\x2a\x4d\x18": "zstd" for first in range(0x50, 0x60)},
}
_LARGEST_DICTIONARY_BYTES: Final = 1 << 29
"""Memory that decompression of xz may take; `xz -9` needs 65 MiB."""
_LONGEST_MAGIC: Final = max(map(len, _MAGICS))
_NOT_TEXT: Final[dict[bytes, str]] = {
    b"\xff\xfe": "UTF-16 text: save it as UTF-8 text (CSV UTF-8 in Excel)",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8 text (CSV UTF-8 in Excel)",
    b"PK\x03\x04": "a workbook or zip archive: save the sheet as CSV UTF-8, or extract the file",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save the sheet as CSV UTF-8",
    b"PAR1": "a Parquet file: save it as text (`DataFrame.to_csv`)",
    b"{\\rtf": "a document of a word processor: save it as plain text",
    b"%PDF": "a PDF: give the table as text",
}
_LONGEST_SIGNATURE: Final = max(map(len, _NOT_TEXT))


class Readable(Protocol):
    """A readable binary stream."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; empty at the end."""
        ...


def source_label(source: Source) -> str:
    """Return the name of a source in messages."""
    if isinstance(source, str | os.PathLike):
        return "standard input" if source == STANDARD_INPUT else os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) and name != "<stdin>" else "standard input"


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's content (not its name) is compressed.

    Raises:
        InputError: if it cannot be read.
    """
    with input_errors(os.fspath(path)), open(path, "rb") as stream:
        return _compression_of(stream.read(_LONGEST_MAGIC)) is not None


@contextlib.contextmanager
def opened(source: Source, label: str) -> Iterator[Readable]:
    """Open a source for reading its decompressed content, without a byte-order mark.

    Args:
        source: see `Source`.
        label: its name in messages.

    Raises:
        InputError: if the source is missing, unreadable, damaged or truncated, or needs zstandard, which is not
            installed.
    """
    with contextlib.ExitStack() as stack:
        with input_errors(label):
            if not isinstance(source, str | os.PathLike):
                stream: Readable = source
            elif source == STANDARD_INPUT:
                stream = sys.stdin.buffer
            else:
                stream = stack.enter_context(open(source, "rb"))
            start = _read_exactly(stream, _LONGEST_MAGIC)
            content = _decompressed(_Rejoined(start, stream), _compression_of(start), label)
            mark = _read_exactly(content, len(BYTE_ORDER_MARK))
        yield _Checked(_Rejoined(b"" if mark == BYTE_ORDER_MARK else mark, content), label)


def read_blocks(source: Source, label: str) -> Generator[bytes, None, None]:
    """Yield the decompressed content of a source in blocks of at most 1 MiB; see `opened`."""
    blanks = 0
    with opened(source, label) as content:
        while block := content.read(BLOCK_BYTES):
            blanks = blanks + len(block) if block.isspace() else 0
            if blanks > MOST_BLANK_BYTES:
                raise InputError(
                    f"{label} has more than {MOST_BLANK_BYTES:,} consecutive blank characters: give a sequence file."
                )
            yield block


def read_lines(source: Source, label: str) -> Generator[str, None, None]:
    """Yield the lines of a UTF-8 text with their line endings (LF, CRLF or CR).

    Raises:
        InputError: as `opened`, or if the text is not UTF-8, or has a line of more than 268 million characters or 67
            million consecutive whitespace characters.
    """
    blanks = 0
    with opened(source, label) as content:
        raw = io.BufferedReader(_Raw(content), BLOCK_BYTES)
        _require_text(raw.peek(_LONGEST_SIGNATURE), label)
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        try:
            while line := text.readline(LONGEST_LINE_BYTES):
                blanks = blanks + len(line) if line.isspace() else 0
                if len(line) >= LONGEST_LINE_BYTES or blanks > MOST_BLANK_BYTES:
                    what = "blank" if blanks else "a line"
                    raise InputError(
                        f"{label} has {what} of more than {LONGEST_LINE_BYTES if not blanks else MOST_BLANK_BYTES:,} "
                        "characters: it is damaged or not a table."
                    )
                if "\0" in line:
                    raise InputError(f"{label} holds binary content: give UTF-8 text, plain or compressed.")
                yield line
        except UnicodeDecodeError as error:
            raise InputError(
                f"{label} has byte 0x{error.object[error.start]:02x}, which is not UTF-8: it is text in another "
                "encoding or holds binary content; give UTF-8 text, plain or compressed."
            ) from error
        finally:
            text.detach().detach()


def _require_text(start: bytes, label: str) -> None:
    """Raise if a file that should be text begins as files of other kinds do."""
    for signature, what in _NOT_TEXT.items():
        if start.startswith(signature):
            raise InputError(f"{label} is {what}.")
    if start[1:2] == b"\0" or start[:1] == b"\0":
        raise InputError(f"{label} is UTF-16 text or holds binary content: save it as UTF-8 text (CSV UTF-8 in Excel).")


@contextlib.contextmanager
def input_errors(label: str) -> Iterator[None]:
    """Convert errors of the operating system and the decompressors into messages for the user."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"there is no file {label}: check the path.") from error
    except IsADirectoryError as error:
        raise InputError(f"{label} is a directory: name the files in it.") from error
    except PermissionError as error:
        raise InputError(f"{label} cannot be read, permission denied: change its permissions or copy it.") from error
    except EOFError as error:
        raise InputError(f"{label} is a truncated compressed file: copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{label} is a damaged compressed file ({error}): copy or download it again.") from error
    except OSError as error:
        raise InputError(f"{label} cannot be read ({error.strerror or error}): check the path and the disk.") from error


class _Rejoined:
    """A stream that cannot seek, with the bytes already read from it put back in front."""

    def __init__(self, start: bytes, stream: Readable) -> None:
        self._start = start
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        start, self._start = self._start[:size], self._start[size:]
        return start + self._stream.read(size - len(start)) if len(start) < size else start


class Rewound(io.RawIOBase):
    """A stream whose first bytes can be inspected before it is read.

    Args:
        stream: decompressed content.
        name: its name in messages.
    """

    def __init__(self, stream: Readable, name: str) -> None:
        self._start = b""
        while len(self._start) < MOST_BLANK_BYTES and not self._start.strip():
            block = stream.read(BLOCK_BYTES)
            if not block:
                break
            self._start += block
        self._stream = stream
        self.name = "<stdin>" if name == "standard input" else name

    def begins_with(self, marks: tuple[bytes, ...]) -> bool:
        """Whether the first byte that is not whitespace is one of `marks`; b"" stands for an empty stream."""
        return self._start.lstrip()[:1] in marks

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes."""
        start, self._start = self._start[:size], self._start[size:]
        return start or self._stream.read(size)


class _Checked:
    """A stream whose errors are converted to messages for the user."""

    def __init__(self, stream: Readable, label: str) -> None:
        self._stream = stream
        self._label = label

    def read(self, size: int, /) -> bytes:
        with input_errors(self._label):
            return self._stream.read(size)


class _Raw(io.RawIOBase):
    """An adapter that lets the standard library add buffering and decoding to a stream."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _GzipMembers:
    """The concatenated content of gzip members; other trailing bytes are ignored with a warning."""

    def __init__(self, stream: Readable, label: str) -> None:
        self._stream = stream
        self._label = label
        self._member: Any = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._waiting = b""
        self._done = False

    def read(self, size: int, /) -> bytes:
        while not self._done:
            if not self._waiting:
                self._waiting = self._stream.read(BLOCK_BYTES)
                if not self._waiting:
                    if not self._member.eof:
                        raise EOFError
                    break
            if self._member.eof and not self._begin_member():
                continue
            content: bytes = self._member.decompress(self._waiting, size)
            self._waiting = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if content:
                return content
        return b""

    def _begin_member(self) -> bool:
        """Begin the next member, skipping zero padding such as from tapes."""
        self._waiting = self._waiting.lstrip(b"\0")
        if len(self._waiting) < len(GZIP_MAGIC):
            self._waiting += self._stream.read(BLOCK_BYTES)
        if not self._waiting:
            return False
        if not self._waiting.startswith(GZIP_MAGIC):
            _warn_of_other_bytes(self._label)
            self._done = True
            return False
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        return True


def _warn_of_other_bytes(label: str) -> None:
    LOGGER.warning(
        "%s has other bytes after its compressed content, which are ignored: check that it is complete.", label
    )


class _Streams:
    """The concatenated content of bzip2 or xz streams; other trailing bytes are ignored with a warning.

    The files of the standard library ignore them without one, and with them whatever follows a damaged start.
    """

    def __init__(self, stream: Readable, label: str, magic: bytes, new: Callable[[], Any]) -> None:
        self._stream = stream
        self._label = label
        self._magic = magic
        self._new = new
        self._decompressor: Any = new()
        self._waiting = b""

    def read(self, size: int, /) -> bytes:
        while self._decompressor is not None:
            if self._decompressor.needs_input and not self._waiting:
                self._waiting = self._stream.read(BLOCK_BYTES)
                if not self._waiting:
                    raise EOFError
            try:
                content: bytes = self._decompressor.decompress(self._waiting, size)
            except OSError as error:
                raise zlib.error(str(error)) from error
            self._waiting = b""
            if self._decompressor.eof:
                self._decompressor = self._next(self._decompressor.unused_data)
            if content:
                return content
        return b""

    def _next(self, waiting: bytes) -> Any:
        """The decompressor of the next stream, skipping zero padding; `None` at the end."""
        while len(waiting := waiting.lstrip(b"\0")) < len(self._magic) and (more := self._stream.read(BLOCK_BYTES)):
            waiting += more
        if not waiting.startswith(self._magic):
            if waiting:
                _warn_of_other_bytes(self._label)
            return None
        self._waiting = waiting
        return self._new()


def _compression_of(start: bytes) -> str | None:
    return next((name for magic, name in _MAGICS.items() if start.startswith(magic)), None)


def _decompressed(stream: Readable, compression: str | None, label: str) -> Readable:
    if compression is None:
        return stream
    if compression == "gzip":
        return _GzipMembers(stream, label)
    if compression == "bzip2":
        return _Streams(stream, label, b"BZh", bz2.BZ2Decompressor)
    if compression == "xz":
        return _Streams(
            stream, label, b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _LARGEST_DICTIONARY_BYTES)
        )
    if importlib.util.find_spec("zstandard") is None:
        raise InputError(
            f"{label} is compressed with Zstandard, which needs the package zstandard, which is not installed: "
            "`pip install zstandard`, or decompress the file."
        )
    return _ZstandardFrames(stream, label)


class _ZstandardFrames:
    """The concatenated content of Zstandard frames; other trailing bytes are ignored with a warning."""

    def __init__(self, stream: Readable, label: str) -> None:
        import zstandard  # noqa: PLC0415 - a second to import, for a rare compression

        self._stream = stream
        self._label = label
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._waiting = b""
        self._position = 0
        self._ready = b""

    def read(self, size: int, /) -> bytes:
        while not self._ready:
            if self._position == len(self._waiting):
                self._waiting, self._position = self._stream.read(BLOCK_BYTES), 0
                if not self._waiting:
                    if self._frame is not None:
                        raise EOFError
                    return b""
            self._ready = self._decompress_some()
        content, self._ready = self._ready[:size], self._ready[size:]
        return content

    def _decompress_some(self) -> bytes:
        if self._frame is None:
            if not self._begin_frame():
                return b""
            self._frame = self._new_frame()
        some = self._waiting[self._position : self._position + _ZSTANDARD_BYTES]
        self._position += len(some)
        try:
            content: bytes = self._frame.decompress(some)
        except self._error as error:
            raise zlib.error(str(error)) from error
        if self._frame.eof:
            self._position -= len(self._frame.unused_data)
            self._frame = None
        return content

    def _begin_frame(self) -> bool:
        """Whether a frame follows, rather than other bytes, which are passed over."""
        start = self._waiting[self._position :]
        if len(start) < _LONGEST_MAGIC:
            start += _read_exactly(self._stream, _LONGEST_MAGIC - len(start))
            self._waiting, self._position = start, 0
        if _compression_of(start) == "zstd":
            return True
        _warn_of_other_bytes(self._label)
        self._waiting, self._position = b"", 0
        self._stream = io.BytesIO()
        return False


def _read_exactly(stream: Readable, size: int) -> bytes:
    """Read up to `size` bytes, fewer only at the end: a pipe may return less than requested at a time."""
    start = b""
    while len(start) < size and (more := stream.read(size - len(start))):
        start += more
    return start
