"""The native library: found when it is there, replaced with one warning when it is not, refused when it is broken."""

import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import mambacore
from mambacore import native_library as library_module
from mambacore.native_library import Library, library_path, native_library, process_team
from scan_cases import scan_arguments
from tolerances import FLOAT32, relative_error

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(library_module, "library_path", lambda: None)
    native_library.cache_clear()
    yield
    native_library.cache_clear()


def test_without_the_library_everything_works_with_one_warning(without_library):
    arguments = {name: tensor.float() for name, tensor in scan_arguments(1, 70, 8, 4).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = mambacore.selective_scan(**arguments, step_softplus=True)
        mambacore.selective_scan(**arguments, step_softplus=True)
    assert sum("native library" in str(warning.message) for warning in caught) == 1
    with mambacore.use_backend("torch"):
        assert relative_error(first, mambacore.selective_scan(**arguments, step_softplus=True)) < FLOAT32
    assert "unavailable" in mambacore.backends()["native"]
    with mambacore.use_backend("native"), pytest.raises(RuntimeError, match="without its native library"):
        mambacore.selective_scan(**arguments)


def test_a_broken_library_is_an_error_not_a_fallback(tmp_path):
    broken = tmp_path / "libmambacore_native.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError, match="cannot be opened"):
        Library(broken)


@pytest.mark.skipif(library_path() is None, reason="installed without the native library")
def test_an_unknown_instruction_set_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="'mmx' is not available here"):
        native_library().use_instruction_set("mmx")


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="choose one of native, triton, mamba_ssm, torch"),
        mambacore.use_backend("cuda"),
    ):
        pass


@pytest.mark.skipif(library_path() is None, reason="installed without the native library")
def test_native_does_not_take_what_it_cannot_compute():
    arguments = scan_arguments(1, 5, 4, 2)
    with mambacore.use_backend("native"), pytest.raises(RuntimeError, match="does not support"):
        mambacore.selective_scan(**{name: tensor.half() for name, tensor in arguments.items()})


@pytest.mark.skipif(library_path() is None, reason="installed without the native library")
def test_a_scan_works_in_a_forked_process():
    inputs = torch.randn(1, 4096, 64)
    torch.set_num_threads(max(2, torch.get_num_threads()))
    mambacore.causal_convolution(inputs, torch.ones(64, 4))
    child = os.fork()
    if child == 0:
        mambacore.causal_convolution(inputs, torch.ones(64, 4))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(library_path() is None, reason="installed without the native library")
def test_threads_of_its_own_give_the_same_bits_as_the_team_of_the_process():
    inputs, weight = torch.randn(1, 4096, 64), torch.randn(64, 4)
    torch.set_num_threads(max(2, torch.get_num_threads()))
    on_team = mambacore.causal_convolution(inputs, weight)
    native_library().use_team(None)
    try:
        assert torch.equal(mambacore.causal_convolution(inputs, weight), on_team)
    finally:
        native_library().use_team(process_team())


def test_installing_without_a_compiler_gives_a_working_package(tmp_path):
    """Build the wheel with no C++ compiler to be found, unpack it, and use it."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"CXX", "CC", "PYTHONPATH", "CMAKE_GENERATOR"}
    }
    environment["CXX"] = str(tmp_path / "no-such-compiler")
    environment["PATH"] = str(Path(sys.executable).parent)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(REPOSITORY),
    ]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    assert "mambacore/scan/operator.py" in names and not [name for name in names if name.endswith((".so", ".dylib"))]
    program = (
        "import sys, warnings, torch\n"
        # An editable install of this very project would answer the import before the unpacked wheel.
        "sys.meta_path = [finder for finder in sys.meta_path if 'Scikit' not in type(finder).__name__]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import mambacore\n"
        "    from mambacore.layers import ResidualStack\n"
        "    outputs, state = ResidualStack(8, ['selective'] * 2)(torch.randn(1, 70, 8))\n"
        "    outputs.sum().backward()\n"
        "print(mambacore.__file__, sum('native library' in str(warning.message) for warning in caught))\n"
    )
    used = subprocess.run(
        [sys.executable, "-c", program], env={**environment, "PYTHONPATH": str(tmp_path / "unpacked")},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == [str(tmp_path / "unpacked" / "mambacore" / "__init__.py"), "1"]
