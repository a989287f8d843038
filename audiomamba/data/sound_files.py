"""Sound files, opened for reading at their actual rather than their stated length.

libsndfile silently reads what there is of a truncated file, and trusts headers that state too short a length. Both are
detected here, before anything is read.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from audiomamba.data.extras import audio_package
from audiomamba.data.mp3 import mp3_streams
from audiomamba.data.ogg import ogg_starts
from mambacore.errors import InputError

if TYPE_CHECKING:
    from soundfile import SoundFile

SLOWEST_RATE_HZ: Final = 1_000
FASTEST_RATE_HZ: Final = 768_000

_UNKNOWN_LENGTH: Final = 0x7FFF_0000
"""Lengths from here on are placeholders, written by programs that write to a pipe and cannot know the length."""

_HEADER_SLACK: Final = 128
"""Bytes by which a header may state too much: some programs count headers as samples."""

_RF64_LENGTH_ELSEWHERE: Final = 0xFFFF_FFFF
_AU_UNKNOWN_LENGTH: Final = 0xFFFF_FFFF
_FLAC_START: Final = re.compile(rb"fLaC[\0\x80]\0\0\x22")
_WAVE64_HEADER_BYTES: Final = 40  # two names and a length, each chunk beginning with a name and a length
_WAVE64_CHUNK_BYTES: Final = 24
_MP3_SUFFIX: Final = ".mp3"
_STANDARD_ERROR_DESCRIPTOR: Final = 2
_STANDARD_ERROR: Final = threading.RLock()
_DECODER_LINE: Final = re.compile(rb"\s*(Note:|Warning:|mpg123|\[[^\]]*\.c:[^\]]*\d+\])")
_MISLEADING: Final = "File does not exist"
"""How libsndfile's reason begins when the MP3 decoder finds no sound."""
_complained: set[Path] = set()
LOGGER: Final = logging.getLogger(__name__)


