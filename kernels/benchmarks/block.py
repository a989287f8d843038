"""Time one Mamba block (model width 128, state 16, batch 1, float32) beside its public CPU peers.

    python kernels/benchmarks/block.py
    python kernels/benchmarks/block.py --lengths 1024 --time-limit 30

Ours are whole residual blocks with their two norms, selective and S4D (complex states); the peers (transformers'
MambaMixer and mambapy's MambaBlock) run without any. Importing mambacore asks PyTorch for huge pages, which is part of
what it gives; the peers run as their users run them, and with huge pages too under THP_MEM_ALLOC_ENABLE=1. Each case
runs in a process of its own, so that peak memory is its own: the highest resident size above that before the first
call.
"""

import argparse
import functools
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambacore.benchmarking import best_seconds, machine, memory_bytes, print_table

MODEL_WIDTH, STATE_SIZE = 128, 16
REPEATS = 3
# Before anything imports mambacore, which would hand huge pages on to the peers.
ENVIRONMENT = dict(os.environ)


def ours(mixer: str) -> Callable[[Tensor], Tensor]:
    from mambacore.layers import ResidualStack  # noqa: PLC0415  each case imports only what it measures

    stack = ResidualStack(MODEL_WIDTH, [{"name": mixer, "state_size": STATE_SIZE}])
    return lambda sequence: stack(sequence)[0]


def transformers_mixer() -> nn.Module:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.disable(logging.WARNING)
    from transformers import MambaConfig  # noqa: PLC0415
    from transformers.models.mamba.modeling_mamba import MambaMixer  # noqa: PLC0415

    return MambaMixer(MambaConfig(hidden_size=MODEL_WIDTH, state_size=STATE_SIZE, expand=2, conv_kernel=4), layer_idx=0)


def mambapy_block() -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig  # noqa: PLC0415

    return MambaBlock(MambaConfig(d_model=MODEL_WIDTH, n_layers=1, d_state=STATE_SIZE))


OURS = {"genomamba selective": "selective", "genomamba s4d": "s4d"}
SYSTEMS = {name: functools.partial(ours, mixer) for name, mixer in OURS.items()} | {
    "transformers": transformers_mixer,
    "mambapy": mambapy_block,
}


def run_case(system: str, length: int, backward: bool) -> dict[str, float]:
    """Time per token in microseconds and peak memory in bytes of one case."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    block = SYSTEMS[system]()
    sequence = torch.randn(1, length, MODEL_WIDTH, requires_grad=backward)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            outputs = block(sequence)
            if backward:
                outputs.sum().backward()

    before = memory_bytes("VmRSS")
    seconds = best_seconds(step, REPEATS)
    return {"us_per_token": seconds / length * 1e6, "peak_bytes": memory_bytes("VmHWM") - before}


def run_in_process(system: str, length: int, backward: bool, options: argparse.Namespace) -> dict[str, float] | None:
    """The case in a fresh process; None when it exceeds the time limit or fails (out of memory, say)."""
    command = [sys.executable, __file__, "--case", system, str(length), str(int(backward))]
    if options.threads:
        command += ["--threads", str(options.threads)]
    try:
        finished = subprocess.run(
            command, env=ENVIRONMENT, capture_output=True, text=True, timeout=options.time_limit, check=True
        )
    except subprocess.TimeoutExpired:
        return None
    except subprocess.CalledProcessError as error:
        print(f"{system} at {length} failed: {error.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384, 65536])
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--time-limit", type=float, default=100, help="seconds for one case, its warm-up included")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.case:
        system, length, backward = options.case
        print(json.dumps(run_case(system, int(length), backward == "1")))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "mambapy"))
    print(f"One block, width {MODEL_WIDTH}, state {STATE_SIZE}, batch 1, float32\n{machine()}\n{versions}\n")
    rows = []
    for length in options.lengths:
        for backward in (False, True):
            found = {system: run_in_process(system, length, backward, options) for system in SYSTEMS}
            peers = [case for system, case in found.items() if system not in OURS and case is not None]
            for system, case in found.items():
                cells = [str(length), "forward+backward" if backward else "forward", system]
                if case is None:
                    cells += [f"over {options.time_limit:.0f} s", "-", ""]
                else:
                    cells += [f"{case['us_per_token']:.2f}", f"{case['peak_bytes'] / 2**30:.3f}", ""]
                if system in OURS and case and peers:
                    fastest = min(peers, key=lambda peer: peer["us_per_token"])
                    cells[-1] = (
                        f"{fastest['us_per_token'] / case['us_per_token']:.1f} x as fast, "
                        f"{case['peak_bytes'] / max(fastest['peak_bytes'], 1):.3f} of the memory"
                    )
                rows.append(cells)
    print_table(["length", "pass", "system", "us/token", "peak GiB", "against the faster peer"], rows)


if __name__ == "__main__":
    main()
