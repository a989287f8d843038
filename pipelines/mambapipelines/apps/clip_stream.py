"""The address of the page of `audiomamba app` whose sound is generated while it is listened to."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlencode

from torch import Tensor

from audiomamba.data.writing import raw_pcm
from mambacore.errors import InputError

STREAM_PATH: Final = "/stream.wav"
NUMBERS: Final = ("seconds", "seed", "temperature", "top_p", "guidance")
LABEL_PREFIX: Final = "label-"
BYTES_PER_SAMPLE: Final = 2
# What a browser says of a request that a page of another site makes it send (Fetch Metadata, W3C).
OWN_PAGES: Final = ("same-origin", "none")

Stream = Callable[..., Iterator[Tensor]]


def stream_address(numbers: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Return the address, below that of the page, of the clip that these settings ask for.

    Args:
        numbers: a value for each of `NUMBERS`.
        labels: as in `audiomamba.generation.WaveformGenerator.stream`.
    """
    asked: dict[str, object] = {name: numbers[name] for name in NUMBERS}
    return f"{STREAM_PATH}?{urlencode(asked | {LABEL_PREFIX + name: value for name, value in labels.items()})}"


def wav_header(samples: int, sample_rate_hz: int) -> bytes:
    """Return the first 44 bytes of a WAV file of so many samples: 16 bits, one channel."""
    size = samples * BYTES_PER_SAMPLE
    content = io.BytesIO()
    content.write(struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE"))
    rates = (sample_rate_hz, sample_rate_hz * BYTES_PER_SAMPLE)
    content.write(struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, *rates, BYTES_PER_SAMPLE, 8 * BYTES_PER_SAMPLE))
    content.write(struct.pack("<4sI", b"data", size))
    return content.getvalue()


def stream_route(stream: Stream, sample_rate_hz: int) -> Any:
    """Build the route that answers `stream_address`, a `starlette.routing.Route`.

    Args:
        stream: takes the `NUMBERS` and `labels` by name, and returns the pieces of one clip as they are generated; its
            errors come before the first piece.
        sample_rate_hz: of the pieces.
    """
    from starlette.requests import Request  # noqa: PLC0415 - comes with Gradio
    from starlette.responses import PlainTextResponse, Response, StreamingResponse  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    def answer(request: Request) -> Response:
        if request.headers.get("sec-fetch-site", "none") not in OWN_PAGES:
            return PlainTextResponse("this sound is for its own page only", 403)
        try:
            numbers = {name: float(request.query_params[name]) for name in NUMBERS}
        except (KeyError, ValueError):
            return PlainTextResponse(f"give a number for each of {', '.join(NUMBERS)}", 400)
        labels = {
            name.removeprefix(LABEL_PREFIX): value
            for name, value in request.query_params.items()
            if name.startswith(LABEL_PREFIX)
        }
        try:
            pieces = stream(**numbers, labels=labels)
        except InputError as error:
            return PlainTextResponse(str(error), 400)
        samples = max(1, round(numbers["seconds"] * sample_rate_hz))

        def content() -> Iterator[bytes]:
            yield wav_header(samples, sample_rate_hz)
            for piece in pieces:
                yield raw_pcm(piece)

        length = {"content-length": str(len(wav_header(0, 1)) + samples * BYTES_PER_SAMPLE)}
        return StreamingResponse(content(), media_type="audio/wav", headers={**length, "cache-control": "no-store"})

    return Route(STREAM_PATH, answer)
