"""Lines of FASTQ: the same for any blocks, and joined once however long they are."""

import random

import pytest

from genomamba.io import fastq
from genomamba.io.fastq import parse_fastq
from mambacore.errors import InputError

RECORDS = [(f"r{number}".encode(), b"ACGT" * (number + 1)) for number in range(6)]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("longest_block", [1, 2, 3, 7, 1000])
def test_blocks_may_end_anywhere(line_end: bytes, longest_block: int) -> None:
    text = b"".join(
        line_end.join((b"@" + name, letters, b"+", b"I" * len(letters))) + line_end for name, letters in RECORDS
    )
    chance, blocks, position = random.Random(longest_block), [], 0
    while position < len(text):
        size = chance.randint(1, longest_block)
        blocks.append(text[position : position + size])
        position += size
    assert [(record.header, record.letters) for record in parse_fastq(blocks, "x")] == RECORDS


class Watched(bytes):
    """A block that counts how often it is looked through for the end of a line."""

    looks = 0

    def __contains__(self, item: object) -> bool:
        Watched.looks += 1
        return super().__contains__(item)  # type: ignore[operator]


def test_a_long_line_is_looked_through_once_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastq, "_LONGEST_LINE_BYTES", 100_000)
    blocks = [Watched(b"@" + b"a" * 999), *(Watched(b"a" * 1000) for _ in range(1000))]
    with pytest.raises(InputError, match="has a line of more than 100,000 characters"):
        list(parse_fastq(blocks, "x"))
    # Two kinds of ends, in the blocks up to the limit.
    assert Watched.looks == 2 * 101
