"""What the commands of `genomamba` and `audiomamba` share: exit codes, one-line errors, quiet ends, common options.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from genomamba.data.genomes import GenomeSpecification

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 done; 2 wrong input or options, one line on standard error says what; 130 interrupted; "
    "143 ended by SIGTERM, training saved."
)
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}

ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe: model.layers=8. Repeatable."),
]
PrintRecipeOption = Annotated[
    bool, typer.Option("--print-recipe", help="Print the recipe, every value filled in, and leave.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, to the same numbers.")]
MinutesOption = Annotated[
    float | None, typer.Option(help="Time for the whole run, instead of --steps.", show_default="the recipe's")
]
StepsOption = Annotated[int | None, typer.Option(help="Number of optimiser steps, instead of --minutes.")]
StrategyOption = Annotated[
    str,
    typer.Option(
        metavar="single|ddp|fsdp",
        help="How the processes that torchrun or SLURM started share the work: ddp divides the rows of a step, fsdp "
        "the parameters and the optimiser's state as well.",
    ),
]
ContextRanksOption = Annotated[int, typer.Option(min=1, help="Processes that share each sequence, with ddp or fsdp.")]
RunFolderOption = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Folder for the model and the state of the run.")
]

GenomeOption = Annotated[
    list[str],
    typer.Option(
        "--genome", metavar="NAME=PATH[,PATH...]", help="A class and its FASTA files, plain or gzipped; once per class."
    ),
]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder written by `genomamba train`, or hf://owner/name@revision.")
]


class Commands(TyperGroup):
    """The commands, ending quietly when whoever reads their output has gone, and in one line on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python would flush standard output once more at the end and complain about the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            print(f"{ctx.info_name}: interrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        return result


def command_group(name: str, help_text: str) -> typer.Typer:
    """A program with the habits of this project, or a part of one.

    Args:
        name: of the program. A part has the name "" where its commands stand among the program's own once it is added
            with `add_typer`, and else the name that stands before its commands.
        help_text: what it is for.
    """
    return typer.Typer(
        name=name,
        cls=Commands,
        help=help_text,
        epilog=EXIT_CODES,
        no_args_is_help=False,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=CONTEXT_SETTINGS,
    )


def version_option(program: str) -> Any:
    """The option `--version` of a program."""

    def print_version(wanted: bool) -> None:
        if not wanted:
            return
        try:
            print(f"{program} {version('genomamba')}")
        except PackageNotFoundError:
            print(f"{program}, not installed and therefore of unknown version")
        raise typer.Exit

    return typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave.")


def run_program(application: Callable[..., Any], program: str, arguments: Sequence[str] | None) -> int:
    """Run a command line; returns the exit code.

    Args:
        application: the program's commands.
        program: its name, which begins its messages.
        arguments: without the program's name; `None` takes those of the process.
    """
    try:
        application(args=None if arguments is None else list(arguments), prog_name=program)
    except ValueError as error:
        from mambacore.errors import InputError  # noqa: PLC0415

        if not isinstance(error, InputError):
            raise
        sentence = " ".join(str(error).split())
        print(f"{program}: error: {sentence}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def input_error(sentence: str) -> ValueError:
    """An `InputError`, without importing its package before it is needed."""
    from mambacore.errors import InputError  # noqa: PLC0415

    return InputError(sentence)


def entries(text: str, option: str) -> list[str]:
    """The entries of an option's value, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise input_error(f"{option} '{text}' has an empty entry: separate entries by single commas.")
    return parts


def whole_number(text: str, option: str, unit: str = "bases") -> int:
    """A number in an option's value."""
    try:
        return int(text)
    except ValueError:
        raise input_error(f"{option} has '{text}', which is no whole number: write numbers of {unit}.") from None


def genome_specifications(options: Sequence[str]) -> "list[GenomeSpecification]":
    """What `--genome` options say."""
    from genomamba.data.genomes import parse_genome_option  # noqa: PLC0415

    return [parse_genome_option(option) for option in options]
