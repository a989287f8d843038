"""Commands other than training on the pretended device, in their own process: `python device_commands.py GROUP DIR`.

Each is run on the CPU and on the device, in float32, and in bfloat16 on the device where it has `--precision`. Printed
as JSON: for each command how far its figures in float32 and bfloat16 are from the CPU's, relative to the largest.
"""

import contextlib
import functools
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import audiomamba
import genomamba
import pretend_device
import pretend_process  # noqa: F401 - before modules that are patched
from genomamba.baselines import fitting
from genomamba.data.targets import TargetDescription
from genomamba.models.sequence_model import save_sequence_model, sequence_model_on
from genomamba.models.species_classifier import save_classifier
from mambapipelines.apps.clips import ClipPage
from mambapipelines.apps.species import SpeciesPage
from mambapipelines.species import demo as species_demo
from mambapipelines.species.train import SpeciesTrainingOptions
from tiny_dna import yeast_like
from tiny_language_models import language_model, model_folder, random_letters, write_fasta
from tiny_species import CLASS_NAMES, bases, combined_model, fasta, write_tiny_model

DEVICE = pretend_device.NAME
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
SECONDS = re.compile(r"[\d.,]+ (?:s|samples/s|bases per second)\b")

Runs = dict[str, tuple[list[str], str | None]]
"""By name: a command without `--device`, and the name of its output; `None` where it goes to standard output."""


def classifier_commands(folder: Path) -> Runs:
    """`genomamba classify` of short and long records, and `evaluate` on genomes of its own."""
    save_classifier(folder / "species", combined_model(gated=True), details={})
    model = str(folder / "species")
    (folder / "contigs.fa").write_bytes(fasta({"first": bases(300), "second": bases(40, 1), "third": bases(700, 2)}))
    genomes = []
    for number, name in enumerate(CLASS_NAMES):
        (folder / f"{name}.fa").write_bytes(fasta({"chr1": bases(600, number, 0.3 + 0.2 * number)}))
        genomes.append(f"--genome={name}={folder / name}.fa")
    windows = ["--lengths", "32,128", "--per-class", "3", "--baseline", "none"]
    return {
        "classify": (["genomamba", "classify", model, str(folder / "contigs.fa"), "--piece-length", "256"], None),
        "evaluate": (["genomamba", "evaluate", model, *genomes, *windows], None),
    }


def language_commands(folder: Path) -> Runs:
    """`genomamba embed`, `score-variants`, `track`, `generate`, `perplexity` and `predict`."""
    for kind in ("causal", "masked"):
        model_folder(folder / kind, kind)
    targets = TargetDescription("classes", ("kind",), ("a", "b"))
    fine_tuned = sequence_model_on(language_model("causal"), targets, "mean", True).float()
    save_sequence_model(folder / "fine-tuned", fine_tuned, {})
    genome = random_letters(400, 3)
    write_fasta(folder / "genome.fa", {"chr1": genome})
    (folder / "contigs.fa").write_bytes(fasta({"first": bases(300), "second": bases(40, 1)}))
    alternative = b"C" if genome[199:200] == b"A" else b"A"
    (folder / "variants.vcf").write_bytes(
        b"##fileformat=VCFv4.2\n##contig=<ID=chr1,length=400>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        b"chr1\t200\t.\t" + genome[199:200] + b"\t" + alternative + b"," + genome[199:200] + b"GG\t.\t.\t.\n"
    )
    causal, masked = str(folder / "causal"), str(folder / "masked")
    reference = ["--reference", str(folder / "genome.fa")]
    variants = [str(folder / "variants.vcf"), *reference, "--window", "32"]
    region = [*reference, "--region", "chr1:150-200"]
    yeast = ["--reference", yeast_like(folder), "--valid-chromosomes", "chr3", "--test-chromosomes", "chr4"]
    return {
        "embed": (["genomamba", "embed", causal, str(folder / "contigs.fa"), "--both-strands"], "vectors.npz"),
        "embed masked": (["genomamba", "embed", masked, str(folder / "contigs.fa"), "--pooling", "max"], "more.npz"),
        "score-variants": (["genomamba", "score-variants", causal, *variants], None),
        "score-variants masked": (["genomamba", "score-variants", masked, *variants], None),
        "track": (["genomamba", "track", causal, *region, "--context", "64"], None),
        "track masked": (
            ["genomamba", "track", masked, *region, "--window", "32"],
            None,
        ),
        "generate": (["genomamba", "generate", causal, "--length", "12", "--records", "2", "--prompt", "ACGTT"], None),
        "perplexity": (
            ["genomamba", "perplexity", causal, *yeast, "--lengths", "64", "--bases", "256", "--no-markov"],
            None,
        ),
        "predict": (["genomamba", "predict", str(folder / "fine-tuned"), str(folder / "contigs.fa")], None),
    }


