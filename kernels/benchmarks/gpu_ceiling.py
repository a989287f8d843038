"""A kernel that does nothing but exponentials: the ceiling of the special-function units."""

import triton
import triton.language as tl

LANES, EXPONENTIALS = 512, 4096


@triton.jit
def exponentials(values):
    """Each lane a chain of 4,096 exponentials in base 2, four at a time in different lanes of a thread."""
    places = tl.program_id(0) * 512 + tl.arange(0, 512)
    value = tl.load(values + places)
    for _ in range(4096):
        value = tl.exp2(-value)
    tl.store(values + places, value)
