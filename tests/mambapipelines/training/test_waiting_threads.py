"""Commands' threads do not burn the cores that others use while they wait."""

import os
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