def demo_commands(folder: Path) -> Runs:
    """`genomamba demo` of small genomes, with so many steps instead of minutes."""

    def options_with_steps(**options: Any) -> SpeciesTrainingOptions:
        return SpeciesTrainingOptions(**options | {"minutes": None, "steps": 3})

    species_demo.simulate_genomes = functools.partial(  # type: ignore[attr-defined]
        species_demo.simulate_genomes, training_lengths_bp=(8_000, 8_000), holdout_lengths_bp=(8_000,)
    )
    species_demo.SpeciesTrainingOptions = options_with_steps  # type: ignore[attr-defined,misc]
    for name, value in (("TRAINING_LENGTH_BP", 512), ("EVALUATION_LENGTHS_BP", (256, 1024)), ("WINDOWS_PER_CLASS", 3)):
        setattr(species_demo, name, value)
    fitting.FITTING_WINDOWS, fitting.CHOOSING_WINDOWS = 40, 20  # type: ignore[misc]
    species_demo.CONTIG_LENGTHS_BP = (500, 2000)  # type: ignore[misc,assignment]
    species_demo.GAPPED_CONTIG_BP = 1000  # type: ignore[misc,assignment]
    return {"demo": (["genomamba", "demo", "--recipe", "tiny"], "demo")}


def waveform_model(folder: Path) -> str:
    """A folder with a model of all kinds of layers that generate."""
    from audiomamba.data.quantisers import Quantiser  # noqa: PLC0415
    from audiomamba.models import WaveformModel, save_waveform_model  # noqa: PLC0415
    from audiomamba.models.configuration import StageConfig, WaveformModelConfig  # noqa: PLC0415

    stages = (StageConfig(1, {"name": "selective", "state_size": 2}), StageConfig(1, {"name": "s4d", "state_size": 2}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WaveformModel(WaveformModelConfig(stages, 4, (2,), quantiser=Quantiser(sample_rate_hz=8000)))
    save_waveform_model(folder / "waveforms", model, details={})
    return str(folder / "waveforms")


def waveform_commands(folder: Path) -> Runs:
    """`audiomamba generate` and `evaluate`, with clips of its own and of a folder."""
    from audiomamba.models.clip_classifier import (  # noqa: PLC0415
        ClipClassifier,
        ClipClassifierConfig,
        save_clip_classifier,
    )
    from audiomamba.models.log_mel import LogMelConfig  # noqa: PLC0415
    from waveform_runs import write_tones  # noqa: PLC0415

    model = waveform_model(folder)
    sizes = {"stem_width": 2, "stage_width": 4, "blocks_per_stage": 1, "cardinality": 1, "base_width": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = ClipClassifier(ClipClassifierConfig(("0", "1"), LogMelConfig(8000, 0.1), **sizes)).eval()
    save_clip_classifier(folder / "classifier", classifier, details={})
    clips = write_tones(folder / "tones", 36, samples=200)
    for number, path in enumerate(sorted(clips.iterdir())):
        path.rename(path.with_name(f"{number % 2}_{number:02d}.wav"))
    data = ["--data", str(clips), "--label-pattern", "^([01])_", "--valid", "*_0[0-9].wav", "--test", "*_1[0-9].wav"]
    scores = ["--classifier", str(folder / "classifier"), "--resamples", "20"]
    generated = ["--clips", f"tones={clips}"]
    return {
        "generate": (["audiomamba", "generate", model, "--clips", "2", "--seconds", "0.002"], "clips"),
        "evaluate": (["audiomamba", "evaluate", model, *data], None),
        "evaluate clips": (["audiomamba", "evaluate", *data, *scores, *generated], None),
    }


def python_and_pages(folder: Path) -> dict[str, Callable[[str], str]]:
    """The same from Python, and the pages of `app`, as functions of a device."""
    species = str(write_tiny_model(folder / "species"))
    causal = str(model_folder(folder / "causal", "causal"))
    waveforms = waveform_model(folder)
    letters = bases(200).decode()

    def loaded(device: str) -> str:
        model = genomamba.load(causal, device=device)
        likelihood = model.log_likelihood(letters)
        return f"{genomamba.load(species, device=device).classify(letters).rows} {likelihood.rows}"

    def clips(device: str) -> str:
        found = audiomamba.load(waveforms, device=device).generate(clips=1, seconds=0.001)
        return f"{found.classes.tolist()} {found.log_likelihoods.tolist()}"

    def species_page(device: str) -> str:
        page = SpeciesPage(genomamba.load(species, device=device).model, 1000)
        answer = page.answer(letters, None)
        page.track(*next(iter(answer.tokens.items())))
        return answer.table.read_text()

    def clip_page(device: str) -> str:
        return str(ClipPage(audiomamba.load(waveforms, device), 1.0).generate(1, 0.001, 0, 1.0, 1.0, None).classes)

    return {"load": loaded, "load audio": clips, "species page": species_page, "clip page": clip_page}


def run(command: list[str], output: Path | None, *options: str) -> str:
    """What a command writes, as text."""
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    more = [] if output is None else ["--output", str(output)]
    sys.argv = ["", *command, "--threads", "1", *options, *more]
    with contextlib.redirect_stdout(written):
        status = pretend_device.main()
    if status:
        raise SystemExit(f"{command} {options} ended with {status}")
    text = written.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if output is None:
        return text
    if output.is_dir():
        tables = ("clips.tsv", species_demo.CLASSIFICATION_NAME, species_demo.TABLE_NAME)
        return "".join((output / name).read_text() for name in tables if (output / name).is_file())
    content = np.load(output)
    return "\n".join(f"{name} {np.asarray(content[name]).tolist()}" for name in content)


def difference(found: str, expected: str) -> float:
    """Largest difference of the numbers of two texts, relative to the largest of 1 and them; all else must be equal."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        raise SystemExit(f"{found}\nis not\n{expected}")
    both = [np.array([float(number) for number in NUMBER.findall(text)] or [0.0]) for text in (found, expected)]
    return float(np.abs(both[0] - both[1]).max() / max(1.0, np.abs(both[1]).max()))


COMMANDS = {each.__name__: each for each in (classifier_commands, language_commands, waveform_commands, demo_commands)}


def main() -> None:
    """Print how far the figures are from the CPU's."""
    group, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    if group == python_and_pages.__name__:
        for name, function in python_and_pages(folder).items():
            found[name] = [difference(function(DEVICE), function("cpu"))]
        print(json.dumps(found))
        return
    for number, (name, (command, output)) in enumerate(COMMANDS[group](folder).items()):
        places = [None if output is None else folder / f"{number}-{place}-{output}" for place in range(3)]
        expected = run(command, places[0], "--device", "cpu")
        found[name] = [difference(run(command, places[1], "--device", DEVICE), expected)]
        low = run(command, places[2], "--device", DEVICE, "--precision", "bfloat16")
        with contextlib.suppress(SystemExit):  # a call, or a sampled base, may become another
            found[name].append(difference(low, expected))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
