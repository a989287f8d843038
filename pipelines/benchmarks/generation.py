"""Time generation of waveforms, sample by sample, by the 6.1M model of SC09 (random weights), beside its targets.

python pipelines/benchmarks/generation.py
python pipelines/benchmarks/generation.py --batch 1 --threads 1 --weights float32 int8 --call-per-block
python pipelines/benchmarks/generation.py --model digits --clips DIGITS --pattern '*_1[0-1].wav' --record

`one call` is what `audiomamba generate` does: thousands of samples, with their draws, in one native call. `PyTorch` is
the plain loop over samples of the same model and weights through PyTorch's operators; `call per block`, with
--call-per-block, has one native call per block and sample instead. All draw with the same random numbers. `processor
us` is processor time per sample of all clips, which other programs on the machine disturb less than the clock; two
threads on one clip wait for each other in it.

Targets are samples per second over all clips on two quiet cores at 16 kHz.

With --model and --clips the bits per sample of real clips are measured too, with the weights in each format; --record
writes the change into the model's config.json and card.
"""

import argparse
import time
from pathlib import Path

import torch

from audiomamba.data.clips import read_clips
from audiomamba.data.waveforms import find_audio_files
from audiomamba.generation import WaveformGenerator
from audiomamba.models import WaveformModel, architecture, load_waveform_model
from audiomamba.rounding import LARGEST_CHANGE, record_rounding_cost, rounding_cost
from mambacore import use_backend
from mambacore.benchmarking import machine, print_table
from mambacore.errors import InputError
from mambacore.layers.step_weights import WEIGHT_FORMATS

ARCHITECTURE = "mamba-sc09-6m"
ROUNDS = 3
LEAST_SAMPLES = 250  # of each clip, in a round
TARGETS = {1: 16_000, 16: 60_000, 64: 120_000}  # by the batch, with rounded weights
FLOAT32_TARGETS = {1: 6_000}


def seconds_per_sample(generator: WaveformGenerator, batch: int, samples: int) -> tuple[float, float]:
    """The shortest of several rounds by the clock and by processor time, per sample of each clip."""
    rate = generator.quantiser.sample_rate_hz
    generator.generate(batch, 16 / rate)
    found = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        taken = generator.generate(batch, samples / rate).seconds_taken
        found.append((taken / samples, (time.process_time() - begin) / samples))
    return min(clock for clock, _ in found), min(processor for _, processor in found)


def target_of(batch: int, weight_format: str | None) -> int | None:
    """Samples per second over all clips that were aimed at."""
    if weight_format is None:
        return None
    return (FLOAT32_TARGETS if weight_format == "float32" else TARGETS).get(batch)


def print_bits_of_real_clips(model: WaveformModel, options: argparse.Namespace) -> None:
    """Print what real clips cost, without labels, with the weights in each format."""
    config = model.config
    paths = [path for path in find_audio_files(options.clips) if path.match(options.pattern)]
    clips = read_clips(paths, config.quantiser, folder=options.clips, preparation=config.preparation).clips
    cost = rounding_cost(model, clips, options.weights)
    print()
    print_table(
        ["weights", "bits per sample", "change", "at most", "clips", "samples"],
        [
            [
                name,
                f"{bits:.4f}",
                f"{cost.change(name):+.4f}",
                f"{LARGEST_CHANGE}",
                f"{cost.clips}",
                f"{cost.samples:,}",
            ]
            for name, bits in cost.bits.items()
        ],
    )
    if options.record:
        record_rounding_cost(Path(options.model), cost)
        print(f"\nrecorded in {options.model}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--samples", type=int, default=4000, help="over all clips of a round, for the native way")
    parser.add_argument("--loop-samples", type=int, default=32, help="of each clip, for the loops; 0 for none")
    parser.add_argument("--call-per-block", action="store_true", help="a third way")
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHT_FORMATS, default=list(WEIGHT_FORMATS), help="of the native way"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="default: one, and all cores")
    parser.add_argument("--model", help="a trained model instead, by its folder")
    parser.add_argument("--clips", type=Path, help="folder of real clips to measure bits per sample on, with --model")
    parser.add_argument("--pattern", default="*", help="which of them")
    parser.add_argument("--record", action="store_true", help="write the change in bits into the folder of --model")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model is None:
        model, name = WaveformModel(architecture(ARCHITECTURE)).eval(), ARCHITECTURE
        if options.record:
            raise InputError("--record writes into the folder of a trained model: name it with --model and --clips")
    else:
        model, name = load_waveform_model(options.model)[0].eval(), options.model
    rate = model.config.quantiser.sample_rate_hz
    threads = options.threads or sorted({1, torch.get_num_threads()})
    print(f"Generation by {name}, {rate:,} Hz\n{machine()}\n")
    ways: list[tuple[str, str | None]] = [(f"one call, {one}", one) for one in options.weights]
    if options.loop_samples:
        ways += [("PyTorch", None), *([("call per block", None)] if options.call_per_block else [])]
    rows = []
    for batch in options.batch:
        for way, weight_format in ways:
            for count in threads:
                torch.set_num_threads(count)
                with use_backend("torch" if way == "PyTorch" else "native"):
                    generator = WaveformGenerator(model, weight_format)
                    if way == "call per block":
                        generator._steps = None
                    samples = (
                        max(LEAST_SAMPLES, options.samples // batch) if generator.is_native else options.loop_samples
                    )
                    seconds, processor = seconds_per_sample(generator, batch, samples)
                target = target_of(batch, weight_format) if options.model is None else None
                speed = batch / seconds
                rows.append(
                    [
                        str(batch), way, str(count), f"{1 / seconds:,.0f}", f"{speed:,.0f}",
                        "" if target is None else f"{target:,}", "" if target is None else f"{speed / target:.2f}",
                        f"{speed / rate:.3f}", f"{1e6 / speed:,.1f}", f"{1e6 * processor / batch:,.1f}",
                    ]
                )  # fmt: skip
    titles = ["batch", "way", "threads", "samples/s each", "samples/s in all", "target", "of it", "real time"]
    if rows:
        print_table([*titles, "clock us", "processor us"], rows)
    if options.clips is not None:
        print_bits_of_real_clips(model, options)


if __name__ == "__main__":
    main()
