"""The program `audiomamba`: its table of commands.

Commands import what they need when they run, so that `audiomamba --help` answers at once.
"""

import sys
from collections.abc import Sequence

from mambapipelines.cli import doctor, report
from mambapipelines.cli.audiomamba import app, evaluate, fetch, generate, models, train, train_classifier
from mambapipelines.cli.program import program, run_program

COMMANDS = {
    "Models of waveforms": (train, generate, evaluate, train_classifier),
    "Data, runs and models": (models, fetch, report, app, doctor),
}

application = program(
    "audiomamba",
    "Train models of raw waveforms on recordings, generate clips or continue one, and score what was generated.",
    COMMANDS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: without the program's name; `None` takes those of the process.
    """
    return run_program(application, "audiomamba", arguments)


if __name__ == "__main__":
    sys.exit(main())
