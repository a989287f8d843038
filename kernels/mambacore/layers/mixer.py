"""The base class of mixers, and their choice by instance, class, name or mapping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from mambacore.contracts import Expected, check_shapes
from mambacore.errors import InputError
from mambacore.parallel.context import active_ranks

if TYPE_CHECKING:
    from mambacore.layers.norm import RootMeanSquareNorm


class Mixer(nn.Module):
    """Base class of sequence mixers in residual blocks: a causal `(sequence, state) -> (sequence, state)`.

    A subclass has a constructor whose first argument is `model_width` and whose others have defaults, and an
    `output_projection`, the linear layer that the residual stack scales by its depth. With a class attribute `name` and
    the decorator `register_mixer` it can be chosen by that name; otherwise it is given as a class or an instance.
    """

    name: ClassVar[str]
    # Whether `forward` exchanges states inside `mambacore.parallel.context_parallel`; a mixer that does not would start
    # over at each rank, so it is rejected there.
    supports_context_parallel: ClassVar[bool] = False
    # Whether `forward` reads the sequence through its input projection alone; not inherited, as a subclass may differ.
    begins_with_linear: ClassVar[bool] = False
    # Whether `step` may be given several positions; not inherited either.
    steps_many: ClassVar[bool] = False
    output_projection: nn.Linear
    # Channels of the sequence; None if not specified by the mixer.
    model_width: int | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call `forward`, unless the sequence is split over ranks and this mixer cannot exchange states.

        Raises:
            InputError: if so, inside `mambacore.parallel.context_parallel` over several ranks.
        """
        if not self.supports_context_parallel and active_ranks() is not None:
            able = ", ".join(name for name, mixer in sorted(MIXERS.items()) if mixer.supports_context_parallel)
            raise InputError(
                f"the mixer {name_of(self)!r} cannot process a sequence that is split over ranks; "
                f"build the model of {able}, or give it whole sequences outside of context_parallel"
            )
        return super().__call__(*arguments, **options)

    def forward(self, sequence: Tensor, state: Any = None, sequence_starts: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix a piece of a sequence.

        Args:
            sequence: (batch, length, model_width).
            state: the outgoing state of the previous piece; None at the start.
            sequence_starts: (batch, length), boolean, True where a new record begins (`mambacore.packing`).

        Returns:
            The mixed sequence, of the same shape, and the state for the next piece.
        """
        raise TypeError(f"{type(self).__name__} has no forward")

    def step(self, norm: RootMeanSquareNorm, sequence: Tensor, state: Any) -> tuple[Tensor, Any] | None:
        """Compute the whole residual branch in one call, if this mixer has a fast path.

        A hook for generation and inference. `ResidualBlock` calls it without gradients, records or ranks, for sequences
        (batch, 1, model_width) and, if the mixer `steps_many`, of any length, if `norm` and this mixer are plain
        (`mambacore.layers.plain_modules`) and operators are not traced. The mixer itself checks its submodules and the
        shapes, dtypes and devices that its fast path supports. Only the `step` of a module's own class is called, as a
        subclass may compute something else.

        Args:
            norm: the norm before the mixer.
            sequence: (batch, length, model_width), before the norm.
            state: as in `forward`.

        Returns:
            `sequence + mixer(norm(sequence))` and the outgoing state, equal to those of the operators; or None to use
            the operators.
        """
        return None

    @property
    def state_matrix(self) -> Tensor | None:
        """A (channels, state_size), real or complex; None for a mixer that is not a diagonal state space model."""
        return None

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics, which weight decay must not pull towards zero."""
        return []


MIXERS: dict[str, type[Mixer]] = {}

# How a mixer is chosen: an instance, a class, a name, or a mapping of a name and options.
MixerDescription = Mixer | type[Mixer] | str | Mapping[str, Any]


def register_mixer(mixer: type[Mixer]) -> type[Mixer]:
    """Class decorator that registers a mixer under its name."""
    MIXERS[mixer.name] = mixer
    return mixer


def name_of(mixer: Mixer) -> str:
    """Return the name of a mixer in messages: its registered name, or that of its class."""
    return getattr(mixer, "name", type(mixer).__name__)


def check_state(name: str, state: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check the shape of a state: one of another batch or model could broadcast to wrong results.

    Raises:
        ValueError: if the shape differs.
    """
    remedy = "pass the final state of the same batch and model"
    check_shapes({name: Expected(state, shape, remedy)}, of="sequence and the mixer")


def parameters_without_decay(module: nn.Module) -> list[nn.Parameter]:
    """Return the distinct parameters of the dynamics of all mixers in a module, to be excluded from weight decay."""
    found = {
        id(parameter): parameter
        for part in module.modules()
        if isinstance(part, Mixer)
        for parameter in part.parameters_without_decay
    }
    return list(found.values())


def mixer_options(name: str) -> dict[str, Any]:
    """Return the options of a mixer with their defaults.

    Raises:
        InputError: if no mixer has that name.
    """
    if name not in MIXERS:
        raise InputError(f"there is no mixer {name!r}; choose {', '.join(sorted(MIXERS))}")
    parameters = list(inspect.signature(MIXERS[name].__init__).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in parameters}


def build_mixer(model_width: int, description: MixerDescription) -> Mixer:
    """Build a mixer from an instance (used as is), a class, a name, or a mapping of `name` and options.

    `{"name": "s4d", "state_size": 64}` is such a mapping.

    Raises:
        InputError: if a name or option is unknown, an option's value is invalid, an instance has another width, or the
            description is not a mixer.
    """
    if isinstance(description, Mixer):
        if description.model_width not in (None, model_width):
            raise InputError(
                f"the mixer {name_of(description)!r} has a model_width of {description.model_width} but the stack has "
                f"{model_width}; build both with the same width"
            )
        return description
    if isinstance(description, type) and issubclass(description, Mixer):
        return _built(description, description.__name__, model_width, {})
    if not isinstance(description, str | Mapping):
        raise InputError(
            f"{_described(description)} is not a mixer; give a name, a mapping of a name and options, or a class or an "
            "instance of mambacore.layers.Mixer"
        )
    options = {"name": description} if isinstance(description, str) else dict(description)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"the mixer {description!r} lacks a name; choose {', '.join(sorted(MIXERS))}")
    known = mixer_options(name)
    for option in options:
        if option not in known:
            raise InputError(f"the mixer {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return _built(MIXERS[name], name, model_width, options)


def _built(mixer: type[Mixer], name: str, model_width: int, options: Mapping[str, Any]) -> Mixer:
    try:
        return mixer(model_width, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"the mixer {name!r} cannot be built: {error}") from error


def _described(thing: object) -> str:
    """Describe an object that is not a mixer, briefly."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return f"an instance of {type(thing).__name__}" if isinstance(thing, nn.Module) else repr(thing)
