"""The local page of `audiomamba app`: generate clips, continue an uploaded one, view and play them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import audiomamba
from audiomamba.data.labels import EVERY_VALUE
from audiomamba.data.sampling_settings import SamplingSettings
from audiomamba.data.waveforms import read_waveform
from audiomamba.data.writing import encoded
from audiomamba.generation import GeneratedClips, WaveformGenerator
from mambacore.errors import InputError
from mambapipelines.apps.clip_stream import stream_address, stream_route
from mambapipelines.apps.server import load_gradio, paragraph, player
from mambapipelines.device import begin_computing
from mambapipelines.pages.clips import clip_picture
from mambapipelines.pages.html import Player, embedded_players
from mambapipelines.waveforms.generate import precision_of_steps

MOST_CLIPS = 16
ANY_LABEL = "any"


@dataclass(frozen=True)
class ClipPage:
    """Logic of the page, without its layout.

    Attributes:
        generator: the model.
        longest_seconds: longest duration of clips and uploads.
        precision: makes the context in which steps are computed.
    """

    generator: WaveformGenerator
    longest_seconds: float
    precision: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def suggested(self) -> SamplingSettings:
        """The settings that the model suggests, with which the page opens."""
        return self.generator.model.config.sampling

    def generate(
        self,
        clips: float,
        seconds: float,
        seed: float,
        temperature: float,
        top_p: float,
        upload: str | None,
        guidance: float = 1.0,
        labels: Mapping[str, str] | None = None,
    ) -> GeneratedClips:
        """Generate clips, or continue an upload at any rate.

        `guidance` applies to labelled clips only.

        Raises:
            InputError: if a number is out of range, or the upload is not audio or too long.
        """
        if not 1 <= clips <= MOST_CLIPS:
            raise InputError(f"{clips:g} clips were requested: this page generates 1 to {MOST_CLIPS}.")
        self._check(seconds, seed)
        prompt = None
        if upload is not None:
            waveform = read_waveform(upload)
            length = len(waveform.samples) / waveform.sample_rate_hz
            if length > self.longest_seconds:
                raise InputError(
                    f"{upload} lasts {length:.1f} seconds: this page continues at most {self.longest_seconds:g}."
                )
            prompt = self.generator.prompt(waveform)
        with torch.inference_mode(), self.precision():
            return self.generator.generate(
                int(clips),
                float(seconds),
                int(seed),
                float(temperature),
                float(top_p),
                labels=labels,
                guidance=float(guidance) if labels else 1.0,
                candidates=self.suggested.candidates if labels else 1,
                prompt=prompt,
            )

    def stream(
        self,
        seconds: float,
        seed: float,
        temperature: float,
        top_p: float,
        guidance: float = 1.0,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield a clip as it is generated: the first that `generate` returns if the model suggests one candidate.

        Raises:
            InputError: as `generate`, immediately.
        """
        self._check(seconds, seed)
        pieces = self.generator.stream(
            float(seconds), int(seed), float(temperature), float(top_p), labels=labels,
            guidance=float(guidance) if labels else 1.0,
        )  # fmt: skip
        return self._streamed(pieces)

    def _streamed(self, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the pieces, each computed in the page's precision: a context would leak to whoever reads them."""
        while True:
            with self.precision():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _check(self, seconds: float, seed: float) -> None:
        if not 0 < seconds <= self.longest_seconds:
            raise InputError(
                f"{seconds:g} seconds were requested: this page generates at most {self.longest_seconds:g}; start it "
                "with a larger --longest-seconds, or use `audiomamba generate`."
            )
        if not 0 <= seed < 2**53 or seed != int(seed):
            raise InputError(f"the seed is {seed:g}: use an integer of 0 or more.")


def players(found: GeneratedClips, seed: int) -> str:
    """Return the clips as HTML, with waveform, spectrogram and player."""
    rate = found.quantiser.sample_rate_hz
    items = [
        Player(
            encoded(samples, rate),
            f"clip {number}, seed {seed}{_asked(labels)}: {bits:.3f} bits per sample",
            png=clip_picture(samples, rate),
        )
        for number, samples, bits, labels in zip(
            found.numbers, found.samples, found.bits_per_sample.tolist(), found.labels, strict=True
        )
    ]
    return embedded_players(items)


def _asked(labels: Mapping[str, str]) -> str:
    return "".join(f", {name} {value}" for name, value in labels.items())


def clip_app(
    folder: Path | str, longest_seconds: float, threads: int | None, device: str = "auto", precision: str = "float32"
) -> tuple[Any, list[Any]]:
    """Build the page for the model in a folder.

    Returns:
        A `gradio.Blocks`, and the route of the sound that it streams, for `mambapipelines.apps.server.serve`.

    Raises:
        InputError: if the folder has no waveform model, or Gradio is not installed.
    """
    gradio = load_gradio()
    placement = begin_computing(device, precision, threads)
    generator = audiomamba.load(folder, placement.device)
    precision_of_steps(placement, generator, precision)  # a mistake is told before the page opens
    page = ClipPage(generator, longest_seconds, lambda: precision_of_steps(placement, generator, precision))
    rate = page.generator.quantiser.sample_rate_hz

    sets = page.generator.label_sets

    def generate(*asked: Any) -> tuple[str, str]:
        clips, seconds, seed, temperature, top_p, upload, guidance, *chosen = asked
        labels = {one.name: value for one, value in zip(sets, chosen, strict=True) if value and value != ANY_LABEL}
        try:
            found = page.generate(clips, seconds, seed, temperature, top_p, upload, guidance, labels)
        except InputError as error:
            # Show the name of the upload, not its path on the server.
            sentence = str(error) if upload is None else str(error).replace(upload, Path(upload).name)
            return paragraph(sentence, mistake=True), ""
        speed = (
            f"{found.samples_per_second:,.0f} samples per second, {found.real_time_factor:.2f} times real time "
            f"in all, at {rate:,} Hz."
        )
        return paragraph(speed), players(found, int(asked[2]))

    def listen(*asked: Any) -> tuple[str, str]:
        _, seconds, seed, temperature, top_p, upload, guidance, *chosen = asked
        labels = {one.name: value for one, value in zip(sets, chosen, strict=True) if value and value != ANY_LABEL}
        numbers = {"seconds": seconds, "seed": seed, "temperature": temperature, "top_p": top_p, "guidance": guidance}
        try:
            if upload is not None:
                raise InputError("an upload is continued by Generate only: remove it to listen to a new clip.")
            page.stream(**numbers, labels=labels)  # whose mistakes are told here rather than by the player
        except InputError as error:
            return paragraph(str(error), mistake=True), ""
        sentence = "The first clip of these settings, generated while it plays:"
        return paragraph(sentence), player(stream_address(numbers, labels))

    with gradio.Blocks(title="audiomamba", analytics_enabled=False) as blocks:
        gradio.Markdown("# Generate clips, or continue one")
        with gradio.Row():
            clips = gradio.Number(4, label="Clips", precision=0, minimum=1, maximum=MOST_CLIPS, elem_id="clips")
            seconds = gradio.Number(1.0, label="Seconds of each", elem_id="seconds")
            seed = gradio.Number(0, label="Seed", precision=0, elem_id="seed")
            temperature = gradio.Number(page.suggested.temperature, label="Temperature", elem_id="temperature")
            top_p = gradio.Number(page.suggested.top_p, label="Top p", elem_id="top-p")
        with gradio.Row(visible=bool(sets)):
            choices = [
                gradio.Dropdown(
                    [ANY_LABEL, EVERY_VALUE, *one.values], value=ANY_LABEL, label=one.name, elem_id=f"label-{one.name}"
                )
                for one in sets
            ]
            guidance = gradio.Number(page.suggested.guidance, label="Guidance", elem_id="guidance")
        upload = gradio.File(label="A clip to continue (optional)", type="filepath", elem_id="upload")
        with gradio.Row():
            button = gradio.Button("Generate", variant="primary", elem_id="generate")
            immediately = gradio.Button("Listen while it is generated", elem_id="listen")
        summary = gradio.HTML(elem_id="summary")
        sounds = gradio.HTML(elem_id="sounds")
        asked = [clips, seconds, seed, temperature, top_p, upload, guidance, *choices]
        button.click(generate, asked, [summary, sounds])
        immediately.click(listen, asked, [summary, sounds])
    return blocks, [stream_route(page.stream, rate)]
