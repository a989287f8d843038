"""The published architectures by name, with the parameter counts given in the papers.

Counts differ from the papers' by a few percent; the note of an architecture gives the reason where it is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from audiomamba.models.configuration import StageConfig, WaveformModelConfig
from mambacore.errors import InputError

MAMBA: Final = "selective"
# The papers' N = 64 counts conjugates.
S4D: Final[Mapping[str, Any]] = {"name": "s4d", "state_size": 32}
# A block has about 6 width^2 parameters whatever its mixer: 2 + 4 for S4 and its feed-forward, 4 + 2 for attention and
# its own (Gu & Dao, arXiv 2312.00752, appendix E.4.2).
FEED_FORWARD_EXPANSION: Final = 2
FEED_FORWARD_EXPANSION_BESIDE_ATTENTION: Final = 1
SASHIMI_LAYERS: Final = 8


@dataclasses.dataclass(frozen=True)
class PublishedArchitecture:
    """A published model.

    Attributes:
        config: the configuration to build it from.
        published_parameters: as printed in the paper, in millions.
        source: the paper and the section.
        note: why the count differs, and other remarks.
    """

    config: WaveformModelConfig
    published_parameters: float
    source: str
    note: str = ""


def _mamba(layers: int) -> StageConfig:
    return StageConfig(layers, MAMBA)


def _s4(layers: int = SASHIMI_LAYERS) -> StageConfig:
    return StageConfig(layers, dict(S4D), FEED_FORWARD_EXPANSION)


def _attention(layers: int = SASHIMI_LAYERS) -> StageConfig:
    # Eight heads without biases by default; the public S4 code has eight with biases, 4 width numbers more per layer.
    return StageConfig(layers, "attention", FEED_FORWARD_EXPANSION_BESIDE_ATTENTION)


def _stages(outer: StageConfig, centre: StageConfig) -> WaveformModelConfig:
    return WaveformModelConfig((outer, outer, centre))


_MAMBA_PAPER: Final = "Gu & Dao, arXiv 2312.00752"
_SASHIMI_PAPER: Final = "Goel, Gu, Donahue & Re, arXiv 2202.09729"
_MAMBA_NOTE: Final = "The paper does not itemise its count."
_S4D_NOTE: Final = (
    "The published S4 shares one state matrix among all channels of a layer; S4D here has one per channel, adding 64 "
    "numbers per channel and layer."
)
_ATTENTION_NOTE: Final = (
    "Four width^2 for attention and two for its feed-forward of expansion 1, as the paper's appendix E.4.2 says; "
    "a Mamba block has 6.7 width^2."
)
_ABLATION_SOURCE: Final = f"{_MAMBA_PAPER}, table 5 and appendix E.4.2 (all six are given as 6M)"

BLOCKS: Final[Mapping[str, Callable[[], StageConfig]]] = {
    "mamba": lambda: _mamba(SASHIMI_LAYERS),
    "s4": _s4,
    "attention": _attention,
}
"""Blocks of the Mamba paper's ablation on SC09, eight layers at each depth."""

OUTER_BLOCKS: Final = ("mamba", "s4")
CENTRE_BLOCKS: Final = ("mamba", "s4", "attention")

LATER_BLOCKS: Final = ("mamba2", "mamba3")
"""Mixers published after the papers, available at any depth of the ablation's model."""
ABLATION: Final = "sc09"
"""Name of the ablation's family of models, which differ in their `outer` and `centre` blocks."""

_CENTRE_NOTES: Final = {"mamba": "", "s4": _S4D_NOTE, "attention": _ATTENTION_NOTE}


def _ablation(outer: str, centre: str) -> PublishedArchitecture:
    same = "The same model as mamba-sc09-6m." if outer == centre == "mamba" else ""
    note = same or _CENTRE_NOTES[centre] or _S4D_NOTE
    return PublishedArchitecture(_stages(BLOCKS[outer](), BLOCKS[centre]()), 6.0, _ABLATION_SOURCE, note)


ARCHITECTURES: Final[Mapping[str, PublishedArchitecture]] = {
    "mamba-sc09-6m": PublishedArchitecture(
        _stages(_mamba(8), _mamba(8)), 6.1, f"{_MAMBA_PAPER}, table 4 and appendix E.4.2", _MAMBA_NOTE
    ),
    "mamba-sc09-24m": PublishedArchitecture(
        dataclasses.replace(_stages(_mamba(15), _mamba(15)), model_width=96),
        24.3,
        f"{_MAMBA_PAPER}, table 4 and appendix E.4.2",
        _MAMBA_NOTE,
    ),
    **{f"{ABLATION}-{outer}-{centre}": _ablation(outer, centre) for outer in OUTER_BLOCKS for centre in CENTRE_BLOCKS},
    "sashimi": PublishedArchitecture(
        _stages(_s4(), _s4()),
        5.8,
        f"{_SASHIMI_PAPER}; its code has 5.87M",
        _S4D_NOTE + " The metrics of the table's 5.8M row belong to one of 6.8M.",
    ),
    "sashimi-no-unet": PublishedArchitecture(
        dataclasses.replace(_stages(_s4(), _s4()), blocks_on_the_way_down=False),
        5.45,
        f"{_SASHIMI_PAPER}, the count of its code",
        "That S4 has a state matrix, a rank-one term and an input matrix for each channel, 192 numbers; S4D has 64.",
    ),
    "mamba-youtubemix": PublishedArchitecture(
        WaveformModelConfig(
            (StageConfig(3, {"name": MAMBA, "state_size": 8, "complex_state": True}),) * 3,
            pooling=(16, 16),
        ),
        3.5,
        f"{_MAMBA_PAPER}, section 4.4.1 and appendix E.4.1",
        "The state is complex, as section 4.4.1 says; its size is not given. 8 complex numbers, the default of 16 with "
        "their conjugates counted as for S4, are nearest to the paper's count; 16 complex ones would make 3.74M.",
    ),
}


def _block(name: str) -> StageConfig:
    return StageConfig(SASHIMI_LAYERS, name) if name in LATER_BLOCKS else BLOCKS[name]()


def architecture(name: str, outer: str | None = None, centre: str | None = None) -> WaveformModelConfig:
    """Return the configuration of a published model.

    Args:
        name: one of `ARCHITECTURES`, or `sc09`, the family of the ablation (Gu & Dao, arXiv 2312.00752, table 5).
        outer, centre: for `sc09`: blocks of the outer two depths and of the centre, by default Mamba's. Those in
            LATER_BLOCKS are not in the paper.

    Raises:
        InputError: if the name is unknown, or the architecture has no such choice of blocks.
    """
    if name == ABLATION:
        for key, value, known in (("outer", outer, OUTER_BLOCKS), ("centre", centre, CENTRE_BLOCKS)):
            if value is not None and value not in (*known, *LATER_BLOCKS):
                raise InputError(f"model.{key} is {value!r}; choose {', '.join((*known, *LATER_BLOCKS))}")
        if outer in LATER_BLOCKS or centre in LATER_BLOCKS:
            return _stages(_block(outer or "mamba"), _block(centre or "mamba"))
        return ARCHITECTURES[f"{ABLATION}-{outer or 'mamba'}-{centre or 'mamba'}"].config
    if outer is not None or centre is not None:
        raise InputError(
            f"model.outer and model.centre apply to the architecture {ABLATION}, not to {name}; remove them"
        )
    if name not in ARCHITECTURES:
        raise InputError(f"there is no model {name!r}; choose {ABLATION} or {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name].config
