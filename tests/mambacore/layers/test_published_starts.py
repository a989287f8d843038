"""State matrices and sizes of mixers start from the published values."""

import math

import pytest
import torch

from mambacore.layers import build_mixer
from mambacore.layers.state_matrices import initial_state_matrix
from tolerances import FLOAT32, relative_error

CHANNELS, STATES = 3, 5

# Section 4 of arXiv 2206.11893 by the number n of a state, of N states.
PUBLISHED = {
    "s4d-lin": lambda n: complex(-0.5, math.pi * n),
    "s4d-inv": lambda n: complex(-0.5, STATES / math.pi * (STATES / (2 * n + 1) - 1)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_complex_state_matrices_start_from_the_published_values(name):
    expected = torch.tensor([PUBLISHED[name](n) for n in range(STATES)], dtype=torch.complex128)
    found = initial_state_matrix(name, CHANNELS, STATES, True)
    assert relative_error(found, expected.expand(CHANNELS, -1)) < FLOAT32


def test_real_state_matrices_start_from_the_published_values():
    expected = -torch.arange(1.0, STATES + 1).expand(CHANNELS, -1)
    assert torch.equal(initial_state_matrix("s4d-real", CHANNELS, STATES, False), expected)


def test_retention_has_twice_the_channels_for_its_values():
    """Section 2.4 of arXiv 2307.08621."""
    assert build_mixer(16, "retention").output_projection.in_features == 32


def test_the_convolution_of_a_selective_mixer_has_a_bias():
    """As in the published implementation of arXiv 2312.00752."""
    assert build_mixer(16, "selective").convolution_bias is not None
