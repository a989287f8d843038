"""The command `doctor` of both programs: a report on this machine and a self-test."""

import importlib.util
import os
import platform
import shutil
import time
from typing import Annotated

import typer

from mambapipelines.cli.options import input_error
from mambapipelines.cli.program import backend_lines

EXTRAS = {
    "audio": ("torchaudio", "soundfile"),
    "variants": ("pysam",),
    "tables": ("anndata", "pandas", "pyarrow", "pyBigWig"),
    "app": ("gradio",),
}
# Self-test: largest difference between a backend and the reference, float64.
LARGEST_DIFFERENCE = 1e-9
# Largest difference between logits of one model computed in two ways, float32.
LARGEST_MODEL_DIFFERENCE = 1e-4


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Skip the self-test.")] = False,
) -> None:
    """Report installed and missing components, and test the kernels in about ten seconds.

    The exit code is 2 if the self-test fails.

    **Example**

    `genomamba doctor`
    """
    import torch  # noqa: PLC0415

    from mambapipelines.console import show  # noqa: PLC0415

    show(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores, {_memory()}")
    show(f"C++ compiler: {_compiler()}")
    devices = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    show(f"CUDA devices: {devices or 'none'}")
    for line in backend_lines():
        show(line)
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = f"{', '.join(missing)} missing: pip install 'genomamba[{extra}]'" if missing else "installed"
        show(f"extra {extra}: {state}")
    if not quick:
        _test_scan()
        _test_model()


def _memory() -> str:
    """Describe the machine's memory."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _compiler() -> str:
    """Return the compiler with which an installation from source would build the native kernels."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    return found or "none (needed only to build from source: install g++ or clang++, then reinstall genomamba)"


def _test_model() -> None:
    """Check the laws of a stack, and that a model is unchanged after saving and loading."""
    import tempfile  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from genomamba.models.language_model import (  # noqa: PLC0415
        build_language_model,
        load_language_model,
        save_language_model,
    )
    from mambapipelines.console import show  # noqa: PLC0415

    started = time.monotonic()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_language_model("causal", {"model_width": 16, "mixers": ["selective", "mamba2", "s4d"]}).eval()
        tokens = torch.randint(7, 11, (2, 200))
        whole, _ = model(tokens)
        first, state = model(tokens[:, :77])
        second, _ = model(tokens[:, 77:], state)
        pieces = float((torch.cat([first, second], dim=1) - whole).abs().max())
        with tempfile.TemporaryDirectory() as place:
            save_language_model(Path(place) / "model", model, {})
            again, _ = load_language_model(Path(place) / "model").model(tokens)
        folder = float((again - whole).abs().max())
    seconds = time.monotonic() - started
    show(f"self-test model: pieces differ from the whole by {pieces:.1e}, reloaded by {folder:.1e}, {seconds:.2f} s")
    if not max(pieces, folder) < LARGEST_MODEL_DIFFERENCE:
        raise input_error(
            f"models give wrong results on this machine (difference {max(pieces, folder):.1e}): report the lines above."
        )


def _test_scan() -> None:
    """Compare every available backend with the reference, forward and backward."""
    import torch  # noqa: PLC0415

    from mambacore import selective_scan, use_backend  # noqa: PLC0415
    from mambacore.scan.reference import selective_scan_reference  # noqa: PLC0415
    from mambapipelines.console import show  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    arguments = {
        "inputs": normal(2, 37, 5),
        "step_size": normal(2, 37, 5),
        "state_matrix": normal(5, 4),
        "input_matrix": normal(2, 37, 1, 4),
        "output_matrix": normal(2, 37, 1, 4),
    }

    def results(scan) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        negative = {**arguments, "state_matrix": -arguments["state_matrix"].exp()}
        outputs = scan(**negative, step_softplus=True)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        gradients = torch.autograd.grad(outputs.square().sum(), list(arguments.values()))
        return [outputs.detach(), *gradients]

    expected = results(selective_scan_reference)
    for name in ("native", "torch"):
        started = time.monotonic()
        try:
            with use_backend(name):
                found = results(selective_scan)
        except (ImportError, RuntimeError) as error:
            show(f"self-test {name}: not run ({' '.join(str(error).split())})")
            continue
        difference = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
        show(f"self-test {name}: largest difference {difference:.1e}, {time.monotonic() - started:.2f} s")
        if not difference < LARGEST_DIFFERENCE:
            raise input_error(
                f"the backend {name} is wrong on this machine (difference {difference:.1e}): report it with the lines "
                "above."
            )
