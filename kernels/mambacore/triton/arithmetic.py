"""Arithmetic of the kernels: float32 numbers, real or complex as pairs of tensors."""

# Compile-time switches and sizes are named like constants.
# ruff: noqa: N803

import triton.language as tl
from triton.language.standard import _sum_combine

from mambacore.triton.launch import kernel


@kernel
def total(values, axis: tl.constexpr):
    """The sum along an axis, in a fixed order. (`tl.sum` cannot be interpreted unless Triton was imported so.)"""
    return tl.reduce(values, axis, _sum_combine)


@kernel
def exponential_of_minus_absolute(values):
    """exp(-|x|), which never overflows."""
    return tl.exp2(-tl.abs(values) * 1.4426950408889634)


@kernel
def sigmoid(values):
    """1 / (1 + exp(-x)), where an exponential that overflows gives 0, as it should."""
    return 1.0 / (1.0 + tl.exp2(values * -1.4426950408889634))


@kernel
def softplus(values):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)). A step that is not a number stays so."""
    return softplus_of_exponential(values, exponential_of_minus_absolute(values))


@kernel
def softplus_and_slope(values):
    """softplus and its derivative, the sigmoid, by one exponential and one division."""
    small = exponential_of_minus_absolute(values)
    return softplus_of_exponential(values, small), tl.where(values >= 0, 1.0, small) / (1.0 + small)


@kernel
def softplus_of_exponential(values, small):
    """softplus of x from e = exp(-|x|).

    log1p(e) / e is a polynomial, the one of least relative error (3e-8) from 0 to 1: the relative precision of steps of
    1e-4 is kept, which the logarithm of a number near 1 would lose, and there is no division.
    """
    series = 0.0052326940931379795
    series = series * small - 0.029505237936973572
    series = series * small + 0.07822595536708832
    series = series * small - 0.13663245737552643
    series = series * small + 0.19106006622314453
    series = series * small - 0.2484298199415207
    series = series * small + 0.3331909775733948
    series = series * small - 0.4999949336051941
    series = series * small + 0.9999999403953552
    return tl.where(values > 0, values, 0.0) + small * series


@kernel
def cosine_and_sine(turns):
    """Of an angle given in turns, through the half angle: 1 - 2 sin^2 keeps the length of a short turn.

    The rest of the turns lies in [-1/2, 1/2], the half angle in [-pi/2, pi/2]; Taylor's series to the order where the
    next term is below float32's rounding.
    """
    rest = turns - tl.floor(turns + 0.5)
    half = rest * 3.141592653589793
    square = half * half
    sine = -1.0 / 39916800.0
    sine = sine * square + 1.0 / 362880.0
    sine = sine * square - 1.0 / 5040.0
    sine = sine * square + 1.0 / 120.0
    sine = sine * square - 1.0 / 6.0
    sine = half + half * (sine * square)
    cosine = 1.0 / 479001600.0
    cosine = cosine * square - 1.0 / 3628800.0
    cosine = cosine * square + 1.0 / 40320.0
    cosine = cosine * square - 1.0 / 720.0
    cosine = cosine * square + 1.0 / 24.0
    cosine = cosine * square - 0.5
    cosine = 1.0 + cosine * square
    return 1.0 - 2.0 * sine * sine, 2.0 * sine * cosine


@kernel
def decay(step, rate, frequency, IS_COMPLEX: tl.constexpr):
    """exp(Delta A) of steps (channels,) and a matrix (states, channels) in powers of two and turns."""
    size = tl.exp2(step[None, :] * rate)
    if not IS_COMPLEX:
        return size, size
    cosine, sine = cosine_and_sine(step[None, :] * frequency)
    return size * cosine, size * sine


@kernel
def load_numbers(pointer, offsets, mask, IS_COMPLEX: tl.constexpr):
    """Real numbers, or pairs of neighbours; the second of a real number is a copy that nobody reads."""
    first = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    if not IS_COMPLEX:
        return first, first
    return first, tl.load(pointer + offsets + 1, mask=mask, other=0.0).to(tl.float32)


@kernel
def load_states(pointer, states, channels, mask, channel_count, IS_COMPLEX: tl.constexpr):
    """A tile (states, channels) of a buffer (numbers, channels), real and imaginary parts in turn."""
    if not IS_COMPLEX:
        first = tl.load(pointer + states[:, None] * channel_count + channels[None, :], mask=mask, other=0.0)
        return first, first
    offsets = 2 * states[:, None] * channel_count + channels[None, :]
    first = tl.load(pointer + offsets, mask=mask, other=0.0)
    return first, tl.load(pointer + offsets + channel_count, mask=mask, other=0.0)


@kernel
def store_states(pointer, states, channels, mask, channel_count, real, imaginary, IS_COMPLEX: tl.constexpr):
    """Inverse of `load_states`."""
    if IS_COMPLEX:
        offsets = 2 * states[:, None] * channel_count + channels[None, :]
        tl.store(pointer + offsets, real, mask=mask)
        tl.store(pointer + offsets + channel_count, imaginary, mask=mask)
    else:
        tl.store(pointer + states[:, None] * channel_count + channels[None, :], real, mask=mask)


@kernel
def load_step(pointer, channels, mask, bias, SOFTPLUS: tl.constexpr):
    """The raw step and the positive one of a position."""
    raw = tl.load(pointer + channels, mask=mask, other=0.0).to(tl.float32) + bias
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    return raw, step
