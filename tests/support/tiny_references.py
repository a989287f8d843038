"""A small reference genome and its spellings as FASTA and BGZF."""

import struct
import zlib

import numpy as np


def random_letters(length: int, seed: int = 0) -> bytes:
    letters = np.frombuffer(b"ACGTNacgtnRYKM", dtype=np.uint8)
    return letters[np.random.default_rng(seed).integers(len(letters), size=length)].tobytes()


CONTIGS = {"chr1": random_letters(20_011, 1), "chr2": random_letters(7_000, 2), "chrM": random_letters(61, 3)}


def fasta_bytes(contigs: dict[str, bytes], width: int = 60, line_end: bytes = b"\n") -> bytes:
    text = b""
    for name, letters in contigs.items():
        text += b">" + name.encode() + b" described" + line_end
        for start in range(0, len(letters), width):
            text += letters[start : start + width] + line_end
    return text


def block_gzip(content: bytes, block_bytes: int = 0xFF00) -> bytes:
    """BGZF after the SAM specification, section 4.1; the empty block at the end marks the end of the file."""
    blocks = b""
    for start in [*range(0, len(content), block_bytes), len(content)]:
        text = content[start : start + block_bytes]
        compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
        data = compressor.compress(text) + compressor.flush()
        header = struct.pack("<BBBBIBBHBBHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(data) + 25)
        blocks += header + data + struct.pack("<II", zlib.crc32(text), len(text))
    return blocks
