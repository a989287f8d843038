"""The local page of `genomamba app`: paste or upload FASTA, see the calls and the classes along each record."""

from __future__ import annotations

import io
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from genomamba.classification.class_track import class_track
from genomamba.io.compression import read_blocks
from genomamba.io.fasta import spool_records
from genomamba.io.fastq import read_sequence_events
from genomamba.models.species_classifier import SpeciesClassifier, load_classifier
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambacore.files import temporary_folder
from mambacore.safe_text import safe_field
from mambapipelines.apps.server import load_gradio, paragraph
from mambapipelines.console import counted
from mambapipelines.device import begin_computing
from mambapipelines.pages.html import embedded_picture
from mambapipelines.pages.plots import plot_class_track
from mambapipelines.species.classify import Classification, RecordClassifier, table_header, table_row
from mambapipelines.species.report import classification_table

MOST_SHOWN_RECORDS = 200
PASTED = "the pasted text"
# Characters of a base with its quality and line ends, and of names, in the longest input.
BYTES_PER_BASE = 3
BYTES_FOR_NAMES = 1 << 20
REMEDY = "use `genomamba classify`, or start the page with a larger --most-bases."


@dataclass(frozen=True)
class Answer:
    """Results for one input.

    Attributes:
        rows: one per record, in order.
        tokens: of the records whose track can be shown, by name.
        table: path of the complete table, for download.
    """

    rows: list[Classification]
    tokens: dict[str, Tokens]
    table: Path

    def summary(self) -> str:
        """In words."""
        calls = ", ".join(f"{sum(row.call == call for row in self.rows):,} {call}" for call in self._calls())
        shown = f" The first {MOST_SHOWN_RECORDS} are shown; the table for download has all."
        return f"{counted(len(self.rows), 'record')}: {calls}." + (shown if len(self.rows) > MOST_SHOWN_RECORDS else "")

    def _calls(self) -> list[str]:
        return sorted({row.call for row in self.rows})


class SpeciesPage:
    """Logic of the page, without its layout.

    Args:
        model: a species classifier.
        most_bases: an input of more bases is refused.
    """

    def __init__(self, model: SpeciesClassifier, most_bases: int) -> None:
        self.model = model
        self.most_bases = most_bases
        self.class_names = model.config.class_names
        opened = ExitStack()
        self._folder = opened.enter_context(temporary_folder())
        weakref.finalize(self, opened.close)

    def answer(self, text: str | None, upload: str | None) -> Answer:
        """Classify pasted or uploaded sequences.

        Raises:
            InputError: nothing or both were given, the input is not FASTA, or it is too long.
        """
        text = (text or "").strip()
        if bool(text) == bool(upload):
            raise InputError("paste FASTA or upload a file, but not both: clear one of them.")
        label = PASTED if upload is None else safe_field(Path(upload).name)
        place = Path(tempfile.mkdtemp(dir=self._folder))
        plain = place / "input"
        try:
            self._copy(_source(text, upload), plain, label)
            tracked = self._first_records(plain)
            rows = list(RecordClassifier(self.model).classify(str(plain)))
        except InputError as error:
            raise InputError(str(error).replace(str(plain), label)) from None
        finally:
            plain.unlink(missing_ok=True)
        table = place / "calls.tsv"
        lines = [table_header(self.class_names), *(table_row(row, len(self.class_names)) for row in rows)]
        table.write_bytes(b"".join(lines))
        return Answer(rows, tracked, table)

    def _copy(self, source: str | BinaryIO, plain: Path, label: str) -> None:
        """Copy the input to a plain file, decompressed, up to the limit: a small upload may expand to gigabytes."""
        most_bytes = BYTES_PER_BASE * self.most_bases + BYTES_FOR_NAMES
        written = 0
        with plain.open("wb") as copy, closing(read_blocks(source, label)) as blocks:
            for block in blocks:
                written += len(block)
                if written > most_bytes:
                    raise InputError(f"the input has more than {most_bytes:,} characters: {REMEDY}")
                copy.write(block)

    def _first_records(self, plain: Path) -> dict[str, Tokens]:
        """Tokens by name of the records that are shown; bases are counted while they are read.

        Raises:
            InputError: there are more bases than the page takes.
        """
        tokens: dict[str, Tokens] = {}
        bases = 0
        for number, record in enumerate(spool_records(str(plain), events_of=read_sequence_events)):
            bases += record.length
            if bases > self.most_bases:
                raise InputError(f"the input has more bases than this page takes, {self.most_bases:,}: {REMEDY}")
            if number < MOST_SHOWN_RECORDS and record.length:
                tokens[record.name] = next(record.forward_pieces(record.length))
        return tokens

    def track(self, name: str, tokens: Tokens) -> bytes:
        """Plot a record's track, PNG."""
        track = class_track(self.model, tokens)
        return plot_class_track(track.boundaries, track.probabilities, self.class_names, name)


