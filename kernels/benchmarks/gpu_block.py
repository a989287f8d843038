"""One training step of a whole Mamba block on a GPU: forward, backward, AdamW.

    python kernels/benchmarks/gpu_block.py --output bench-gpu --budget-seconds 120

Model width 512 (1,024 inner channels), 16 states, parameters in float32, autocast to bfloat16 and plain float32, at
lengths 2^9 ... 2^20; the peer is the same residual block with attention (8 heads, torch's scaled dot product), to 2^16.
"""

import time

import torch
from gpu_measure import Table, milliseconds, options_of, peak_bytes, plot

from mambacore.layers import ResidualStack

MODEL_WIDTH, LONGEST_ATTENTION = 512, 1 << 16
MIXERS = ("selective", "attention")


def main() -> None:
    options = options_of(__doc__, 120)
    table = Table(
        options.output / "gpu_block.tsv", ["length", "dtype", "mixer", "milliseconds", "us/token", "peak MiB"]
    )
    lines: dict[str, dict[float, float]] = {}
    for power in range(9, 21):
        for mixer in MIXERS:
            for dtype in (torch.bfloat16, torch.float32):
                length = 1 << power
                if mixer == "attention" and length > LONGEST_ATTENTION:
                    continue
                if time.monotonic() > options.until:
                    print("the budget is spent; what is left is not measured", flush=True)
                    break
                torch.manual_seed(0)
                stack = ResidualStack(MODEL_WIDTH, [mixer]).cuda()
                optimizer = torch.optim.AdamW(stack.parameters(), fused=True)
                sequence = torch.randn(1, length, MODEL_WIDTH, device="cuda")

                def step(stack=stack, optimizer=optimizer, sequence=sequence, dtype=dtype) -> None:
                    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
                        outputs, _ = stack(sequence)
                    outputs.float().square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()

                kind = str(dtype).removeprefix("torch.")
                try:
                    time_ms = milliseconds(step, repeats=3)
                    table.add(length, kind, mixer, time_ms, time_ms * 1e3 / length, peak_bytes(step) / 2**20)
                    lines.setdefault(f"{mixer} {kind}", {})[length] = time_ms
                except torch.OutOfMemoryError:
                    table.add(length, kind, mixer, "out of memory", "", "")
                    torch.cuda.empty_cache()
    plot(options.output / "gpu_block.png", "Training step of one block", "length", "milliseconds", lines)


if __name__ == "__main__":
    main()
