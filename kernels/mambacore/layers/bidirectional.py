"""Bidirectional layers, which mix every position with those before and after it.

BiMamba of Schiff et al., "Caduceus" (arXiv 2403.03234, "BiMamba"), with R the reversal of a sequence:

    BiMamba(x) = forward(x) + R(reverse(R(x)))

The kernels can scan from the last position to the first, so nothing is ever reversed in memory. These layers are not
causal and so have no state: they map a whole sequence to a whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers.mamba2 import Mamba2Mixer
from mambacore.layers.mamba3 import Mamba3Mixer
from mambacore.layers.mixer import build_mixer, parameters_without_decay
from mambacore.layers.norm import RootMeanSquareNorm, root_mean_square_norm
from mambacore.layers.plain_modules import are_plain_linear, is_plain
from mambacore.layers.selective import SelectiveMixer

COMBINATIONS: Final = ("add", "multiply")

# The mixers that can scan in both directions.
ReversibleMixer = SelectiveMixer | Mamba2Mixer | Mamba3Mixer
REVERSIBLE: Final = {kind.name: kind for kind in (SelectiveMixer, Mamba2Mixer, Mamba3Mixer)}


class BidirectionalMixer(nn.Module):
    """Two mixers of the same kind, one per direction, whose outputs are added or multiplied elementwise.

    It has no state: position 0 depends on the last one, so a sequence cannot be processed in pieces.

    Args:
        model_width: channels of the sequence.
        mixer: a `name` of REVERSIBLE (by default `selective`) and options, the same for both directions.
        combination: `add` or `multiply` the outputs of both directions.
        tied_projections: both directions share their input and output projections, which have most parameters.

    Raises:
        InputError: if the mixer, an option or the combination is unknown.
    """

    def __init__(
        self,
        model_width: int,
        mixer: Mapping[str, Any] | None = None,
        combination: str = "add",
        tied_projections: bool = True,
    ) -> None:
        super().__init__()
        if combination not in COMBINATIONS:
            raise InputError(f"directions cannot be combined by {combination!r}; choose {' or '.join(COMBINATIONS)}")
        self.combination = combination
        self.tied_projections = tied_projections
        description = {"name": SelectiveMixer.name, **(mixer or {})}
        if description["name"] not in REVERSIBLE:
            raise InputError(
                f"the mixer {description['name']!r} cannot scan a sequence backwards; choose {', '.join(REVERSIBLE)}"
            )
        self.forward_mixer = cast(ReversibleMixer, build_mixer(model_width, description))
        self.reverse_mixer = cast(ReversibleMixer, build_mixer(model_width, description))
        if tied_projections:
            self.reverse_mixer.input_projection = self.forward_mixer.input_projection
            self.reverse_mixer.output_projection = self.forward_mixer.output_projection

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics of both directions."""
        return parameters_without_decay(self)

    def forward(
        self, sequence: Tensor, sequence_starts: Tensor | None = None, reverse_complement: bool = False
    ) -> Tensor:
        """Mix a whole sequence.

        Args:
            sequence: (batch, length, model_width).
            sequence_starts: (batch, length), boolean, True where a new record begins (`mambacore.packing`): no record
                affects another, in either direction.
            reverse_complement: compute `flip(mixer(flip(sequence)))`, with positions and channels flipped: positions
                by exchanging the directions, channels by flipping the weights.

        Returns:
            (batch, length, model_width).
        """
        kind = REVERSIBLE[self.forward_mixer.name]
        if not (is_plain(self.forward_mixer, kind) and is_plain(self.reverse_mixer, kind)):
            return self._combined(
                *(
                    _whole(mixer, sequence, sequence_starts, reverse, reverse_complement)
                    for mixer, reverse in ((self.forward_mixer, False), (self.reverse_mixer, True))
                )
            )
        projected = _project_in(self.forward_mixer, sequence, reverse_complement)
        ahead = _mix(self.forward_mixer, projected, sequence_starts, reverse_complement)
        if self.reverse_mixer.input_projection is not self.forward_mixer.input_projection:
            projected = _project_in(self.reverse_mixer, sequence, reverse_complement)
        behind = _mix(self.reverse_mixer, projected, sequence_starts, not reverse_complement)
        projection = self.forward_mixer.output_projection
        shared = self.reverse_mixer.output_projection is projection and are_plain_linear(projection)
        if shared and self.combination == "add":
            # The projection of the sum is the sum of the projections, except for the bias, which counts twice.
            return _project_out(self.forward_mixer, ahead + behind, reverse_complement, biases=2)
        return self._combined(
            _project_out(self.forward_mixer, ahead, reverse_complement),
            _project_out(self.reverse_mixer, behind, reverse_complement),
        )

    def _combined(self, ahead: Tensor, behind: Tensor) -> Tensor:
        return ahead + behind if self.combination == "add" else ahead * behind


