"""S4D, the time-invariant diagonal state space model, as a mixer (Gu, Gupta, Goel & Ré, arXiv 2206.11893)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.backends import compute_dtype, native_library_for, state_dtype
from mambacore.devices import widened
from mambacore.layers.mixer import Mixer, register_mixer
from mambacore.layers.selective import as_complex, initial_step_bias
from mambacore.layers.state_matrices import initial_state_matrix
from mambacore.non_finite import cleaned, spoiled_since, taint_of
from mambacore.parallel import recurrence_over_ranks
from mambacore.scan import selective_scan

# From this length on a convolution is faster than a recurrence in Python.
CONVOLUTION_FROM = 32
# Longer sequences are convolved in pieces of this many positions, so that transforms and kernels stay small.
CONVOLUTION_PIECE = 8192
# Powers of the decay are products of a power below this and a power of this power.
POWER_BLOCK = 64


class S4DState(NamedTuple):
    """The state of an S4D mixer."""

    scan: Tensor  # (batch, model_width, state_size), complex or real


@register_mixer
class S4DMixer(Mixer):
    """A diagonal state space model per channel, GELU, and a gated linear layer across channels.

    The continuous system h' = A h + B x, y = C h + D x, with B = 1 (only its product with C matters), is discretised by
    the zero-order hold for A and B (equation 3 of the paper):

        h_t = exp(Delta A) h_{t-1} + (exp(Delta A) - 1) / A * x_t        y_t = C h_t + D x_t

    where a complex state stands for itself and its conjugate and the output is twice the real part. The system is
    time-invariant, so a whole sequence is a convolution, computed by FFT; short pieces and packed records use the
    recurrence (`selective_scan`). Both are equivalent.

    Args:
        model_width: channels of the sequence.
        state_size: states per channel; complex ones count once (the paper counts their conjugates too: its N = 64 is 32
            here).
        complex_state: states are complex numbers.
        state_matrix: initialisation of A (`mambacore.layers.state_matrices`); by default S4D-Lin for a complex state,
            else S4D-Real.
        sampling_rate_factor: factor by which the step size is longer than in training. A model for signals at 16 kHz
            can process them at 8 kHz with 2. The attribute of that name may be set at any time.
        convolution: compute whole sequences by FFT, or always by the recurrence. By default the faster of both: the
            recurrence in the native library, which takes about half the time, otherwise the FFT. The FFT rounds
            relative to the largest value of a sequence, so later inputs can affect earlier outputs by rounding errors.

    Raises:
        ValueError: if state_matrix is unknown or not for this kind of state, or the factor is not positive.
    """

    name = "s4d"
    supports_context_parallel = True

    def __init__(
        self,
        model_width: int,
        state_size: int = 64,
        complex_state: bool = True,
        state_matrix: str | None = None,
        sampling_rate_factor: float = 1.0,
        convolution: bool | None = None,
    ) -> None:
        super().__init__()
        if not sampling_rate_factor > 0:
            raise ValueError(f"sampling_rate_factor must be positive but is {sampling_rate_factor}")
        self.model_width, self.state_size = model_width, state_size
        self.complex_state = complex_state
        self.state_matrix_start = state_matrix or ("s4d-lin" if complex_state else "s4d-real")
        self.sampling_rate_factor = sampling_rate_factor
        self.convolution = convolution
        self.step_bias = nn.Parameter(torch.empty(model_width))
        self.log_decay_rate = nn.Parameter(torch.empty(model_width, state_size))
        self.frequency = nn.Parameter(torch.empty(model_width, state_size)) if complex_state else None
        # Real and imaginary parts are adjacent.
        self.output_matrix = nn.Parameter(torch.empty(model_width, (2 if complex_state else 1) * state_size))
        self.skip_weight = nn.Parameter(torch.empty(model_width))
        self.output_projection = nn.Linear(model_width, 2 * model_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published; the linear layer keeps PyTorch's default."""
        channels = self.step_bias.shape[0]
        self.step_bias.copy_(initial_step_bias(channels))
        start = initial_state_matrix(self.state_matrix_start, channels, self.state_size, self.complex_state)
        self.log_decay_rate.copy_((-start.real).log())
        if self.frequency is not None:
            self.frequency.copy_(start.imag)
        # C is a (complex) standard normal number, D a real one.
        self.output_matrix.normal_(std=0.5**0.5 if self.complex_state else 1.0)
        self.skip_weight.normal_()

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics, which weight decay must not pull towards zero."""
        dynamics = [self.log_decay_rate, self.frequency, self.skip_weight, self.step_bias]
        return [parameter for parameter in dynamics if parameter is not None]

    def step_size(self) -> Tensor:
        """Delta (channels,), float64: the step size at the current sampling rate."""
        return F.softplus(widened(self.step_bias)) * self.sampling_rate_factor

    @property
    def state_matrix(self) -> Tensor:
        """A (channels, state_size), float64 or complex128, with a negative real part."""
        decay_rate = -torch.exp(widened(self.log_decay_rate))
        return decay_rate if self.frequency is None else torch.complex(decay_rate, widened(self.frequency))

    def forward(
        self, sequence: Tensor, state: S4DState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, S4DState]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state."""

        def run(initial: Tensor | None) -> tuple[Tensor, Tensor]:
            outputs, outgoing = [], initial
            for mixed, after in self._pieces(sequence, initial, sequence_starts):
                outputs.append(F.glu(self.output_projection(F.gelu(mixed.to(sequence.dtype))), dim=-1))
                outgoing = after
            assert outgoing is not None  # there is at least one piece
            return torch.cat(outputs, dim=1), outgoing

        def final_state(initial: Tensor | None) -> Tensor:
            *_, (_, outgoing) = self._pieces(sequence, initial, sequence_starts)
            return outgoing

        def total_decay() -> Tensor:
            exponent = sequence.shape[1] * self.step_size().unsqueeze(-1) * self.state_matrix
            return (
                torch.exp(exponent)
                .to(state_dtype(sequence.dtype, self.complex_state))
                .expand(sequence.shape[0], -1, -1)
            )

        scan = None if state is None else state.scan
        outputs, outgoing = recurrence_over_ranks(run, final_state, total_decay, scan, sequence_starts)
        return outputs, S4DState(outgoing)

    def _pieces(
        self, sequence: Tensor, state: Tensor | None, sequence_starts: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the system's outputs piece by piece, at least one, each with the state after it."""
        # The step size is folded into A and B in float64: rounded to bfloat16 with such a sequence, it would change
        # every decay by 0.4 %. The scan then has a step size of one.
        exponent = self.step_size().unsqueeze(-1) * self.state_matrix
        driven = self.step_size().unsqueeze(-1) * torch.expm1(exponent) / exponent  # the zero-order hold of B = 1
        output_matrix = as_complex(self.output_matrix) if self.complex_state else self.output_matrix
        in_pieces = sequence_starts is None and not torch.compiler.is_compiling()
        for piece in sequence.split(CONVOLUTION_PIECE, dim=1) if in_pieces else (sequence,):
            if sequence_starts is None and self._convolves(piece):
                with torch.autocast(piece.device.type, enabled=False):  # whose products have too few bits for an FFT
                    mixed, state = diagonal_convolution(piece, exponent, driven, output_matrix, state)
                    mixed = mixed + (self.skip_weight * piece).to(mixed.dtype)
            else:
                mixed, state = selective_scan(
                    piece,
                    piece.new_ones(piece.shape[-1]).expand(piece.shape),
                    exponent,
                    driven,
                    output_matrix,
                    self.skip_weight,
                    initial_state=state,
                    return_final_state=True,
                    sequence_starts=sequence_starts,
                )
            yield mixed, state

    def _convolves(self, piece: Tensor) -> bool:
        """Whether a piece of one record is computed by FFT."""
        wanted = self.convolution
        if wanted is None:  # what the operator would compute with cannot be asked while a graph is compiled
            wanted = not torch.compiler.is_compiling() and native_library_for(piece) is None
        return wanted and piece.shape[1] >= CONVOLUTION_FROM


def diagonal_convolution(
    inputs: Tensor,
    exponent: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute h_t = exp(exponent) h_{t-1} + input_matrix x_t, y_t = <output_matrix, h_t> as a convolution by FFT.

    Its kernel is K_l = <output_matrix * input_matrix, exp(l exponent)> (equation 5 of the paper). Powers are taken
    in float64, which keeps angles accurate over thousands of turns.

    Args:
        inputs: (batch, length, channels), of at least one position.
        exponent: (channels, state_size), float64 or complex128; a complex state is read as twice the real part.
        input_matrix: (channels, state_size), likewise.
        output_matrix: (channels, state_size), likewise.
        initial_state: (batch, channels, state_size); zero by default.

    Returns:
        Outputs (batch, length, channels), float32 or float64, and the state after the last position.
    """
    batch, length, channels = inputs.shape
    dtype, of_state = compute_dtype(inputs.dtype), state_dtype(inputs.dtype, exponent.is_complex())
    inputs = inputs.to(dtype).permute(2, 0, 1)  # (channels, batch, length)
    spoiled = spoiled_since(taint_of(inputs.unsqueeze(-1)).squeeze(-1))  # a Fourier transform spreads NaN everywhere
    inputs = cleaned(inputs)
    blocks = -(-length // POWER_BLOCK)
    within = _powers(exponent, POWER_BLOCK).to(of_state)
    across = _powers(POWER_BLOCK * exponent, blocks).to(of_state)
    input_matrix, output_matrix = input_matrix.to(of_state), output_matrix.to(of_state)

    # One kernel, and for each batch item what its initial state adds, are sums of powers with different coefficients.
    coefficients = (output_matrix * input_matrix).unsqueeze(1)
    if initial_state is not None:
        decayed = torch.exp(exponent).to(of_state).unsqueeze(1) * initial_state.to(of_state).transpose(0, 1)
        coefficients = torch.cat([coefficients, output_matrix.unsqueeze(1) * decayed], dim=1)
    # (channels, 1 + batch, blocks, state_size) times (channels, POWER_BLOCK, state_size).
    left = (coefficients.unsqueeze(2) * across.unsqueeze(1)).flatten(1, 2)
    responses = _read(left, within).unflatten(1, (-1, blocks)).flatten(2)[..., :length]
    size = _transform_size(2 * length - 1)
    spectrum = torch.fft.rfft(inputs, size) * torch.fft.rfft(responses[:, :1], size)
    outputs = torch.fft.irfft(spectrum, size)[..., :length]
    if initial_state is not None:
        outputs = outputs + responses[:, 1:]

    # The state at the end: block by block, and then over the blocks, the latest input having the lowest power.
    padded = F.pad(inputs, (blocks * POWER_BLOCK - length, 0)).reshape(channels, -1, POWER_BLOCK)
    block_states = _times_powers(padded, within.flip(1)).unflatten(1, (batch, blocks))
    final_state = (block_states * across.flip(1).unsqueeze(1)).sum(2) * input_matrix.unsqueeze(1)
    if initial_state is not None:
        final_state = final_state + torch.exp((length - 1) * exponent).to(of_state).unsqueeze(1) * decayed
    final_state = final_state + spoiled[..., -1:]
    return (outputs + spoiled).permute(1, 2, 0), final_state.transpose(0, 1)


def _powers(exponent: Tensor, count: int) -> Tensor:
    """Return exp(k * exponent) for k = 0, ..., count - 1, as (channels, count, state_size).

    Each exponential doubles the number of powers by products, which are far cheaper.
    """
    powers = torch.ones_like(exponent).unsqueeze(1)
    while powers.shape[1] < count:
        further = torch.exp(powers.shape[1] * exponent).unsqueeze(1) * powers
        powers = torch.cat([powers, further[:, : count - powers.shape[1]]], dim=1)
    return powers


def _read(left: Tensor, within: Tensor) -> Tensor:
    """(channels, rows, state_size) times (channels, powers, state_size), summed over the states: real, as read_out."""
    if not left.is_complex():
        return left @ within.transpose(1, 2)
    # Twice the real part of a product, without computing its imaginary part.
    left, within = (torch.view_as_real(tensor).flatten(2) for tensor in (left, within.conj().resolve_conj()))
    return 2 * left @ within.transpose(1, 2)


def _times_powers(inputs: Tensor, within: Tensor) -> Tensor:
    """(channels, rows, powers) real inputs times (channels, powers, state_size)."""
    if not within.is_complex():
        return inputs @ within
    return torch.view_as_complex((inputs @ torch.view_as_real(within).flatten(2)).unflatten(-1, (-1, 2)))


def _transform_size(length: int) -> int:
    """Return a size of at least `length` that is a power of two, or 3 or 5 times one, for a fast FFT."""
    power = 1 << (length - 1).bit_length()
    return min(size for size in (power * 5 // 8, power * 3 // 4, power) if size >= length)
