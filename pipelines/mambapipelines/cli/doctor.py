"""The command `doctor` of both programs: what this machine has, what is missing, and a self-test."""

import importlib.util
import os
import platform
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
# Of the self-test: the largest difference between a backend and the definition, float64.
LARGEST_DIFFERENCE = 1e-9


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the self-test.")] = False,
) -> None:
    """Report what this machine has and what is missing, and test the kernels in a few seconds.

    Exit code 2 means that the self-test failed.

    **Example**

    `genomamba doctor`
    """
    import torch  # noqa: PLC0415

    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    devices = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    print(f"CUDA devices: {devices or 'none'}")
    for line in backend_lines():
        print(line)
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = f"{', '.join(missing)} missing: pip install 'genomamba[{extra}]'" if missing else "installed"
        print(f"extra {extra}: {state}")
    if not quick:
        _test_scan()


def _test_scan() -> None:
    """Compare every backend that is there with the definition, forward and backward."""
    import torch  # noqa: PLC0415

    from mambacore import selective_scan, use_backend  # noqa: PLC0415
    from mambacore.scan.reference import selective_scan_reference  # noqa: PLC0415

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
            print(f"self-test {name}: not run ({' '.join(str(error).split())})")
            continue
        difference = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
        print(f"self-test {name}: largest difference {difference:.1e}, {time.monotonic() - started:.2f} s")
        if not difference < LARGEST_DIFFERENCE:
            raise input_error(
                f"the backend {name} is wrong on this machine (difference {difference:.1e}): report it with the lines "
                "above."
            )
