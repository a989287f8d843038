"""Small C++ programs around parts of the native library that its Python interface cannot show."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NATIVE, PROGRAMS = REPOSITORY / "kernels" / "native", Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux" or shutil.which("g++") is None, reason="needs g++ on Linux"),
]


def output_of(tmp_path: Path, sources: list[Path], flags: list[str]) -> str:
    """Compile a program for the baseline instruction set, run it, and return what it prints."""
    program = tmp_path / "program"
    command = ["g++", "-std=c++17", "-pthread", "-Wno-psabi", "-DMAMBACORE_INSTRUCTION_SET=baseline", f"-I{NATIVE}"]
    subprocess.run([*command, *flags, *map(str, sources), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_two_threads_on_one_sequence_are_free_of_races_as_a_sanitizer_sees_them(tmp_path):
    probe = subprocess.run(
        ["g++", "-fsanitize=thread", "-x", "c++", "-", "-o", str(tmp_path / "probe")],
        input="int main() {}", text=True, check=False, capture_output=True,
    )  # fmt: skip
    if probe.returncode != 0:
        pytest.skip("this g++ has no ThreadSanitizer")
    sources = [PROGRAMS / "two_threads.cpp", NATIVE / "generation_kernel.cpp"]
    assert output_of(tmp_path, sources, ["-O1", "-g1", "-fsanitize=thread"]) == "equal\n"


def test_products_by_tiles_equal_those_without(tmp_path):
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    assert output_of(tmp_path, [PROGRAMS / "emulated_tiles.cpp"], flags) == "equal\n"
