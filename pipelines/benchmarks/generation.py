"""Time generation of waveforms, sample by sample, by the 6.1M model of SC09 (float32, random weights).

python pipelines/benchmarks/generation.py
python pipelines/benchmarks/generation.py --batch 1 16 --threads 2

`one call` is what `audiomamba generate` does: thousands of samples, with their draws, in one native call. `PyTorch` is
the plain loop over samples of the same model and weights through PyTorch's operators; `call per block`, with
--call-per-block, has one native call per block and sample instead. All draw with the same random numbers. Real time is
16,000 samples per second.
"""

import argparse
import time

import torch

from audiomamba.generation import WaveformGenerator
from audiomamba.models import WaveformModel, architecture
from mambacore import use_backend
from mambacore.benchmarking import machine, print_table

ARCHITECTURE = "mamba-sc09-6m"
SAMPLE_RATE_HZ = 16_000
ROUNDS = 3


def seconds_per_sample(generator: WaveformGenerator, batch: int, samples: int) -> float:
    """The shortest of several rounds, per sample of each clip."""
    generator.generate(batch, 16 / SAMPLE_RATE_HZ)
    return min(generator.generate(batch, samples / SAMPLE_RATE_HZ).seconds_taken for _ in range(ROUNDS)) / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--samples", type=int, default=4000, help="of each clip, for the native way")
    parser.add_argument("--loop-samples", type=int, default=64, help="of each clip, for the loops")
    parser.add_argument("--call-per-block", action="store_true", help="a third way")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = WaveformModel(architecture(ARCHITECTURE)).eval()
    print(f"Generation by {ARCHITECTURE}, float32\n{machine()}\n")
    rows = []
    for batch in options.batch:
        for name in ("one call", "PyTorch", *(["call per block"] if options.call_per_block else [])):
            begin = time.perf_counter()
            with use_backend("torch" if name == "PyTorch" else "native"):
                generator = WaveformGenerator(model)
                if name == "call per block":
                    generator._steps = None
                samples = options.samples if generator.is_native else options.loop_samples
                seconds = seconds_per_sample(generator, batch, samples)
            rows.append(
                [
                    str(batch),
                    name,
                    f"{1 / seconds:,.0f}",
                    f"{batch / seconds:,.0f}",
                    f"{batch / seconds / SAMPLE_RATE_HZ:.3f}",
                    f"{time.perf_counter() - begin:.0f}",
                ]
            )
    print_table(["batch", "way", "samples/s each", "samples/s in all", "real time", "took s"], rows)


if __name__ == "__main__":
    main()
