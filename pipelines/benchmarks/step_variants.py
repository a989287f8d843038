"""Whether torch.compile or bfloat16 make a training step shorter: forward and backward of one micro-batch, in turn.

python pipelines/benchmarks/step_variants.py
python pipelines/benchmarks/step_variants.py --rounds 20 --threads 2 --models demo --steps bfloat16

Every round takes one step of each variant, so that what else the machine does weighs on all of them alike; the ratio is
the median over the rounds of a variant's time divided by that of the plain step in the same round. The time that
torch.compile takes for the first step is given by itself and counts in no ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn import functional as F

from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig
from mambacore.benchmarking import machine, print_table
from mambapipelines.language.recipe import PretrainingRecipe
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.training.recipe import load_task_recipe

CLASSES = tuple("abcde")
Loss = Callable[[Tensor, Tensor], Tensor]


def demo_model() -> tuple[torch.nn.Module, Loss, Tensor, Tensor]:
    """The demo's classifier, its loss, and a micro-batch of windows of 4,096 bp with their labels."""
    recipe = load_task_recipe(SpeciesRecipe, "demo")
    model = SpeciesClassifier(SpeciesClassifierConfig.from_dict({"class_names": list(CLASSES), **recipe.model}))
    rows = recipe.batch.windows_per_micro_batch(4096)
    tokens = torch.randint(7, 11, (rows, 4096))
    return model, lambda tokens, labels: model.loss(tokens, labels)["loss"], tokens, torch.arange(rows) % len(CLASSES)


def pretraining_model() -> tuple[torch.nn.Module, Loss, Tensor, Tensor]:
    """The causal model of the recipe `small`, its loss, and a micro-batch of windows of 8,192 bp and what follows."""
    recipe = load_task_recipe(PretrainingRecipe, "small")
    model = recipe.build_model()
    tokens = torch.randint(7, 11, (recipe.batch.windows_per_micro_batch(8192), 8192))

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    return model, loss, tokens, tokens.roll(-1, 1)


MODELS = {"demo": demo_model, "pretraining": pretraining_model}


def step_seconds(model: torch.nn.Module, loss: Loss, tokens: Tensor, targets: Tensor, bfloat16: bool) -> float:
    """Forward and backward once."""
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
        value = loss(tokens, targets)
    value.backward()
    return time.perf_counter() - begin


def main() -> None:
    """Time the variants and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", nargs="+", choices=("bfloat16", "compiled"), default=["bfloat16", "compiled"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for name in arguments.models:
        model, loss, tokens, targets = MODELS[name]()
        compiled = torch.compile(loss)
        variants: dict[str, Callable[[], float]] = {
            "plain": lambda: step_seconds(model, loss, tokens, targets, False),  # noqa: B023 - used before the next
            "bfloat16": lambda: step_seconds(model, loss, tokens, targets, True),  # noqa: B023
            "compiled": lambda: step_seconds(model, compiled, tokens, targets, False),  # noqa: B023
        }
        variants = {variant: run for variant, run in variants.items() if variant in ("plain", *arguments.steps)}
        first: dict[str, float] = {}
        for variant, run in list(variants.items()):
            begin = time.perf_counter()
            try:
                run()
            except InductorError as error:
                del variants[variant]
                failure = next((line for line in str(error).splitlines() if " error: " in line), str(error)[:200])
                print(f"{name}, {variant}: torch.compile fails: {failure.partition(' error: ')[2]}")
            first[variant] = time.perf_counter() - begin
        rounds = [{variant: run() for variant, run in variants.items()} for _ in range(arguments.rounds)]
        for variant in variants:
            seconds = statistics.median(times[variant] for times in rounds)
            ratio = statistics.median(times[variant] / times["plain"] for times in rounds)
            rows.append([name, variant, f"{1e3 * seconds:.0f}", f"{ratio:.2f}", f"{first[variant]:.1f}"])
    print(f"{machine()}; {arguments.rounds} rounds\n")
    print_table(["model", "step", "milliseconds", "of the plain step", "first step, seconds"], rows)


if __name__ == "__main__":
    main()
