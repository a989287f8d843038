"""What every command has beside its own options: short names, and how much it says."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mambapipelines import VERBOSITY_VARIABLE

# One letter means the same option in every command that has it.
SHORT_NAMES = {
    "--device": "-d",
    "--genome": "-g",
    "--length": "-l",
    "--minutes": "-m",
    "--output": "-o",
    "--processes": "-p",
    "--recipe": "-R",
    "--reference": "-r",
    "--seed": "-s",
    "--steps": "-n",
    "--threads": "-t",
    "--window": "-w",
}
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors on standard error.")]
VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also print backends, time and memory, and where an error comes from."),
]


class Command(TyperCommand):
    """A command whose options have the short names of `SHORT_NAMES`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for entry in self.params:
            letters = {SHORT_NAMES[name] for name in entry.opts if name in SHORT_NAMES}
            entry.opts += sorted(letters - set(entry.opts))


class Program(typer.Typer):
    """A program or a group of commands; its commands take `--quiet` and `--verbose` wherever they stand."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:  # type: ignore[override]
        """Register a command, as `typer.Typer.command` does."""
        register = super().command(name, cls=Command, **settings)

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_verbosity(function))
            return function

        return add


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Say how much this process, and those that it starts, print.

    Raises:
        InputError: both are given.
    """
    if quiet and verbose:
        from mambapipelines.cli.options import input_error  # noqa: PLC0415

        raise input_error("--quiet and --verbose are both given: leave one of them out.")
    if quiet or verbose:
        os.environ[VERBOSITY_VARIABLE] = "quiet" if quiet else "verbose"


def is_verbose() -> bool:
    """Whether `--verbose` was given."""
    return os.environ.get(VERBOSITY_VARIABLE) == "verbose"


def _with_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with two more options."""

    @functools.wraps(function)
    def with_verbosity(*arguments: Any, quiet: bool, verbose: bool, **options: Any) -> Any:
        set_verbosity(quiet, verbose)
        return function(*arguments, **options)

    added = {"quiet": QuietOption, "verbose": VerboseOption}
    signature = inspect.signature(function)
    parameters = [
        *signature.parameters.values(),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in added.items()
        ),
    ]
    with_verbosity.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_verbosity.__annotations__ = {**function.__annotations__, **added}
    return with_verbosity