class Sound:
    """One sound file, or several read as one.

    Args:
        parts: open files of the same rate and number of channels.
        complaints: context in which they are read.
    """

    def __init__(
        self,
        parts: Sequence[SoundFile],
        complaints: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        first = parts[0]
        self._parts = parts
        self._complaints = complaints
        self._part = 0
        self.frames_read = 0
        self.samplerate: int = first.samplerate
        self.channels: int = first.channels
        self.frames: int = sum(part.frames for part in parts)
        self.encoding = f"{first.format} {first.subtype}"

    def skip_to(self, frame: int, block: int) -> int:
        """Move from the beginning to a frame, by reading if the format cannot seek, and return the frame.

        Args:
            frame: from 0.
            block: frames to read at once.
        """
        if frame and len(self._parts) == 1 and self._parts[0].seekable():
            with self._complaints():
                self._parts[0].seek(frame)
            self.frames_read = frame
            return frame
        position = 0
        while position < frame:
            read = self.read(min(block, frame - position)).shape[0]
            if read == 0:
                break
            position += read
        return position

    def read(self, frames: int) -> npt.NDArray[np.float32]:
        """Read up to `frames` frames, (frames, channels); none at the end."""
        while True:
            with self._complaints():
                found = self._parts[self._part].read(frames, dtype="float32", always_2d=True)
            if found.shape[0] or self._part == len(self._parts) - 1:
                self.frames_read += found.shape[0]
                return found
            self._part += 1


@contextlib.contextmanager
def opened_sound(path: Path) -> Iterator[Sound]:
    """Open and check a file; errors of libsndfile while it is open are reported with its name.

    Raises:
        InputError: if the file is missing, a folder, empty, truncated, not audio, damaged, or cannot be read.
    """
    soundfile = audio_package("soundfile")
    sound: Sound | None = None
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name an audio file")
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link that leads nowhere; fetch the file it stands for, or leave it out")
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file (a pipe or device); write the sound to a file")
        with path.open("rb") as stream:
            repaired = _checked(path, stream)
        # As bytes: a name that is not UTF-8 cannot be encoded otherwise.
        sources: list[Any] = [os.fsencode(path)] if repaired is None else [io.BytesIO(part) for part in repaired]
        with contextlib.ExitStack() as stack:
            complaints = functools.partial(named_complaints, path) if _is_mp3(path) else contextlib.nullcontext
            with complaints():
                parts = [stack.enter_context(soundfile.SoundFile(source)) for source in sources]
            if len({(part.samplerate, part.channels) for part in parts}) > 1:
                raise InputError(f"{path} consists of recordings of different rates or channels; cut it into its parts")
            sound = Sound(parts, complaints)
            if not SLOWEST_RATE_HZ <= sound.samplerate <= FASTEST_RATE_HZ:
                raise InputError(
                    f"{path} states a rate of {sound.samplerate} Hz, not a valid sampling rate; export it again"
                )
            if sound.frames <= 0:
                raise InputError(f"{path} holds no samples: it is empty or cut off; copy it again, or leave it out")
            yield sound
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; check the path") from error
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error)).strip().rstrip(".").removeprefix("Error : ")
        if reason.startswith(_MISLEADING):
            reason = "it is cut off, or not a sound file"
        if sound is None:
            raise InputError(
                f"{path} cannot be read as audio ({reason}); convert it to WAV or FLAC, or copy it again"
            ) from error
        there, stated = (frames / sound.samplerate for frames in (sound.frames_read, sound.frames))
        raise InputError(
            f"{path} is cut off or damaged after second {there:.2f} of {stated:.2f} ({reason}); copy it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error


@contextlib.contextmanager
def named_complaints(path: Path) -> Iterator[None]:
    """What the MP3 decoder prints on standard error inside becomes a warning that names the file.

    The decoder writes to the file descriptor itself and knows no names. What anybody else writes there meanwhile is
    passed on afterwards. A file that is refused has its error and needs no warning.
    """
    with _STANDARD_ERROR, tempfile.TemporaryFile() as caught:
        sys.stderr.flush()
        try:
            kept = os.dup(_STANDARD_ERROR_DESCRIPTOR)
        except OSError:
            yield  # it is closed
            return
        refused = True
        try:
            os.dup2(caught.fileno(), _STANDARD_ERROR_DESCRIPTOR)
            yield
            refused = False
        finally:
            os.dup2(kept, _STANDARD_ERROR_DESCRIPTOR)
            caught.seek(0)
            lines = [line for line in caught.read().splitlines(keepends=True) if line.strip()]
            others = [line for line in lines if not _DECODER_LINE.match(line)]
            if others:
                os.write(kept, b"".join(others))
            os.close(kept)
            found = [line.decode("utf-8", "replace").strip() for line in lines if line not in others]
            if found and not refused and path not in _complained:
                _complained.add(path)
                LOGGER.warning("%s: the MP3 decoder says: %s; export it again if it sounds wrong", path, found[0])


def _is_mp3(path: Path) -> bool:
    if path.suffix.lower() == _MP3_SUFFIX:
        return True
    with path.open("rb") as stream:
        return stream.read(3) == b"ID3"


def _checked(path: Path, stream: BinaryIO) -> list[bytes] | None:
    """Reject a truncated file; return its content in parts that libsndfile reads whole, if not the file as it is.

    The parts are recordings joined into one file, of which libsndfile reads the first, or a file whose header states
    too short a length.
    """
    size = stream.seek(0, io.SEEK_END)
    if size == 0:
        raise InputError(f"{path} is empty (0 bytes); copy it again, or leave it out")
    stream.seek(0)
    head = stream.read(12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        return _checked_waves(path, stream, size)
    for start, length in _stated_lengths(head, stream, size):
        _check_length(path, length, size - start)
    if head[:4] == b"OggS":
        try:
            return _cut_at(stream, ogg_starts)
        except ValueError as error:
            raise InputError(f"{path} {error}; copy it again") from error
    if head[:4] == b"fLaC":
        return _cut_at(stream, lambda content: [match.start() for match in _FLAC_START.finditer(content)])
    if head[:3] == b"ID3" or path.suffix.lower() == _MP3_SUFFIX:
        stream.seek(0)
        try:
            return mp3_streams(stream.read())
        except ValueError as error:
            raise InputError(f"{path} cannot be read as one recording: {error}; cut it into its parts") from error
    return None


def _cut_at(stream: BinaryIO, starts_in: Callable[[bytes], list[int]]) -> list[bytes] | None:
    """The recordings of a file; `None` if there is only one."""
    stream.seek(0)
    content = stream.read()
    starts = starts_in(content)
    return [content[begin:end] for begin, end in pairwise([*starts, len(content)])] if len(starts) > 1 else None


def _checked_waves(path: Path, stream: BinaryIO, size: int) -> list[bytes] | None:
    """As `_checked`, for one WAV file or several, one after the other."""
    starts, position = [], 0
    while position + 12 <= size:
        stream.seek(position)
        name, length, kind = struct.unpack("<4sI4s", stream.read(12))
        if name not in (b"RIFF", b"RF64") or kind != b"WAVE":
            break
        starts.append(position)
        position += 8 + length + length % 2
    if len(starts) == 1:
        return _checked_wave(path, stream, size)
    parts = _cut_at(stream, lambda content: starts) or []
    checked = [(part, _checked_wave(path, io.BytesIO(part), len(part))) for part in parts]
    return [one for part, repaired in checked for one in repaired or [part]]


def _checked_wave(path: Path, stream: BinaryIO, size: int) -> list[bytes] | None:
    long_length = None
    for name, start, length in _chunks(stream, size, "<"):
        if name == b"ds64" and length >= 16:
            stream.seek(start + 8)
            (long_length,) = struct.unpack("<Q", stream.read(8))
        if name != b"data":
            continue
        if length == 0 and size > start and not _ends_with_chunks(stream, start, size):
            stream.seek(0)
            content = bytearray(stream.read())
            struct.pack_into("<I", content, start - 4, min(size - start, _RF64_LENGTH_ELSEWHERE - 1))
            return [bytes(content)]
        if length == _RF64_LENGTH_ELSEWHERE and long_length is not None:
            _check_length(path, long_length, size - start)
        elif length < _UNKNOWN_LENGTH:
            _check_length(path, length, size - start)
        return None
    return None


def _stated_lengths(head: bytes, stream: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Yield where samples begin in an AIFF, AU or Wave64 file, and the bytes of them that its header states."""
    if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        yield from ((start, length) for name, start, length in _chunks(stream, size, ">") if name == b"SSND")
    elif head[:4] == b"riff":
        yield from ((start, length) for name, start, length in _wave64_chunks(stream, size) if name == b"data")
    elif head[:4] == b".snd" and len(head) == 12:
        start, length = struct.unpack(">II", head[4:])
        if length != _AU_UNKNOWN_LENGTH:
            yield start, length


def _check_length(path: Path, stated: int, there: int) -> None:
    if stated > there + _HEADER_SLACK:
        raise InputError(
            f"{path} is cut off: it states {stated} bytes of samples but contains {max(0, there)}; copy it again"
        )


def _chunks(stream: BinaryIO, size: int, order: str, position: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and stated length of every chunk of a RIFF or AIFF file."""
    while position + 8 <= size:
        stream.seek(position)
        name, length = struct.unpack(f"{order}4sI", stream.read(8))
        yield name, position + 8, length
        position += 8 + length + length % 2


def _wave64_chunks(stream: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the first four letters, start and stated length of every chunk of a Sony Wave64 file."""
    position = _WAVE64_HEADER_BYTES
    while position + _WAVE64_CHUNK_BYTES <= size:
        stream.seek(position)
        name, length = struct.unpack("<4s12xQ", stream.read(_WAVE64_CHUNK_BYTES))
        yield name, position + _WAVE64_CHUNK_BYTES, length - _WAVE64_CHUNK_BYTES
        position += max(length + -length % 8, _WAVE64_CHUNK_BYTES)


def _ends_with_chunks(stream: BinaryIO, start: int, size: int) -> bool:
    """Whether the rest of the file consists of chunks, not samples."""
    end = start
    for name, begin, length in _chunks(stream, size, "<", start):
        if not name.strip().isalnum():
            return False
        end = begin + length + length % 2
    return end == size
