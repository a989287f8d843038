"""Conventions of all commands: short option names and verbosity."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mambapipelines import VERBOSITY_VARIABLE

# A letter stands for the same option in every command.
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
    typer.Option("--verbose", "-v", help="Also print backends, time, memory, and the origin of an error."),
]


class Command(TyperCommand):
    """A command whose options have the short names of `SHORT_NAMES`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for entry in self.params:
            letters = {SHORT_NAMES[name] for name in entry.opts if name in SHORT_NAMES}
            entry.opts += sorted(letters - set(entry.opts))


class Program(typer.Typer):
    """A program or a group of commands, all of which accept `--quiet` and `--verbose` in any position."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:  # type: ignore[override]
        """Register a command, like `typer.Typer.command`."""
        register = super().command(name, cls=Command, **settings)

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_verbosity(function))
            return function

        return add


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Set the verbosity of this process and those that it starts.

    Raises:
        InputError: if both are given.
    """
    if quiet and verbose:
        from mambapipelines.cli.options import input_error  # noqa: PLC0415

        raise input_error("--quiet and --verbose are both given: give only one of them.")
    if quiet or verbose:
        os.environ[VERBOSITY_VARIABLE] = "quiet" if quiet else "verbose"


def is_verbose() -> bool:
    """Whether `--verbose` was given."""
    return os.environ.get(VERBOSITY_VARIABLE) == "verbose"


def _with_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the two options to `function`."""

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
