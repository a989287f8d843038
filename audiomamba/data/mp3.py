"""MP3 files whose stated length is wrong.

A decoder takes the number of frames from the Xing (or Info) header in the first frame, or estimates it from the bit
rate of the first frames. Concatenated files keep the header of their first part, and files of variable bit rate without
a header are misestimated, so part of them would be dropped silently. Here the frames are counted, and the file is cut
into streams with correct headers.

Frame header: ISO/IEC 11172-3, section 2.4.1.3. Xing header: https://gabriel.mp3-tech.org/mp3infotag.html.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_KILOBITS_1: Final = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KILOBITS_2: Final = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES_HZ: Final = (44_100, 48_000, 32_000)
_TAGS: Final = (b"Xing", b"Info")
_FRAMES_FLAG: Final = 1
_BYTES_FLAG: Final = 2
_BITRATE_INDEX_OF_HEADER: Final = 9  # large enough for a header in any version
_ID3_HEADER_BYTES: Final = 10
_ID3V1_BYTES: Final = 128
_FRAMES_OF_A_PART: Final = 3


class _Frame(NamedTuple):
    start: int
    length: int
    rate_hz: int
    channels: int
    tag: int  # offset of a Xing header within the frame
    stated: int | None  # frames stated by a Xing header, -1 if it states none; None for a frame of sound


def mp3_streams(content: bytes) -> list[bytes] | None:
    """Split an MP3 file into its parts, each with a header that states its length.

    Args:
        content: content of the whole file.

    Returns:
        The parts; None if the file is one part with the correct length, or not Layer III: it can be read unchanged.

    Raises:
        ValueError: a part has another rate, or another number of channels, than the first.
    """
    parts: list[list[_Frame]] = []
    first: _Frame | None = None
    other: list[_Frame] = []
    for frame in _frames(content):
        first = first or frame
        if (frame.rate_hz, frame.channels) != (first.rate_hz, first.channels):
            # Chance bits look like a frame, but not like several of one kind in a row.
            follows = other and other[-1].start + other[-1].length == frame.start
            other = [*other, frame] if follows and _kind(other[-1]) == _kind(frame) else [frame]
            if len(other) == _FRAMES_OF_A_PART:
                raise ValueError(f"after a part of {_kind(first)} comes one of {_kind(frame)}")
            continue
        if frame.stated is not None or not parts:
            parts.append([])
        parts[-1].append(frame)
    sounding = [part for part in parts if any(frame.stated is None for frame in part)]
    streams = [_stream(content, part) for part in sounding]
    if not streams or (len(streams) == 1 and streams[0] is None):
        return None
    return [
        stream or content[part[0].start : part[-1].start + part[-1].length]
        for stream, part in zip(streams, sounding, strict=True)
    ]


def _kind(frame: _Frame) -> str:
    return f"{frame.rate_hz} Hz with {frame.channels} channel{'s' * (frame.channels > 1)}"


def _stream(content: bytes, part: list[_Frame]) -> bytes | None:
    """Return a part with a new header; None if it has one that states at least its actual length.

    If the header states more, the part is truncated, which is detected on reading.
    """
    sound = [frame for frame in part if frame.stated is None]
    if part[0].stated is not None and part[0].stated >= len(sound) - 1:
        return None
    data = b"".join(content[frame.start : frame.start + frame.length] for frame in sound)
    first = sound[0]
    header = bytearray(content[first.start : first.start + 4])
    header[1] |= 1  # no checksum follows
    header[2] = (header[2] & 0x0C) | (_BITRATE_INDEX_OF_HEADER << 4)
    parsed = _parsed(bytes(header), 0)
    assert parsed is not None  # a valid header stays one
    frame = bytearray(parsed.length)
    frame[:4] = header
    numbers = struct.pack(">II", len(sound), len(data) + parsed.length)
    tag = _TAGS[0] + struct.pack(">I", _FRAMES_FLAG | _BYTES_FLAG) + numbers
    frame[parsed.tag : parsed.tag + len(tag)] = tag
    return bytes(frame) + data


def _frames(content: bytes) -> Iterator[_Frame]:
    """Yield every frame in order; tags and other bytes between frames are skipped."""
    position = 0
    while position + 4 <= len(content):
        if content[position : position + 3] == b"ID3":
            size = 0
            for byte in content[position + 6 : position + _ID3_HEADER_BYTES]:
                size = size << 7 | byte & 0x7F
            position += _ID3_HEADER_BYTES + size
            continue
        if content[position : position + 3] == b"TAG":
            position += _ID3V1_BYTES
            continue
        frame = _parsed(content, position)
        if frame is None or frame.start + frame.length > len(content):
            position = content.find(b"\xff", position + 1)
            if position < 0:
                return
            continue
        yield frame
        position += frame.length


def _parsed(content: bytes, start: int) -> _Frame | None:
    """Parse the Layer III frame whose header begins here."""
    first, second, third, fourth = content[start : start + 4]
    version, layer = second >> 3 & 3, second >> 1 & 3
    bitrate, rate = third >> 4, third >> 2 & 3
    if first != 0xFF or second & 0xE0 != 0xE0 or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return None
    is_first_version, is_mono = version == 3, fourth >> 6 == 3
    rate_hz = _RATES_HZ[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits = 1000 * (_KILOBITS_1 if is_first_version else _KILOBITS_2)[bitrate]
    length = (144 if is_first_version else 72) * bits // rate_hz + (third >> 1 & 1)
    side = (17 if is_mono else 32) if is_first_version else (9 if is_mono else 17)
    tag, stated = 4 + side, None
    if content[start + tag : start + tag + 4] in _TAGS:
        flags, count = struct.unpack(">II", content[start + tag + 4 : start + tag + 12].ljust(8, b"\0"))
        stated = count if flags & _FRAMES_FLAG else -1
    return _Frame(start, length, rate_hz, 1 if is_mono else 2, tag, stated)
