"""`genomamba species-task`: the published schedule, splits, pooling and controls, on small assemblies."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from genomamba.data.assemblies import GREAT_APES, HYENA_SPECIES
from genomamba.data.assembly_genomes import load_protocol_genomes
from genomamba.models.language_model import build_language_model, save_language_model
from genomamba.models.sequence_model import load_sequence_model
from mambacore.errors import InputError
from mambapipelines.cli.genomamba.main import main
from mambapipelines.protocols.evaluate import excerpts
from mambapipelines.protocols.recipe import SpeciesProtocolRecipe, scaled_schedule
from mambapipelines.protocols.train import ProtocolPlan, SpeciesProtocolOptions, run_species_task
from mambapipelines.training.recipe import load_task_recipe
from tiny_assemblies import write_assemblies

SMALL = (
    "protocol.windows_per_step=4",
    "model.layers=1",
    "model.model_width=8",
    "model.state_size=4",
    "validation.windows_per_class=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assemblies")
    for protocol in (GREAT_APES, HYENA_SPECIES):
        write_assemblies(folder, protocol, chromosome_bp=600)
    return folder


@pytest.fixture
def options(data: Path, tmp_path: Path) -> SpeciesProtocolOptions:
    return SpeciesProtocolOptions(
        task="great-apes", data=data, length=64, output=tmp_path / "run", scale=0.001, lengths=[32, 64], per_class=6,
        baselines=["composition"], changes=SMALL, threads=1,
    )  # fmt: skip


def test_the_schedule_is_the_published_one() -> None:
    recipe = load_task_recipe(SpeciesProtocolRecipe, "great-apes")
    schedule = scaled_schedule(recipe, 1 << 20, scale=1)
    assert (schedule.steps, schedule.windows_per_step) == (10_240, 64)
    lengths = [schedule.lengths.length_at(1024 * epoch) for epoch in range(10)]
    assert lengths == [1 << power for power in (14, 15, 16, 17, 18, 19, 20, 20, 20, 20)]
    assert {scaled_schedule(recipe, 1 << 14, 1).lengths.length_at(step) for step in (0, 10_239)} == {1 << 14}
    rates = ProtocolPlan(recipe, 0, 64).schedule(schedule.steps)
    assert rates.warmup_steps == 5 * 1024
    assert abs(rates.learning_rate(5 * 1024 - 1) - 1e-4) < 1e-12
    assert abs(rates.learning_rate(10_240) - 1e-6) < 1e-12
    assert (recipe.pooling(1024), recipe.pooling(1 << 20)) == ("last", "last")
    hyena = load_task_recipe(SpeciesProtocolRecipe, "hyena-species")
    assert [hyena.pooling(length) for length in (1024, 32_768, 250_000)] == ["mean", "mean", "last"]


def test_a_scaled_schedule_says_what_share_it_is() -> None:
    recipe = load_task_recipe(SpeciesProtocolRecipe, "great-apes")
    schedule = scaled_schedule(recipe, 1 << 16, scale=0.01)
    assert schedule.describe() == "100 steps of 64 windows, 0.98% of the recipe's 10,240 steps"
    assert [schedule.lengths.length_at(step) for step in (0, 9, 10, 20, 99)] == [
        1 << 14,
        1 << 14,
        1 << 15,
        *[1 << 16] * 2,
    ]


@pytest.mark.parametrize("task", ["great-apes", "hyena-species"])
def test_a_run_trains_tests_and_stands_beside_the_controls(
    task: str, options: SpeciesProtocolOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["species-task", task, "--data", str(options.data), "--length", "64", "--output", str(options.output)]
    arguments += ["--scale", "0.001", "--lengths", "32,64", "--per-class", "6", "--baseline", "composition"]
    arguments += ["--threads", "1", *(part for change in SMALL for part in ("--set", change))]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out), delimiter="\t"))
    assert [(row["length"], row["classifier"]) for row in rows] == [
        (length, name) for length in ("32", "64") for name in ("genomamba", "composition")
    ]
    assert all(row["windows"] == "30" for row in rows)
    assert "10 steps of 4 windows, 0.10% of the recipe's 10,240 steps" in captured.err
    model, details = load_sequence_model(options.output)
    assert model.config.pooling == ("last" if task == "great-apes" else "mean")
    protocol = GREAT_APES if task == "great-apes" else HYENA_SPECIES
    assert model.config.targets.class_names == protocol.class_names
    assert details["assemblies"][protocol.class_names[1]] == protocol.assemblies[1].accession
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out == captured.out


def test_training_can_start_from_a_pretrained_model(options: SpeciesProtocolOptions, tmp_path: Path) -> None:
    core = build_language_model("causal", {"model_width": 8, "mixers": ["selective"]})
    save_language_model(tmp_path / "pretrained", core, {})
    start = str(tmp_path / "pretrained")
    run_species_task(replace(options, start_from=start, changes=SMALL[:1], baselines=()))
    assert load_sequence_model(options.output)[1]["start_from"] == start


def test_controls_see_no_more_than_their_share_from_the_middle(data: Path) -> None:
    training = load_protocol_genomes(GREAT_APES, data).train
    human = len(training.sequences_of("human"))
    small = excerpts(training, 100 * human)
    whole, part = (collection.sequences_of("human")[0] for collection in (training, small))
    assert part.length == 100
    assert (part.tokens(3, 90) == whole.tokens(253, 340)).all()
    assert {sequence.name for sequence in small.sequences} == {sequence.name for sequence in training.sequences}


def test_mistakes_are_named(options: SpeciesProtocolOptions, tmp_path: Path) -> None:
    for changed, sentence in (
        ({"task": "apes"}, "no species task 'apes'"),
        ({"data": tmp_path}, r"hg38.fa.gz and 4 more"),
        ({"scale": 0.0}, r"--scale is 0.0"),
        ({"length": 1000}, r"no training sequence of 1000 bp, its longest has 600"),
        ({"baselines": ["best"]}, r"no baseline 'best'"),
    ):
        with pytest.raises(InputError, match=sentence):
            run_species_task(replace(options, **changed))
        assert not options.output.exists()
