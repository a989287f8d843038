"""The selective scan on a GPU beside its peers, forward, forward and backward, and peak memory.

    python kernels/benchmarks/gpu_scan.py --output bench-gpu --budget-seconds 240

Lengths 2^9 ... 2^20 at (batch, channels) of (1, 256), (1, 1024), (8, 1024), 16 states, bfloat16 and float32, with skip,
gate, bias and softplus. Peers: mamba_ssm's kernel where it is installed (as its users call it, in its own layout;
`make bench-gpu-peer` builds it), else its published algorithm in Triton (gpu_peer.py), named so in the table; torch's
flash attention (heads of 64, bfloat16, to 2^17 tokens), and the scan in unfused PyTorch (to 2^14 tokens).
Bytes per second count each input once and each output once; exponentials count 16 states, softplus and gate (20 per
channel and token).
"""

import importlib.util
import time
from collections.abc import Callable

import torch
from gpu_measure import (
    Table,
    copy_bytes_per_second,
    exponentials_per_second,
    milliseconds,
    options_of,
    peak_bytes,
    plot,
)
from gpu_peer import published_scan
from torch.nn import functional as F

from mambacore import selective_scan, use_backend
from mambacore.scan.mamba_ssm import scan_function

STATES, EXPONENTIALS_PER_TOKEN, HEAD_WIDTH = 16, 20, 64
LONGEST_ATTENTION, LONGEST_UNFUSED = 1 << 17, 1 << 14
SIZES = ((1, 256), (1, 1024), (8, 1024))
HEADER = ["batch", "channels", "dtype", "length", "system", "pass", "milliseconds", "peak MiB", "GB/s", "share of copy",
          "exponentials/s", "share of exponentials"]  # fmt: skip


def scan_arguments(batch: int, length: int, channels: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random arguments of ``selective_scan`` on the device, as in a trained model."""

    def normal(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=like)

    return {
        "inputs": normal(batch, length, channels),
        "step_size": normal(batch, length, channels) - 4,
        "state_matrix": -torch.arange(1.0, STATES + 1, device="cuda").expand(channels, STATES).contiguous(),
        "input_matrix": normal(batch, length, STATES),
        "output_matrix": normal(batch, length, STATES),
        "skip_weight": normal(channels, like=torch.float32),
        "gate": normal(batch, length, channels),
        "step_bias": torch.zeros(channels, device="cuda"),
    }


def systems_at(batch: int, length: int, channels: int, dtype: torch.dtype) -> dict[str, tuple[Callable, list]]:
    """Name to function and its arguments, for those that can do this size."""
    ours = scan_arguments(batch, length, channels, dtype)

    def run(backend: str) -> Callable:
        def scan(*tensors: torch.Tensor) -> torch.Tensor:
            with use_backend(backend):
                return selective_scan(**dict(zip(ours, tensors, strict=True)), step_softplus=True)

        return scan

    systems: dict[str, tuple[Callable, list]] = {"genomamba": (run("triton"), list(ours.values()))}
    theirs = [ours[name].transpose(1, 2).contiguous() for name in ("inputs", "step_size")]
    theirs += [ours["state_matrix"]]
    theirs += [ours[name].transpose(1, 2).contiguous() for name in ("input_matrix", "output_matrix")]
    theirs += [ours["skip_weight"], ours["gate"].transpose(1, 2).contiguous(), ours["step_bias"]]
    function, _ = scan_function()
    # The package can be installed without the kernel.
    if function is not None and importlib.util.find_spec("selective_scan_cuda") is not None:
        systems["mamba_ssm"] = (lambda *tensors: function(*tensors, delta_softplus=True), theirs)
    else:
        systems["mamba_ssm's algorithm in Triton"] = (published_scan, theirs)
    if length <= LONGEST_UNFUSED:
        systems["unfused PyTorch"] = (run("torch"), list(ours.values()))
    if dtype == torch.bfloat16 and length <= LONGEST_ATTENTION:
        shape = (batch, channels // HEAD_WIDTH, length, HEAD_WIDTH)
        heads = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3)]

        def attention(*tensors: torch.Tensor) -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(*tensors, is_causal=True)

        systems["flash attention"] = (attention, heads)
    return systems


def passes(function: Callable, tensors: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """The forward pass without gradients, and forward with backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = torch.ones_like(function(*tensors))

    def forward() -> None:
        with torch.no_grad():
            function(*tensors)

    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(function(*leaves), leaves, grad),
    }


def main() -> None:
    options = options_of(__doc__, 240)
    copied, exponentials = copy_bytes_per_second(), exponentials_per_second()
    print(f"ceilings: copy {copied / 1e9:.0f} GB/s, {exponentials / 1e12:.2f}e12 exponentials/s", flush=True)
    table = Table(options.output / "gpu_scan.tsv", HEADER)
    lines: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    cases = [(*size, dtype, 1 << power) for power in (9, 11, 13, 16, 20, 10, 12, 14, 15, 17, 18, 19) for size in SIZES
             for dtype in (torch.bfloat16, torch.float32)]  # fmt: skip
    for batch, channels, dtype, length in cases:
        if time.monotonic() > options.until:
            print(f"the budget of {options.budget_seconds:.0f} s is spent; what is left is not measured", flush=True)
            break
        kind = str(dtype).removeprefix("torch.")
        for system, (function, tensors) in systems_at(batch, length, channels, dtype).items():
            try:
                for name, run in passes(function, tensors).items():
                    # The unfused scan is a loop over the positions: one run says enough.
                    time_ms = milliseconds(run, repeats=1 if system == "unfused PyTorch" else 5)
                    memory, cells = peak_bytes(run), ["", "", "", ""]
                    if system == "genomamba" and name == "forward":
                        moved = sum(tensor.nbytes for tensor in tensors) + tensors[0].nbytes
                        rate = moved / (time_ms * 1e-3)
                        done = batch * length * channels * EXPONENTIALS_PER_TOKEN / (time_ms * 1e-3)
                        cells = [
                            f"{rate / 1e9:.0f}",
                            f"{rate / copied:.2f}",
                            f"{done:.3g}",
                            f"{done / exponentials:.2f}",
                        ]
                    table.add(batch, channels, kind, length, system, name, time_ms, memory / 2**20, *cells)
                    at = lines.setdefault((f"{batch}x{channels} {kind}", name), {})
                    at.setdefault(system, {})[length] = time_ms
            except torch.OutOfMemoryError:
                table.add(batch, channels, kind, length, system, "out of memory", "", "", "", "", "", "")
                torch.cuda.empty_cache()
    for (size, name), systems in lines.items():
        ordered = {system: dict(sorted(points.items())) for system, points in systems.items()}
        file = f"gpu_scan_{size}_{name}.png".replace(" ", "_").replace("+", "_")
        plot(options.output / file, f"Selective scan, {size}, {name}", "length", "milliseconds", ordered)


if __name__ == "__main__":
    main()
