"""How clips are sampled unless a caller says otherwise: settings that are stored with a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from mambacore.errors import InputError
from mambacore.models.sampling import check_sampling

MOST_CANDIDATES: Final = 256
LARGEST_GUIDANCE: Final = 20.0
BY_LIKELIHOOD: Final = "likelihood"


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Settings of generation; see `audiomamba.generation.WaveformGenerator.generate`.

    Attributes:
        temperature: divisor of the logits, from 0.
        top_p: above 0 and at most 1.
        guidance: from 0, for clips with labels.
        candidates: from 1, for clips with labels that are generated whole.
        judge: what the best of several candidates is chosen by: `likelihood`, or the name of a clip classifier.

    Raises:
        InputError: if a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0
    candidates: int = 1
    judge: str = BY_LIKELIHOOD

    def __post_init__(self) -> None:
        if not isinstance(self.judge, str) or not self.judge:
            raise InputError(f"the judge is {self.judge!r}; name a clip classifier, or {BY_LIKELIHOOD}")
        for name in ("temperature", "top_p", "guidance", "candidates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"the {name} of the sampling settings is {value!r}; give a finite number")
        check_sampling(self.temperature, self.top_p)
        if not 0 <= self.guidance <= LARGEST_GUIDANCE:
            raise InputError(f"the guidance is {self.guidance:g}; use a number from 0 to {LARGEST_GUIDANCE:g}")
        if not isinstance(self.candidates, int) or not 1 <= self.candidates <= MOST_CANDIDATES:
            raise InputError(f"{self.candidates} candidates were asked for; ask for 1 to {MOST_CANDIDATES}")

    def __str__(self) -> str:
        """Return the settings in words: temperature and top-p, and what applies to labels where it does."""
        guided = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        by = "" if self.judge == BY_LIKELIHOOD else f" by {self.judge}"
        best = "" if self.candidates == 1 else f", the best of {self.candidates} candidates each{by}"
        return f"temperature {self.temperature:g}, top-p {self.top_p:g}{guided}{best}"

    def chosen(
        self,
        temperature: float | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        candidates: int | None = None,
        judge: str | None = None,
        *,
        labelled: bool,
    ) -> SamplingSettings:
        """Return these settings with those that a caller chose instead; `None` leaves one as it is.

        Args:
            temperature, top_p, guidance, candidates, judge: see the class.
            labelled: whether labels are asked for; without them there is neither guidance nor a choice of candidates.

        Raises:
            InputError: if a value is out of range, or needs labels and there are none.
        """
        stored = self if labelled else dataclasses.replace(self, guidance=1.0, candidates=1)
        settings = SamplingSettings(
            stored.temperature if temperature is None else temperature,
            stored.top_p if top_p is None else top_p,
            stored.guidance if guidance is None else guidance,
            stored.candidates if candidates is None else candidates,
            stored.judge if judge is None else judge,
        )
        if settings.guidance != 1 and not labelled:
            raise InputError("guidance exaggerates what labels say; ask for a label too")
        if settings.candidates != 1 and not labelled:
            raise InputError("candidates are compared by how well they fit their labels; ask for a label too")
        if judge is not None and settings.candidates == 1:
            raise InputError("a judge chooses among candidates; ask for two or more of them")
        return settings

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_config` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, values: object) -> SamplingSettings:
        """Inverse of `to_config`; settings that are absent have their defaults.

        Raises:
            InputError: if a key is unknown or a value out of range.
        """
        known = [one.name for one in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or not set(values) <= set(known):
            raise InputError(f"sampling is {values!r} in the model's configuration; use {', '.join(known)}")
        return cls(**values)
