"""Ogg files whose pages are missing, cut or damaged, of which a decoder silently reads what comes before.

Page header: RFC 3533, section 6.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

_MAGIC: Final = b"OggS"
_HEADER_BYTES: Final = 27
_CHECKSUM: Final = slice(22, 26)
_FIRST_PAGE_FLAG: Final = 0x02
_LAST_PAGE_FLAG: Final = 0x04
_REVERSED_BYTES: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_ALL_ONES: Final = 0xFFFF_FFFF


class _Page(NamedTuple):
    start: int
    end: int
    flags: int
    stream: int
    number: int


def ogg_starts(content: bytes) -> list[int]:
    """Return where recordings begin in an Ogg file, after checking every page.

    A recording begins at the first page of a stream, unless another stream begins before that one's sound.

    Args:
        content: content of the whole file.

    Raises:
        ValueError: a page is missing, cut or damaged, with what and where.
    """
    starts, is_heading, numbers, last = [0], True, dict[int, int](), None
    for last in _pages(content):
        expected = numbers.get(last.stream)
        if not last.flags & _FIRST_PAGE_FLAG and expected is not None and last.number != expected:
            raise ValueError(f"is damaged: pages are missing before byte {last.start:,}")
        numbers[last.stream] = (last.number + 1) & _ALL_ONES
        begins = bool(last.flags & _FIRST_PAGE_FLAG)
        if begins and not is_heading:
            starts.append(last.start)
        is_heading = begins
    if last is None or not last.flags & _LAST_PAGE_FLAG:
        raise ValueError("is cut off: its last page is missing")
    return starts


def _pages(content: bytes) -> Iterator[_Page]:
    position = 0
    while position < len(content):
        if content[position : position + 4] != _MAGIC:
            if content.find(_MAGIC, position) < 0:
                return  # other bytes after the last page
            raise ValueError(f"is damaged at byte {position:,}")
        header = content[position : position + _HEADER_BYTES]
        segments = header[-1] if len(header) == _HEADER_BYTES else 0
        body = position + _HEADER_BYTES + segments
        end = body + sum(content[body - segments : body])
        if len(header) < _HEADER_BYTES or end > len(content):
            raise ValueError("is cut off: its last page is not whole")
        page = bytearray(content[position:end])
        page[_CHECKSUM] = bytes(4)
        stream, number, checksum = struct.unpack("<III", header[14:26])
        if _checksum(bytes(page)) != checksum:
            raise ValueError(f"is damaged between bytes {position:,} and {end:,}")
        yield _Page(position, end, header[5], stream, number)
        position = end


def _checksum(page: bytes) -> int:
    """The checksum of a page: that of zlib with all bits in reverse, and none of them inverted."""
    found = zlib.crc32(page.translate(_REVERSED_BYTES), _ALL_ONES) ^ _ALL_ONES
    return int(f"{found:032b}"[::-1], 2)
