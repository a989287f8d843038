"""The command `genomamba generate`: new DNA from a causal language model."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    InferencePrecisionOption,
    LanguageModelArgument,
    SeedOption,
    ThreadsOption,
)


def generate(
    model: LanguageModelArgument,
    length: Annotated[int, typer.Option(metavar="BP", help="New bases per record.")],
    records: Annotated[int, typer.Option(help="Number of records, or of records per prompt.")] = 1,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="FASTA|LETTERS", help="Continue each record of a file (- is stdin), or a given sequence."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most probable base.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among the K most probable bases, 1 to 4.")] = 4,
    top_p: Annotated[
        float, typer.Option(help="Sample among the fewest bases whose probabilities add up to P (nucleus sampling).")
    ] = 1.0,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="FASTA file to write.", show_default="standard output"),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Sample DNA from a causal language model, as FASTA.

    Headers give the log-likelihood (in nats) of the new bases under the model at temperature 1. The prompt is not
    part of the output. Record i depends only on the seed and on i.

    **Examples**

    `genomamba generate model --records 10 --length 2000 --seed 1 --output new.fa`

    `genomamba generate model --prompt TATAAAAGGC --length 500 --temperature 0.8 --top-p 0.95`
    """
    from genomamba.scoring.generation import Sampling  # noqa: PLC0415
    from mambapipelines.language.generate import GenerationOptions, run_generation  # noqa: PLC0415

    run_generation(
        GenerationOptions(
            model=model,
            records=records,
            length=length,
            prompt=prompt,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            output=output,
            threads=threads,
            device=device,
            precision=precision,
        )
    )
