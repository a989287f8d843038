"""The command `audiomamba`: models of raw waveforms.

Heavy modules are imported inside the commands, so that `audiomamba --help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mambapipelines.command_line import command_group, run_program, version_option

application = command_group(
    "audiomamba", "Raw waveforms: train a model on recordings, then generate new ones or continue a clip."
)


@application.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    show_version: Annotated[bool, version_option("audiomamba")] = False,
) -> None:
    """Raw waveforms: train a model on recordings, then generate new ones or continue a clip."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: without the program's name; `None` takes those of the process.
    """
    return run_program(application, "audiomamba", arguments)


if __name__ == "__main__":
    sys.exit(main())
