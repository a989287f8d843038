"""Time generation of waveforms, sample by sample, by the 6.1M model of SC09 (random weights).

python pipelines/benchmarks/generation.py
python pipelines/benchmarks/generation.py --batch 1 16 --threads 2 --weights float32 bfloat16 int8
python pipelines/benchmarks/generation.py --model digits --clips DIGITS --pattern '*_[5-9].wav'

`one call` is what `audiomamba generate` does: thousands of samples, with their draws, in one native call. `PyTorch` is
the plain loop over samples of the same model and weights through PyTorch's operators; `call per block`, with
--call-per-block, has one native call per block and sample instead. All draw with the same random numbers. `processor
us` is processor time per sample of all clips, which other programs on the machine disturb less than the clock.

With --model and --clips the bits per sample of real clips are measured too, with the weights in each format.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from audiomamba.data.clips import read_clips
from audiomamba.data.waveforms import find_audio_files
from audiomamba.generation import WaveformGenerator
from audiomamba.models import WaveformModel, architecture, load_waveform_model
from audiomamba.models.step_program import WaveformSteps, steps_library
from mambacore import use_backend
from mambacore.benchmarking import machine, print_table
from mambacore.errors import InputError
from mambacore.layers.step_program import WEIGHT_FORMATS

ARCHITECTURE = "mamba-sc09-6m"
ROUNDS = 3


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


def bits_of_real_clips(model: WaveformModel, folder: Path, pattern: str, formats: list[str]) -> None:
    """Print what real clips cost, without labels, with the weights in each format."""
    config = model.config
    paths = [path for path in find_audio_files(folder) if path.match(pattern)]
    clips = read_clips(paths, config.quantiser, folder=folder, preparation=config.preparation).clips
    library = steps_library(model)
    if library is None:
        raise InputError("this model has no native steps; measure one of selective, S4D and feed-forward layers")
    middle, rows = config.quantiser.middle_class, []
    for weight_format in formats:
        steps, nats, samples = WaveformSteps(model, library, weight_format), 0.0, 0
        for clip in clips:
            given = clip.classes.long().unsqueeze(0)
            nats -= float(steps.run(steps.memory(1), torch.tensor([middle]), 0, given=given)[1].sum())
            samples += given.shape[1]
        bits = nats / samples / math.log(2)
        first = rows[0][1] if rows else f"{bits:.4f}"
        rows.append([weight_format, f"{bits:.4f}", f"{bits - float(first):+.4f}", f"{len(clips)}", f"{samples:,}"])
    print()
    print_table(["weights", "bits per sample", "change", "clips", "samples"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--samples", type=int, default=4000, help="of each clip, for the native way")
    parser.add_argument("--loop-samples", type=int, default=64, help="of each clip, for the loops; 0 for none")
    parser.add_argument("--call-per-block", action="store_true", help="a third way")
    parser.add_argument("--weights", nargs="+", choices=WEIGHT_FORMATS, default=["float32"], help="of the native way")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--model", help="a trained model instead, by its folder")
    parser.add_argument("--clips", type=Path, help="folder of real clips to measure bits per sample on, with --model")
    parser.add_argument("--pattern", default="*", help="which of them")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.model is None:
        model, name = WaveformModel(architecture(ARCHITECTURE)).eval(), ARCHITECTURE
    else:
        model, name = load_waveform_model(options.model)[0].eval(), options.model
    rate = model.config.quantiser.sample_rate_hz
    print(f"Generation by {name}, {rate:,} Hz, threads: {torch.get_num_threads()}\n{machine()}\n")
    ways = [(f"one call, {one}", one) for one in options.weights]
    if options.loop_samples:
        ways += [("PyTorch", None), *([("call per block", None)] if options.call_per_block else [])]
    rows = []
    for batch in options.batch:
        for way, weight_format in ways:
            begin = time.perf_counter()
            with use_backend("torch" if way == "PyTorch" else "native"):
                generator = WaveformGenerator(model, weight_format)
                if way == "call per block":
                    generator._steps = None
                samples = options.samples if generator.is_native else options.loop_samples
                seconds, processor = seconds_per_sample(generator, batch, samples)
            rows.append(
                [
                    str(batch),
                    way,
                    f"{1 / seconds:,.0f}",
                    f"{batch / seconds:,.0f}",
                    f"{batch / seconds / rate:.3f}",
                    f"{1e6 * processor / batch:,.1f}",
                    f"{time.perf_counter() - begin:.0f}",
                ]
            )
    titles = ["batch", "way", "samples/s each", "samples/s in all", "real time", "processor us", "took s"]
    print_table(titles, rows)
    if options.clips is not None:
        bits_of_real_clips(model, options.clips, options.pattern, list(options.weights))


if __name__ == "__main__":
    main()
