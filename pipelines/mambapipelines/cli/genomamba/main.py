"""The program `genomamba` and its table of commands.

Commands import what they need when they run, so that `genomamba --help` is fast.
"""

import sys
from collections.abc import Sequence

from mambapipelines.cli import doctor, report
from mambapipelines.cli.genomamba import (
    app,
    classify,
    demo,
    embed,
    evaluate,
    fetch,
    finetune,
    generate,
    intervals,
    models,
    perplexity,
    predict,
    pretrain,
    score_variants,
    share,
    species_task,
    track,
    train,
)
from mambapipelines.cli.program import program, run_program

COMMANDS = {
    "Classify sequences by species": (train, classify, evaluate, demo, species_task),
    "DNA language models": (pretrain, perplexity, embed, score_variants, generate, track),
    "Predict labels of sequences": (finetune, predict),
    "Data, runs and models": (models, fetch, intervals, report, app, share, doctor),
}

application = program(
    "genomamba",
    "Classify DNA by species, pretrain and fine-tune DNA language models, and score, embed and generate sequences.",
    COMMANDS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: arguments without the program name; `None` uses those of the process.
    """
    return run_program(application, "genomamba", arguments)


if __name__ == "__main__":
    sys.exit(main())
