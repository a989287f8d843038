"""What the training loop costs beside a bare loop: the same model, batches and optimiser, a step of each in turn.

python pipelines/benchmarks/training_overhead.py
python pipelines/benchmarks/training_overhead.py --steps 40 --threads 2

The bare loop zeroes gradients, goes forward and backward, clips, and takes the AdamW step. The road does all it does in
a run: Lightning's loop, the learning rate, the checks, the metrics, the progress. Batches are drawn beforehand, so that
both are given the same ones for nothing. Medians of the steps; the overhead is that of the medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig
from mambacore.benchmarking import machine, print_table
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.species.train import SpeciesTrainingOptions
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.run import TrainingRun
from mambapipelines.training.state import RunFolder
from mambapipelines.training.task import Batch, TrainingTask

CLASSES = tuple("abcde")


class Plan(RunPlan):
    """Nothing but steps."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @property
    def validation_steps(self) -> float:
        """There is no validation."""
        return 0.0


class BesideBareLoop(TrainingTask):
    """The road's task; between two of its steps a bare loop takes one, and both are timed.

    A step of the road ends where the next batch is asked for, which the data loader does one step ahead: what lies
    between two calls of `batch`, less the bare step within, is one whole step of the road.
    """

    def __init__(self, recipe: Any, length: int, rows: int) -> None:
        torch.manual_seed(0)
        config = SpeciesClassifierConfig.from_dict({"class_names": list(CLASSES), **recipe.model})
        self.model: nn.Module = SpeciesClassifier(config)
        self.bare = SpeciesClassifier(config)
        self.optimizer = torch.optim.AdamW(self.bare.parameter_groups(0.05), lr=1e-3)
        self.tokens = torch.randint(5, 9, (rows, length), dtype=torch.uint8)
        self.labels = torch.arange(rows) % len(CLASSES)
        self.bare_seconds: list[float] = []
        self.road_seconds: list[float] = []
        self._end: float | None = None

    def batch(self, step: int) -> Batch:
        """The same windows every time."""
        begin = time.perf_counter()
        if self._end is not None:
            self.road_seconds.append(begin - self._end)
        self.optimizer.zero_grad(set_to_none=True)
        self.bare.loss(self.tokens, self.labels)["loss"].backward()
        nn.utils.clip_grad_norm_(self.bare.parameters(), 1.0)
        self.optimizer.step()
        self._end = time.perf_counter()
        self.bare_seconds.append(self._end - begin)
        return self.tokens, self.labels

    def rows_per_micro_batch(self, length: int) -> int:
        """All at once, as in the bare loop."""
        return len(self.tokens)

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """The classifier's."""
        assert isinstance(replica, SpeciesClassifier)
        return replica.loss(*micro_batch)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The classifier's."""
        assert isinstance(self.model, SpeciesClassifier)
        return self.model.parameter_groups(weight_decay)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**14)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_task_recipe(SpeciesRecipe, "demo", ["precision=float32"])
    task = BesideBareLoop(recipe, arguments.length, arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        options = SpeciesTrainingOptions([], arguments.length, output, steps=arguments.steps)
        progress = TrainingProgress(Console(quiet=True))
        run_folder = RunFolder(
            output / "training", ("step", "loss", "learning_rate", "positions_per_second", "seconds")
        )
        TrainingRun(options, recipe, run_folder, task, Plan(recipe), {}, progress, time.monotonic()).train(None)
    # The first steps start threads and save the first state.
    bare, road = (statistics.median(seconds[4:]) for seconds in (task.bare_seconds, task.road_seconds))
    print(f"{machine()}; demo model, {arguments.rows} windows of {arguments.length} bp, {arguments.steps} steps\n")
    header = ["loop", "milliseconds per step", "overhead"]
    rows = [["bare", f"{1e3 * bare:.1f}", ""], ["road", f"{1e3 * road:.1f}", f"{100 * (road / bare - 1):+.1f} %"]]
    print_table(header, rows)


if __name__ == "__main__":
    main()
