"""The native library reads and writes within bounds, and does nothing that C++ leaves undefined.

Its tests run once more on a build with AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the
first mistake. The runtime of the former has to be there before anything else, hence LD_PRELOAD.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TESTS = (
    "test_contract.py", "test_convolution.py", "test_norm.py", "test_scan.py", "test_scan_variants.py", "test_step.py",
    "test_step_program.py", "layers/test_dual_step.py",
    "layers/test_step_weights.py", "layers/test_selective_block.py", "layers/test_gated_norm.py",
    "ssd/test_ssd_scan.py",
)  # fmt: skip
# PyTorch alone is not what is tested here, and a limit on memory does not go with AddressSanitizer.
LEFT_OUT = "not torch and not memory_that_runs_out and not opcheck and not compiles and not traced and not exported"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(platform.system() != "Linux", reason="preloads the sanitizer's runtime as Linux does"),
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("cmake") is None, reason="needs g++ and cmake"),
]


def runtime(name: str) -> Path:
    """The sanitizer's runtime library of this compiler."""
    return Path(subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip())


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A build with sanitizers."""
    if not runtime("asan").is_file() or not runtime("ubsan").is_file():
        pytest.skip("this g++ has no sanitizers")
    build = tmp_path_factory.mktemp("sanitized")
    configure = [
        "cmake",
        "-S",
        REPOSITORY / "kernels",
        "-B",
        build,
        "-DMAMBACORE_SANITIZE=ON",
        "-DCMAKE_CXX_COMPILER=g++",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count())], check=True, capture_output=True)
    return build / "libmambacore_native.so"


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_native_tests_are_clean(library, instruction_set):
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('asan')} {runtime('ubsan')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python and torch never give everything back
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MAMBACORE_NATIVE_LIBRARY": str(library),
        "MAMBACORE_INSTRUCTION_SET": instruction_set,
    }
    probe = [sys.executable, "-c", "import mambacore; print(mambacore.backends()['native'])"]
    found = subprocess.run(probe, env=environment, capture_output=True, text=True, check=False)
    if "is not available here" in found.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert found.returncode == 0, found.stderr[-4000:]
    files = [str(REPOSITORY / "tests" / "mambacore" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", LEFT_OUT]
    run = subprocess.run(
        [*command, *files], env=environment, capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_a_write_out_of_bounds_would_be_found(library):
    """The sanitizers watch: a scan told of a longer sequence than there is ends its process."""
    program = (
        "import torch\n"
        "from mambacore.native_library import Norm, native_library\n"
        "rows = torch.ones(4, 16)\n"
        "weight, inverse = torch.ones(16), torch.ones(4)\n"
        "native_library().norm_forward(Norm(rows=4096, width=16, element=0, threads=1, segments=1, epsilon=1e-5,\n"
        "    inputs=rows.data_ptr(), weight=weight.data_ptr(), outputs=rows.data_ptr(), inverse=inverse.data_ptr()))\n"
    )
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('asan')} {runtime('ubsan')}", "ASAN_OPTIONS": "detect_leaks=0",
        "MAMBACORE_NATIVE_LIBRARY": str(library),
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "AddressSanitizer" in run.stderr
