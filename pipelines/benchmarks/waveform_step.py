"""Time one optimizer step of the 3.5M model of YouTubeMix on a clip of a minute: 958,464 samples (float32, CPU).

python pipelines/benchmarks/waveform_step.py
python pipelines/benchmarks/waveform_step.py --length 65536 --piece-length 16384

The clip goes through the model in pieces, with the states at their borders kept (mambacore.longsequence): the gradients
are those of the whole. Memory is the highest resident size above that before the model is built.
"""

import argparse
import time

import torch

from audiomamba.models import WaveformModel, architecture
from mambacore.benchmarking import machine, memory_bytes, print_table
from mambacore.longsequence import TokenCrossEntropy, backward_in_pieces

ARCHITECTURE = "mamba-youtubemix"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=958_464, help="samples")
    parser.add_argument("--piece-length", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    before = memory_bytes("VmRSS")
    torch.manual_seed(0)
    model = WaveformModel(architecture(ARCHITECTURE))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=2e-3)
    clip = torch.randint(model.config.quantiser.classes, (1, options.length + 1))
    begin = time.perf_counter()
    result = backward_in_pieces(model, clip[:, :-1], TokenCrossEntropy(clip[:, 1:]), piece_length=options.piece_length)
    optimizer.step()
    seconds = time.perf_counter() - begin
    print(f"One optimizer step of {ARCHITECTURE}\n{machine()}\n")
    print_table(
        ["length", "piece length", "seconds", "us/sample", "GB above before", "loss (nats)"],
        [
            [
                str(options.length),
                str(options.piece_length),
                f"{seconds:.1f}",
                f"{seconds / options.length * 1e6:.1f}",
                f"{(memory_bytes('VmHWM') - before) / 1e9:.3f}",
                f"{float(result.loss):.4f}",
            ]
        ],
    )


if __name__ == "__main__":
    main()
