"""What every mixer is, and the choice of one by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mambacore.errors import InputError
from mambacore.parallel.context import active_ranks


class Mixer(nn.Module):
    """What a residual block mixes along the sequence with: a causal ``(sequence, state) -> (sequence, state)``.

    A subclass has the class attribute ``name``, a constructor whose first argument is ``model_width`` and whose others
    have defaults, and an ``output_projection``, the linear layer that the residual stack scales by its depth.
    """

    name: ClassVar[str]
    # Whether ``forward`` exchanges states inside ``mambacore.parallel.context_parallel``; a mixer that does not would
    # begin anew at each rank, so it is refused there.
    supports_context_parallel: ClassVar[bool] = False
    output_projection: nn.Linear

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """``forward``, unless the sequence lies on several ranks and this mixer knows of its own stretch only.

        Raises:
            InputError: this mixer inside ``mambacore.parallel.context_parallel`` over several ranks.
        """
        if not self.supports_context_parallel and active_ranks() is not None:
            able = ", ".join(name for name, mixer in sorted(MIXERS.items()) if mixer.supports_context_parallel)
            raise InputError(
                f"the mixer {self.name!r} cannot mix a sequence that lies on several ranks; "
                f"build the model of {able}, or give it whole sequences outside of context_parallel"
            )
        return super().__call__(*arguments, **options)

    def forward(self, sequence: Tensor, state: Any = None, sequence_starts: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix a piece of a sequence.

        Args:
            sequence: (batch, length, model_width).
            state: what the piece before this one left; None at the start.
            sequence_starts: (batch, length), boolean, True where a new record begins (``mambacore.packing``).

        Returns:
            The mixed sequence, of the same shape, and the state for what follows.
        """
        raise TypeError(f"{type(self).__name__} has no forward")

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics, which weight decay would pull to a meaningless place."""
        return []


MIXERS: dict[str, type[Mixer]] = {}


def register_mixer(mixer: type[Mixer]) -> type[Mixer]:
    """Class decorator: makes a mixer known by its name."""
    MIXERS[mixer.name] = mixer
    return mixer


def mixer_options(name: str) -> dict[str, Any]:
    """The options of a mixer with their defaults.

    Raises:
        InputError: there is no mixer of that name.
    """
    if name not in MIXERS:
        raise InputError(f"there is no mixer {name!r}; choose {', '.join(sorted(MIXERS))}")
    parameters = list(inspect.signature(MIXERS[name].__init__).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in parameters}


def build_mixer(model_width: int, description: str | Mapping[str, Any]) -> Mixer:
    """A mixer from its name, or from a mapping of ``name`` and options: ``{"name": "s4d", "state_size": 64}``.

    Raises:
        InputError: an unknown name or option, or an option's value that the mixer refuses.
    """
    options = {"name": description} if isinstance(description, str) else dict(description)
    name = options.pop("name", None)
    known = mixer_options(str(name))
    for option in options:
        if option not in known:
            raise InputError(f"the mixer {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    try:
        return MIXERS[str(name)](model_width, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"the mixer {name!r} cannot be built: {error}") from error
