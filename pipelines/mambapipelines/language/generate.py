"""Sampling DNA from a causal language model: the run behind `genomamba generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from genomamba.io.sources import read_sequences
from genomamba.models.language_model import load_language_model
from genomamba.scoring.embeddings import as_the_model_reads
from genomamba.scoring.generation import Sampling, generate
from genomamba.tokenizer import CharacterTokenizer, Tokens
from mambacore.errors import InputError
from mambacore.safe_text import safe_field
from mambapipelines.console import WorkProgress, counted, note
from mambapipelines.device import begin_computing
from mambapipelines.files import check_writable_place, written_whole

LINE_BASES = 60


MOST_RECORDS = 1_000_000
"""Per prompt. Each has a place in memory before the first is generated."""


@dataclass(frozen=True)
class GenerationOptions:
    """Options of `genomamba generate`; its `--help` describes each."""

    model: str
    records: int
    length: int
    prompt: str | None
    sampling: Sampling
    seed: int
    output: Path | None
    threads: int | None
    device: str = "auto"
    precision: str = "float32"


def run_generation(options: GenerationOptions) -> None:
    """Write the records as FASTA, each with its log-likelihood in its header.

    Raises:
        InputError: the files or options contradict each other.
    """
    if options.records < 1:
        raise InputError(f"--records is {options.records}: use 1 or more.")
    if options.records > MOST_RECORDS:
        raise InputError(
            f"--records is {options.records}: use {MOST_RECORDS:,} at most, and other values of --seed for more."
        )
    if options.output is not None:
        check_writable_place(options.output, "--output", (options.prompt,))
    placement = begin_computing(options.device, options.precision, options.threads)
    prompts = [("", np.empty(0, dtype=np.uint8))] if options.prompt is None else _prompts(options.prompt)
    language_model = load_language_model(options.model).to(placement.device)
    tokenizer = CharacterTokenizer()
    repeated = [(name, as_the_model_reads(language_model, tokens)) for name, tokens in prompts]
    named = [one for one in repeated for _ in range(options.records)]
    started = time.monotonic()
    with (
        _binary_output(options.output) as output,
        WorkProgress("generating", len(named) * options.length, lines_elsewhere=True) as progress,
        placement.autocast(),
    ):
        records = generate(
            language_model,
            [tokens for _, tokens in named],
            options.length,
            options.sampling,
            options.seed,
            advance=progress.advance,
        )
        for (prompt, _), record in zip(named, records, strict=True):
            letters = tokenizer.decode(record.tokens)
            header = (
                f">generated_{record.index + 1} length={options.length} log_likelihood={record.log_likelihood:.4f} "
                f"per_base={record.log_likelihood / options.length:.5f}"
            )
            lines = [header + (f" prompt={safe_field(prompt)}" if prompt else "")]
            lines += [letters[begin : begin + LINE_BASES] for begin in range(0, len(letters), LINE_BASES)]
            output.write(("\n".join(lines) + "\n").encode())
    seconds = max(time.monotonic() - started, 1e-9)
    bases = len(named) * options.length
    note(
        f"{counted(len(named), 'record')} of {options.length} bp in {seconds:.1f} s: "
        f"{bases / seconds:,.0f} bases per second"
    )


def _prompts(prompt: str) -> list[tuple[str, Tokens]]:
    """The prompts with their names: the records of a FASTA or FASTQ file, or the letters themselves."""
    prompts = [(record.name, record.tokens) for record in read_sequences(prompt)]
    for name, tokens in prompts:
        if not len(tokens):
            raise InputError(f"the prompt '{name}' has no bases: give it some, or leave --prompt out.")
    return prompts


@contextmanager
def _binary_output(path: Path | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        return
    with written_whole(path) as stream:
        yield stream