class BidirectionalBlock(nn.Module):
    """Residual block sequence + mixer(norm(sequence)) with a bidirectional mixer. It has no state."""

    def __init__(self, model_width: int, mixer: BidirectionalMixer, norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        self.norm = RootMeanSquareNorm(model_width, norm_epsilon)
        self.mixer = mixer

    def forward(
        self, sequence: Tensor, sequence_starts: Tensor | None = None, reverse_complement: bool = False
    ) -> Tensor:
        """Map (batch, length, model_width) to the same shape; see `BidirectionalMixer` for `reverse_complement`."""
        normalised = normalise(self.norm, sequence, reverse_complement)
        return sequence + self.mixer(normalised, sequence_starts, reverse_complement)


class BidirectionalStack(nn.Module):
    """A sequence of bidirectional residual blocks and a final norm. It has no state.

    Args:
        model_width: channels of the sequence.
        layers: number of blocks.
        mixer: see `BidirectionalMixer`.
        combination, tied_projections: see `BidirectionalMixer`.
        norm_epsilon: keeps positions of zeros finite.
        residual_in_float32: keep the residual sum in float32 if the parameters have fewer bits.

    Raises:
        InputError: if the mixer, an option or the combination is unknown, or there are no layers.
    """

    def __init__(
        self,
        model_width: int,
        layers: int,
        mixer: Mapping[str, Any] | None = None,
        combination: str = "add",
        tied_projections: bool = True,
        norm_epsilon: float = 1e-5,
        residual_in_float32: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise InputError(f"a stack of {layers} layers cannot be built; use at least 1")
        self.model_width = model_width
        self.residual_in_float32 = residual_in_float32
        mixers = [BidirectionalMixer(model_width, mixer, combination, tied_projections) for _ in range(layers)]
        self.blocks = nn.ModuleList(BidirectionalBlock(model_width, one, norm_epsilon) for one in mixers)
        self.final_norm = RootMeanSquareNorm(model_width, norm_epsilon)
        with torch.no_grad():
            for projection in {one.forward_mixer.output_projection for one in mixers} | {
                one.reverse_mixer.output_projection for one in mixers
            }:
                projection.weight /= layers**0.5

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics of all mixers."""
        return parameters_without_decay(self)

    def forward(self, sequence: Tensor, sequence_starts: Tensor | None = None) -> Tensor:
        """Map (batch, length, model_width) to the same shape; see `BidirectionalMixer` for `sequence_starts`."""
        if self.residual_in_float32:
            sequence = widened(sequence)
        for block in self.blocks:
            sequence = block(sequence, sequence_starts)
        return normalise(self.final_norm, sequence)


def widened(sequence: Tensor) -> Tensor:
    """Return the sequence in float32, or unchanged if its dtype is wider."""
    return sequence.to(torch.promote_types(sequence.dtype, torch.float32))


def normalise(norm: RootMeanSquareNorm, sequence: Tensor, flipped: bool = False) -> Tensor:
    """Apply the norm in the dtype of its weight, in which mixers compute; optionally to flipped channels."""
    if not is_plain(norm, RootMeanSquareNorm):
        return norm(sequence.flip(-1)).flip(-1) if flipped else norm(sequence)
    weight = norm.weight.flip(0) if flipped else norm.weight
    return root_mean_square_norm(sequence, weight, norm.epsilon).to(weight.dtype)


def _whole(
    mixer: ReversibleMixer, sequence: Tensor, sequence_starts: Tensor | None, reverse: bool, flipped: bool
) -> Tensor:
    """Compute one direction by calling the mixer, with any hooks or adapters."""
    mixed, _ = mixer(sequence.flip(-1) if flipped else sequence, None, sequence_starts, reverse=reverse != flipped)
    return mixed.flip(-1) if flipped else mixed


def _project_in(mixer: ReversibleMixer, sequence: Tensor, flipped: bool) -> Tensor:
    """Apply the input projection, optionally to flipped channels."""
    projection = mixer.input_projection
    if flipped and are_plain_linear(projection):  # flipping the weight moves less memory
        return F.linear(sequence, projection.weight.flip(1), projection.bias)
    return projection(sequence.flip(-1) if flipped else sequence)


def _mix(mixer: ReversibleMixer, projected: Tensor, sequence_starts: Tensor | None, reverse: bool) -> Tensor:
    """Compute everything between the two projections."""
    if isinstance(mixer, SelectiveMixer):
        inputs, gate = projected.chunk(2, dim=-1)
        return mixer.mix(inputs, gate, None, sequence_starts, reverse)[0]
    return mixer.mix(projected, None, sequence_starts, reverse)[0]


def _project_out(mixer: ReversibleMixer, inner: Tensor, flipped: bool, biases: int = 1) -> Tensor:
    """Project back to model channels, optionally flipped; the bias of a plain projection counts `biases` times."""
    projection = mixer.output_projection
    if not are_plain_linear(projection):
        return projection(inner).flip(-1) if flipped else projection(inner)
    weight: Tensor = projection.weight
    bias: Tensor | None = projection.bias
    if bias is not None and biases > 1:
        bias = biases * bias
    if flipped:
        weight, bias = weight.flip(0), None if bias is None else bias.flip(0)
    return F.linear(inner, weight, bias)
