"""Training commands on a device that mixes nothing with the CPU: the CPU's numbers, in parts as in one go."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tolerances import TRAINING_FLOAT32_LOSS

SUPPORT = Path(__file__).parents[2] / "support"
# Each takes a quarter of a minute or more.
COMMANDS = ("train",)
AUDIO_COMMANDS = ("train_waveforms", "train_classifier")
MORE_COMMANDS = ("pretrain", "train_waveforms", "pretrain_masked", "finetune", "species_task", "train_classifier")


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(pytest.param(command, marks=pytest.mark.slow) for command in MORE_COMMANDS)]
)
def test_a_command_computes_on_the_device_what_it_computes_on_the_cpu(command: str, tmp_path: Path) -> None:
    if command in AUDIO_COMMANDS and "TESTS_WITHOUT_AUDIO" in os.environ:
        pytest.skip("tests of audio are left out")
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "device_runs.py"), command, str(tmp_path)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.stderr.count("computing on pretend:0, float32") == 3  # a whole run, and two parts
    assert done.stderr.count("computing on pretend:0, bfloat16") == 3
    assert len(found["cpu"]) == 5
    assert found["float32"] == pytest.approx(found["cpu"], rel=TRAINING_FLOAT32_LOSS)
    # Low precision is really used on the device, and is not far off.
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["cpu"], rel=0.02)
    for precision in ("float32", "bfloat16"):
        assert found[f"{precision} in parts"] == found[precision]
        assert found[f"{precision} same"]
