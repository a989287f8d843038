"""The command `genomamba generate`: new DNA from a causal language model."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import LanguageModelArgument, SeedOption, ThreadsOption


def generate(
    model: LanguageModelArgument,
    length: Annotated[int, typer.Option(metavar="BP", help="New bases per record.")],
    records: Annotated[int, typer.Option(help="How many; with prompts, of each.")] = 1,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="FASTA|LETTERS", help="What to continue: each record of a file (- is stdin), or letters of DNA."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Below 1 likelier bases, above 1 rarer; 0 the likeliest.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among so many of the likeliest bases, 1 to 4.")] = 4,
    top_p: Annotated[float, typer.Option(help="Choose among the fewest bases with this much probability.")] = 1.0,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where FASTA goes.", show_default="standard output")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Sample DNA from a causal language model, as FASTA.

    Headers say the log-likelihood (natural) of the new bases under the model itself, whatever the temperature. A prompt
    is read and not repeated in the output. Record number i depends on the seed and on i alone.

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
        )
    )
