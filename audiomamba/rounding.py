"""What rounded weights cost a waveform model on real clips, and its record in the model folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from audiomamba.data.clips import Clip
from audiomamba.models import WaveformModel, load_waveform_model
from audiomamba.models.step_program import WaveformSteps, steps_library
from mambacore.errors import InputError
from mambacore.files import replaced_when_whole
from mambacore.layers.step_weights import WEIGHT_FORMATS
from mambacore.model_folder import CARD_NAME, CONFIG_NAME

DETAIL: Final = "rounded_weights"
LARGEST_CHANGE: Final = 0.01
"""Bits per sample that rounding may cost."""

_SECTION: Final = "## Rounded weights"


class RoundingCost(NamedTuple):
    """Bits per sample of real clips by the format of the weights."""

    bits: dict[str, float]
    clips: int
    samples: int

    def change(self, weight_format: str) -> float:
        """Bits per sample more than with weights in float32."""
        return self.bits[weight_format] - self.bits["float32"]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        changes = {name: round(self.change(name), 6) for name in self.bits if name != "float32"}
        bits = round(self.bits["float32"], 6)
        return {"clips": self.clips, "samples": self.samples, "bits_per_sample": bits, "change": changes}


def rounding_cost(model: WaveformModel, clips: Iterable[Clip], formats: Sequence[str] = WEIGHT_FORMATS) -> RoundingCost:
    """Measure the bits per sample of clips, by native steps without labels and clock, with the weights in each format.

    Raises:
        InputError: if there are no clips, or the model has no native steps.
    """
    library, clips = steps_library(model), list(clips)
    if library is None:
        raise InputError("this model has no native steps; measure one of selective, S4D and feed-forward layers")
    samples = sum(len(clip.classes) for clip in clips)
    if samples == 0:
        raise InputError("there are no clips to measure rounded weights on; name a folder of recordings")
    middle, bits = model.config.quantiser.middle_class, {}
    for weight_format in dict.fromkeys(("float32", *formats)):
        steps, nats = WaveformSteps(model, library, weight_format), 0.0
        for clip in clips:
            given = clip.classes.long().unsqueeze(0)
            nats -= float(steps.run(steps.memory(1), torch.tensor([middle]), 0, given=given)[1].sum())
        bits[weight_format] = nats / samples / math.log(2)
    return RoundingCost(bits, len(clips), samples)


def record_rounding_cost(folder: Path, cost: RoundingCost) -> None:
    """Write what rounding costs into the config.json and the card of a model folder, in place of an earlier record.

    Raises:
        InputError: if the folder is not one of a waveform model, or cannot be written.
    """
    load_waveform_model(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        config.setdefault("details", {})[DETAIL] = cost.record()
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        contents = {
            CONFIG_NAME: json.dumps(config, indent=2, allow_nan=False) + "\n",
            CARD_NAME: _with_section(card, cost),
        }
        for name, text in contents.items():
            with replaced_when_whole(folder / name) as stream:
                stream.write(text.encode())
    except OSError as error:
        raise InputError(
            f"the cost of rounding cannot be recorded in {folder} ({error.strerror or error}); check the folder"
        ) from error


def recorded_change(details: Mapping[str, Any], weight_format: str) -> float | None:
    """Bits per sample that a format costs, as recorded in the details of a model folder; None if it is not recorded."""
    record = details.get(DETAIL)
    changes = record.get("change") if isinstance(record, dict) else None
    change = changes.get(weight_format) if isinstance(changes, dict) else None
    return float(change) if isinstance(change, int | float) else None


def _with_section(card: str, cost: RoundingCost) -> str:
    """The card with the section on rounded weights, before the next section or at its end."""
    changes = ", ".join(f"{cost.change(name):+.4f} in {name}" for name in cost.bits if name != "float32")
    section = (
        f"{_SECTION}\n\nBits per sample with rounded weights (`--weights`) on {cost.clips:,} real clips "
        f"({cost.samples:,} samples), without\nlabels and clock, beside {cost.bits['float32']:.4f} in float32: "
        f"{changes}.\n"
    )
    present = re.compile(rf"^{_SECTION}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if present.search(card):
        return present.sub(lambda match: section + ("\n" if match.end() < len(card) else ""), card, count=1)
    return f"{card.rstrip()}\n\n{section}"
