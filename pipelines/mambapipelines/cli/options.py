"""Options shared by several commands, and parsing of their values.

Heavy modules are imported inside the functions, so that `--help` is fast.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambapipelines import LARGEST_SEED, MOST_THREADS

if TYPE_CHECKING:
    from genomamba.data.genomes import GenomeSpecification

ThreadsOption = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, max=MOST_THREADS, help="CPU threads.", show_default="all cores")
]
SUGGESTED = "what the model suggests, else 1"
"""Default of the settings of sampling that are stored with a waveform model."""

SeedOption = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed; the same seed gives the same result.")]

DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="Device; auto is a CUDA GPU of capability 8.0 or above, else the CPU.",
    ),
]
InferencePrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|float32|bfloat16",
        help="Precision of the linear layers; auto is bfloat16 if the device supports it natively.",
    ),
]

# Training runs.
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|float32|bfloat16", help="Precision of the linear layers in training.", show_default="the recipe's"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe: model.layers=8. Repeatable."),
]
PrintRecipeOption = Annotated[
    bool, typer.Option("--print-recipe", help="Print the complete recipe, defaults included, and exit.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume the run in DIR, with identical results.")]
MinutesOption = Annotated[
    float | None, typer.Option(help="Time limit of the whole run, instead of --steps.", show_default="the recipe's")
]
StepsOption = Annotated[int | None, typer.Option(help="Number of optimiser steps, instead of --minutes.")]
StrategyOption = Annotated[
    str,
    typer.Option(
        metavar="single|ddp|fsdp",
        help="Distribution over processes started by torchrun or SLURM: ddp splits each batch, fsdp also shards the "
        "parameters and the optimiser state.",
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="On a GPU: use operators that give the same bits every time, and warn of those that do not.",
    ),
]
ContextRanksOption = Annotated[
    int, typer.Option(min=1, help="Processes that share each sequence (context parallelism), with ddp or fsdp.")
]
RunFolderOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the model and the state of the run.")
]

# Models and genomes.
ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder written by `genomamba train`, name of a shipped model, or hf://owner/name@revision.",
    ),
]
LanguageModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of a language model, name of a shipped one, or hf://owner/name@revision."
    ),
]
PretrainedOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="MODEL",
        help="Start from a pretrained language model: a folder, a shipped name, or hf://owner/name@revision.",
        show_default="from scratch",
    ),
]
GenomeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--genome",
        metavar="NAME=PATH[,PATH...]",
        help="A class and its FASTA files, folders or patterns; once per class.",
    ),
]
GenomeListOption = Annotated[
    list[str] | None,
    typer.Option(
        "--genomes",
        metavar="LIST|DIR",
        help="Classes as a list (name, tab, path), or as a folder with a subfolder or a file per class.",
    ),
]
GenomesOption = Annotated[
    list[str],
    typer.Option(
        "--reference", metavar="FASTA", help="A genome, plain or compressed with bgzip; indexed once. Repeatable."
    ),
]
IntervalsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Rows of chromosome, start, end and split without a header; - is stdin."),
]
ValidChromosomesOption = Annotated[
    list[str] | None,
    typer.Option(metavar="CHR[,CHR...]", help="Without --intervals: validation chromosomes, of every reference."),
]
TestChromosomesOption = Annotated[list[str] | None, typer.Option(metavar="CHR[,CHR...]", help="Test chromosomes.")]
RecordsOption = Annotated[
    str | None, typer.Option(metavar="FASTA", help="FASTA file of the records named in the table's column `record`.")
]
IntervalReferenceOption = Annotated[
    str | None,
    typer.Option(metavar="FASTA", help="Genome that the table's columns chrom, start, end (0-based) refer to."),
]
BaselineOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="kmer (canonical k-mers and logistic regression), markov (likelihoods), composition (GC and N counts "
        "only) or none. Repeatable.",
        show_default="all three",
    ),
]

# Clips.
LabelPatternOption = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Regular expression whose first group is the label in a file name: '^([0-9])_'.",
        show_default="the name of the clip's folder",
    ),
]
ValidPatternOption = Annotated[str | None, typer.Option(metavar="PATTERN", help="Validation clips: '*_1[0-4].wav'.")]
TestPatternOption = Annotated[
    str | None,
    typer.Option("--test", "--test-pattern", metavar="PATTERN", help="Test clips: '*_[5-9].wav'."),
]
WordsOption = Annotated[
    str | None, typer.Option(metavar="WORD[,WORD...]", help="Use only clips with these labels.", show_default="all")
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Report files that cannot be read, and continue.")]

# Downloads.
FetchOutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Folder for the data.", show_default="the set's name"),
]
MirrorOption = Annotated[
    list[str] | None,
    typer.Option("--mirror", metavar="URL", help="URL of a folder with the same files, tried first. Repeatable."),
]
ListOption = Annotated[bool, typer.Option("--list", help="List the files and their URLs without downloading.")]
KeepArchivesOption = Annotated[
    bool, typer.Option("--keep-archives", help="Keep downloaded archives after unpacking them.")
]

# Local pages.
HostOption = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 127.0.0.1 is this machine only.")
]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 selects a free one.")]
LargestUploadOption = Annotated[
    float, typer.Option("--largest-upload", metavar="MB", help="Reject larger files, in megabytes.")
]


def input_error(sentence: str) -> ValueError:
    """Return an `InputError`, importing its package only when needed."""
    from mambacore.errors import InputError  # noqa: PLC0415

    return InputError(sentence)


def entries(text: str, option: str) -> list[str]:
    """Split an option's value at commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise input_error(f"{option} '{text}' has an empty entry: separate entries by single commas.")
    return parts


def names(values: Sequence[str] | None, option: str) -> list[str]:
    """Return the distinct names of a repeatable option with comma-separated values."""
    return list(dict.fromkeys(name for value in values or () for name in entries(value, option)))


def integer(text: str, option: str, unit: str = "bases") -> int:
    """Parse an integer in an option's value."""
    try:
        return int(text)
    except ValueError:
        raise input_error(f"{option} has '{text}', which is not an integer: give numbers of {unit}.") from None


def genome_specifications(
    options: Sequence[str] | None, lists: Sequence[str] | None = None
) -> "list[GenomeSpecification]":
    """Return the classes and files of `--genome` and `--genomes` options."""
    from genomamba.data.genome_lists import parse_genome_option, read_genome_list, refuse_shared_files  # noqa: PLC0415

    found = [parse_genome_option(option) for option in options or ()]
    for path in lists or ():
        found += read_genome_list(path)
    refuse_shared_files(found)
    return found


def required_genomes(options: Sequence[str] | None, lists: Sequence[str] | None) -> "list[GenomeSpecification]":
    """As `genome_specifications`, for a command that requires genomes."""
    found = genome_specifications(options, lists)
    if not found:
        raise input_error("no genome is given: add --genome NAME=PATH for each class, or --genomes LIST.")
    return found


def baseline_names(chosen: Sequence[str] | None) -> list[str]:
    """Return the baselines of `--baseline` options: by default all, and none for `none`."""
    from genomamba.baselines import BASELINE_NAMES  # noqa: PLC0415

    distinct = list(dict.fromkeys(chosen or BASELINE_NAMES))
    if "none" in distinct and len(distinct) > 1:
        raise input_error("--baseline none is given along with other baselines: remove one of them.")
    return [name for name in distinct if name != "none"]


def check_largest_upload(megabytes: float) -> None:
    """Check that an upload limit is positive."""
    if not megabytes > 0:
        raise input_error(f"--largest-upload is {megabytes}: give a size in megabytes above 0.")