def _source(text: str, upload: str | None) -> str | BinaryIO:
    """The upload's path, or the pasted text as a stream; bare bases without a header become one record."""
    if upload is not None:
        return upload
    stream = io.BytesIO(f"{text if text.startswith('>') else f'>pasted{chr(10)}{text}'}\n".encode("utf-8", "replace"))
    # The name used in messages.
    stream.name = PASTED  # type: ignore[attr-defined]
    return stream


def species_page(
    folder: Path | str, most_bases: int, threads: int | None, device: str = "auto", precision: str = "float32"
) -> Any:
    """Build the page for the model in a folder, a `gradio.Blocks`.

    Raises:
        InputError: the folder holds no species classifier, or Gradio is not installed.
    """
    gradio = load_gradio()
    placement = begin_computing(device, precision, threads)
    model, _ = load_classifier(folder)
    page = SpeciesPage(model.to(placement.device), most_bases)

    def classify(text: str, upload: str | None) -> Sequence[Any]:
        try:
            with torch.inference_mode(), placement.autocast():
                answer = page.answer(text, upload)
        except InputError as error:
            # Show the name of the upload, not its path on the server.
            sentence = str(error) if upload is None else str(error).replace(upload, Path(upload).name)
            hidden = (gradio.Dataframe(visible=False), gradio.Dropdown(choices=[], value=None, visible=False))
            return paragraph(sentence, mistake=True), *hidden, gradio.DownloadButton(visible=False), {}
        table = classification_table(page.class_names, answer.rows[:MOST_SHOWN_RECORDS])
        names = list(answer.tokens)
        return (
            paragraph(answer.summary()),
            gradio.Dataframe(value=[list(row) for row in table.rows], headers=list(table.header), visible=True),
            gradio.Dropdown(choices=names, value=names[0] if names else None, visible=bool(names)),
            gradio.DownloadButton(value=str(answer.table), visible=True),
            answer.tokens,
        )

    def show_track(name: str | None, tokens: dict[str, Tokens]) -> Any:
        if name is None or name not in tokens:
            return gradio.HTML(value="", visible=False)
        caption = f"Probability of each class along {name}, window by window, both strands averaged"
        with placement.autocast():
            picture = page.track(name, tokens[name])
        return gradio.HTML(value=embedded_picture(picture, caption), visible=True)

    names = ", ".join(page.class_names)
    with gradio.Blocks(title="genomamba", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# Species of DNA sequences\nClasses of this model: {names}.")
        kept = gradio.State({})
        text = gradio.Textbox(label="FASTA, or bare bases", lines=8, max_lines=16, elem_id="fasta")
        upload = gradio.File(label="or a FASTA file, plain or gzipped", type="filepath", elem_id="upload")
        button = gradio.Button("Classify", variant="primary", elem_id="classify")
        summary = gradio.HTML(elem_id="summary")
        calls = gradio.Dataframe(visible=False, interactive=False, label="Calls", elem_id="calls", wrap=True)
        record = gradio.Dropdown(visible=False, label="Record", elem_id="record")
        track = gradio.HTML(visible=False, elem_id="track")
        download = gradio.DownloadButton("Download the table", visible=False, elem_id="download")
        done = button.click(classify, [text, upload], [summary, calls, record, download, kept])
        done.then(show_track, [record, kept], track)
        record.input(show_track, [record, kept], track)
    return blocks
