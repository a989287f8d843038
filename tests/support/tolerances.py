"""Every tolerance of the tests, with its reason. Errors are relative to the largest value of the expected tensor."""

import torch
from torch import Tensor

# float64 differs from the reference by the order of summation alone.
FLOAT64 = 1e-12
# float32: a few hundred roundings of 6e-8 along the sequence, and 9e-8 from the polynomial for exp2.
FLOAT32 = 2e-5
# A complex state turns as well: rounded phases weigh in the gradients of the step, which sum over the sequence.
COMPLEX_FLOAT32 = 5e-5
# A state that turns 160,000 times in 2^18 positions: roundings of each phase by 6e-8 turns add up along the sequence.
LONG_PHASE_FLOAT32 = 1e-2
# bfloat16 keeps 8 bits: outputs and their gradients are rounded by up to 2^-8; sums over the sequence average that out.
BFLOAT16 = 2e-2
# A few layers in float32 on another device: other kernels, which sum in another order, and their gradients.
DEVICE_FLOAT32 = 2e-4
# A sequence in pieces repeats the arithmetic of the whole, but products are cut into pieces of other shapes.
PIECES_FLOAT32 = 1e-5
PIECES_FLOAT64 = 1e-9
# Inputs of linear layers in bfloat16 or 8 bits, beside inputs as they are with the same rounded weights.
ROUNDED_INPUTS = 5e-2
# Runs of several processes in float64: sums over rows and stretches in another order, which AdamW, dividing by the size
# of the gradient, makes as much of where gradients are small. Six steps were within 2e-14.
TRAINING_FLOAT64 = 1e-11
# The same in float32, where roundings of small gradients are steps of their own: losses, and weights after six steps.
TRAINING_FLOAT32_LOSS = 1e-4
TRAINING_FLOAT32 = 2e-3
# A Fourier transform in float64 rounds every value relative to the largest, so the future leaks this much.
FOURIER_CAUSALITY = 1e-12
# Layers in bfloat16 round after every operator, by up to 2^-8 each time.
BFLOAT16_LAYERS = 5e-2
# Root mean square of the roundings of a few layers in bfloat16, 2^-9 each on average, relative to that of the outputs.
ONE_BFLOAT16_LAYER = 1e-2
# float16 keeps 11 bits, and layers in it round after every operator, too.
FLOAT16 = 2e-3
FLOAT16_LAYERS = 2e-2
# A signal at half the sampling rate: the zero-order hold moves it by half a sample.
RESAMPLED = 1e-2

# Figures in the cards of shipped models, which another processor may have computed. A window whose classes are nearly
# equally likely may get another call; perplexities and bits are written with four and three decimals.
SHIPPED_WINDOWS = 1
SHIPPED_PERPLEXITY = 5e-4
SHIPPED_BITS = 2e-3

OF_DTYPE = {torch.float64: FLOAT64, torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite for other shapes or non-finite values."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.detach().to(wide), expected.detach().to(wide)
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found - expected).abs().max() / scale)
