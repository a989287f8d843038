"""Commands that train nothing on a device that mixes nothing with the CPU: the CPU's figures, in both precisions."""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mambapipelines.cli.audiomamba import main as audiomamba_main
from mambapipelines.cli.genomamba import main as genomamba_main
from tolerances import BFLOAT16, BFLOAT16_LAYERS, FLOAT32, TRAINING_FLOAT32

SUPPORT = Path(__file__).parents[1] / "support"


def figures(group: str, folder: Path, **environment: str) -> tuple[dict[str, list[float]], str]:
    """How far every command of a group is from the CPU, and what was said."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "device_commands.py"), group, str(folder)],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("group", ["classifier_commands", "language_commands", "waveform_commands"])
def test_commands_compute_on_the_device_what_they_compute_on_the_cpu(group: str, tmp_path: Path) -> None:
    found, said = figures(group, tmp_path)
    assert said.count("computing on pretend:0, float32") == len(found)
    low = {name: both[1] for name, both in found.items() if len(both) > 1}
    assert said.count("computing on pretend:0, bfloat16") >= len(low) > 0
    assert {name: both[0] for name, both in found.items() if both[0] > FLOAT32} == {}
    # What is generated went through the layers step after step.
    tolerances = {name: BFLOAT16_LAYERS if name == "generate" else BFLOAT16 for name in low}
    assert {name: error for name, error in low.items() if error > tolerances[name]} == {}
    assert max(low.values()) > 0


# Its parts are in `test_devices.py` (train) and above (classify and evaluate).
@pytest.mark.slow
def test_the_demo_computes_on_the_device_from_training_to_the_report(tmp_path: Path) -> None:
    found, said = figures("demo_commands", tmp_path)
    assert said.count("computing on pretend:0, float32") == said.count("computing on pretend:0, bfloat16") == 2
    [(exact, *low)] = found.values()
    assert exact < TRAINING_FLOAT32
    assert all(error < BFLOAT16 for error in low)


def test_models_loaded_from_python_and_pages_compute_on_the_device(tmp_path: Path) -> None:
    found, _ = figures("python_and_pages", tmp_path)
    assert len(found) == 4
    assert max(error for errors in found.values() for error in errors) < FLOAT32


def test_every_command_that_takes_a_device_is_run_on_it() -> None:
    taking = {
        (program, command.__name__.rpartition(".")[2].replace("_", "-"))
        for program, table in (("genomamba", genomamba_main.COMMANDS), ("audiomamba", audiomamba_main.COMMANDS))
        for command in itertools.chain.from_iterable(table.values())
        if "DeviceOption" in inspect.getsource(command)
    }
    text = "".join((SUPPORT / name).read_text() for name in ("device_commands.py", "device_runs.py"))
    run = set(re.findall(r'"(genomamba|audiomamba)",\s*"([a-z-]+)"', text))
    # Of the two pages their logic is run, in `python_and_pages`.
    assert {(program, "app") for program in ("genomamba", "audiomamba")} == taking - run
    assert len(taking) > 15


@pytest.mark.slow
@pytest.mark.parametrize("group", ["classifier_commands", "language_commands", "waveform_commands", "python_and_pages"])
def test_commands_need_no_float64_of_a_device(group: str, tmp_path: Path) -> None:
    found, _ = figures(group, tmp_path, PRETEND_WITHOUT_FLOAT64="1")
    assert {name: both[0] for name, both in found.items() if both[0] > FLOAT32} == {}
