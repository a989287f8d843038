"""Read pairs: two mates are one call, from one interleaved file or from two files of forward and reverse reads."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np

from genomamba.classification.evidence import RecordEvidence
from genomamba.classification.records import Classification, Group, RecordClassifier
from genomamba.io.compression import STANDARD_INPUT
from genomamba.io.fastq import read_record_texts
from mambacore.errors import InputError
from mambacore.files import temporary_folder

MATE_ENDINGS = ("/1", "/2")


def pair_name(name: str) -> str:
    """The name of a read without that of the mate: `r` of `r/1` and of `r/2`."""
    return name[:-2] if name.endswith(MATE_ENDINGS) and len(name) > 2 else name


def pairs(records: Iterator[RecordEvidence]) -> Iterator[list[RecordEvidence]]:
    """Records in order, two together where they follow each other, in one file, as mates; others alone."""
    waiting: RecordEvidence | None = None
    for record in records:
        if waiting is None:
            waiting = record
        elif are_mates(waiting.name, record.name) and waiting.source == record.source:
            yield [waiting, record]
            waiting = None
        else:
            yield [waiting]
            waiting = record
    if waiting is not None:
        yield [waiting]


def are_mates(first: str, second: str) -> bool:
    """Whether two reads have one name, or one that ends in `/1` and then in `/2`."""
    return (first == second and not first.endswith(MATE_ENDINGS)) or (
        first.endswith("/1") and second.endswith("/2") and first[:-2] == second[:-2]
    )


def answer_pair(classifier: RecordClassifier, records: Sequence[RecordEvidence]) -> Classification:
    """The call of one read, or of two mates by their summed evidence."""
    answers = [classifier.answer(record) for record in records]
    if len(records) == 1:
        return answers[0]
    group = Group(np.zeros(()))
    for record, answer in zip(records, answers, strict=True):
        group.add(record, answer.p_value)
    whole = classifier.answer_group(pair_name(records[0].name), group)
    return replace(whole, length=sum(record.length for record in records))


@contextmanager
def interleaved(sources: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Files in which mates follow each other, and what each is called.

    Args:
        sources: one interleaved file, or files of forward and of reverse reads in turns, which are interleaved in
            temporary files.

    Raises:
        InputError: an odd number of files, files of other names or lengths, or a file that cannot be read.
    """
    if len(sources) == 1:
        yield list(sources), list(sources)
        return
    if len(sources) % 2 or STANDARD_INPUT in sources:
        raise InputError(
            f"--paired is given with {len(sources)} inputs: give one interleaved file, or pairs of files, forward "
            "before reverse reads."
        )
    with temporary_folder() as folder:
        paths = []
        for number, (forward, reverse) in enumerate(zip(sources[::2], sources[1::2], strict=True)):
            path = folder / f"{number}"
            try:
                with path.open("wb") as stream:
                    stream.writelines(_alternating(forward, reverse))
            except OSError as error:
                raise InputError(f"{forward} cannot be copied to {folder} ({error.strerror}): set TMPDIR.") from error
            paths.append(str(path))
        yield paths, list(sources[::2])


def _alternating(forward: str, reverse: str) -> Iterator[bytes]:
    with closing(_whole_records(forward)) as first, closing(_whole_records(reverse)) as second:
        for number, texts in enumerate(itertools.zip_longest(first, second), start=1):
            if None in texts:
                raise InputError(f"{forward} and {reverse} differ in their number of reads: give files of one run.")
            names = [_first_word(text) for text in texts]
            if not are_mates(*names):
                raise InputError(
                    f"read {number} is '{names[0]}' in {forward} and '{names[1]}' in {reverse}: give files with the "
                    "same pairs in the same order."
                )
            yield from texts


def _whole_records(source: str) -> Generator[bytes, None, None]:
    with closing(read_record_texts(source)) as pieces:  # type: ignore[type-var]  # a generator
        for _, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
            yield b"".join(text for _, text in group)


def _first_word(text: bytes) -> str:
    """The name in the header of a record's text."""
    words = text[1:].split(b"\n", 1)[0].split(maxsplit=1)
    return words[0].decode("utf-8", "replace") if words else ""
