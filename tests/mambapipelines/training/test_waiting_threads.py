"""Commands do not burn the cores that others use: with waiting threads, or by asking for the same memory again."""

import os
import platform
import subprocess
import sys

import pytest

CASES = {
    "unasked": ({}, "passive"),
    "the user's policy": ({"OMP_WAIT_POLICY": "active"}, "active"),
    "the user's spin count": ({"GOMP_SPINCOUNT": "5"}, "None"),
}


@pytest.mark.parametrize(("asked", "expected"), CASES.values(), ids=CASES.keys())
def test_waiting_threads_sleep_unless_the_user_says_otherwise(asked, expected):
    variables = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in variables} | asked
    program = (
        "import sys, mambapipelines.cli.genomamba.main, os\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), list(sys.modules).index('mambapipelines') < "
        "(list(sys.modules).index('torch') if 'torch' in sys.modules else 10**9))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [expected, "True"]


FRESH_PAGES = """
import mambapipelines, resource
import numpy
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    numpy.empty(16 << 20, dtype=numpy.uint8)[::4096] = 1
touch()
before = faults()
for _ in range(20):
    touch()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the heap of glibc")
@pytest.mark.parametrize("own", [False, True], ids=["unasked", "the user's heap"])
def test_freed_memory_is_used_again_unless_the_user_says_otherwise(own):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # With a threshold of its own, a block is always mapped anew.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "131072"} if own else {}
    environment["NUMPY_MADVISE_HUGEPAGE"] = "0"
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PAGES], env=environment, capture_output=True, text=True, check=True
    )
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    assert int(run.stdout) > 20_000 if own else int(run.stdout) < 10_000
