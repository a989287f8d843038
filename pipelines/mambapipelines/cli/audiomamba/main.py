"""The program `audiomamba` and its table of commands.

Commands import what they need when they run, so that `audiomamba --help` is fast.
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
    "Train models of raw audio waveforms, generate or continue clips, and evaluate them.",
    COMMANDS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: arguments without the program name; `None` uses those of the process.
    """
    return run_program(application, "audiomamba", arguments)


if __name__ == "__main__":
    sys.exit(main())
