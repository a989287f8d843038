"""Training: what a run leaves behind, how long it takes, and which mistakes it refuses."""

import csv
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from genomamba.data.genomes import GenomeSpecification, load_genomes
from genomamba.models.species_classifier import load_classifier
from mambacore.errors import InputError
from mambapipelines.console import format_duration
from mambapipelines.species.evaluate import EvaluationOptions, evaluate_species_classifier
from mambapipelines.species.plan import MOST_PASSES, SpeciesPlan, steps_of_passes
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.species.task import SpeciesTask
from mambapipelines.species.train import SpeciesTrainingOptions, hold_out, train_species_classifier
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.recorder import metrics_columns
from mambapipelines.training.state import Schedule

CHROMOSOME_BP = 6000


def write_genomes(folder: Path) -> list[GenomeSpecification]:
    """Two species that differ in their composition, three chromosomes each."""
    random = np.random.default_rng(11)
    specifications = []
    for name, probabilities in (("at", [0.4, 0.1, 0.1, 0.4]), ("gc", [0.1, 0.4, 0.4, 0.1])):
        path = folder / f"{name}.fa"
        records = [
            f">{chromosome}\n{''.join(random.choice(list('ACGT'), CHROMOSOME_BP, p=probabilities))}\n"
            for chromosome in ("chrI", "chrII", "chrIII")
        ]
        path.write_text("".join(records), encoding="ascii")
        specifications.append(GenomeSpecification(name, (str(path),)))
    return specifications


@pytest.fixture(scope="module")
def genomes(tmp_path_factory: pytest.TempPathFactory) -> list[GenomeSpecification]:
    return write_genomes(tmp_path_factory.mktemp("genomes"))


@pytest.fixture
def options(genomes: list[GenomeSpecification], tmp_path: Path) -> SpeciesTrainingOptions:
    return SpeciesTrainingOptions(
        genomes=genomes,
        length=256,
        output=tmp_path / "model",
        holdout=["chrIII"],
        steps=25,
        recipe="tiny",
        threads=1,
    )


def metrics_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_learns_calibrates_and_leaves_a_model_and_its_metrics(
    options: SpeciesTrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    working_folder = tmp_path / "here"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train_species_classifier(options)
    assert result.steps == 25 and not result.already_finished
    assert result.held_out_accuracy is not None and result.held_out_accuracy >= 0.9

    model, details = load_classifier(options.output)
    assert model.config.class_names == ("at", "gc")
    assert details["holdout"] == ["chrIII"]
    assert details["calibrated"] is True and details["calibration"] == result.calibration
    assert details["steps"] == 25 and details["seed"] == 0 and details["training_length"] == 256
    assert [entry["class"] for entry in details["manifest"]] == ["at", "gc"]
    assert model.confidence_intercept.item() == pytest.approx(details["calibration"]["intercept"])

    rows = metrics_of(result.metrics_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 26))
    assert tuple(rows[0]) == metrics_columns(SpeciesTask)
    assert all(float(row["loss"]) > 0 and float(row["bases_per_second"]) > 0 for row in rows)
    assert rows[-1]["held_out_accuracy"] == f"{result.held_out_accuracy:.4f}"

    printed = capfd.readouterr()
    assert printed.out == ""
    assert "step 25/25" in printed.err and "calibration error" in printed.err
    for noise in ("Lightning", "GPU available", "Trainer", "arning"):
        assert noise not in printed.err
    assert list(working_folder.iterdir()) == []
    assert sorted(entry.name for entry in options.output.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "report.html",
        "training",
    ]


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    options: SpeciesTrainingOptions, tmp_path: Path
) -> None:
    tensors = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        global_state = torch.get_rng_state()
        train_species_classifier(replace(options, output=tmp_path / name, seed=seed, steps=3))
        tensors.append(load_classifier(tmp_path / name)[0].state_dict())
        if seed == 3:
            torch.rand(1)  # nothing may depend on the global generator
        assert name != "first" or not torch.equal(torch.get_rng_state(), global_state)
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    assert any(not torch.equal(tensor, tensors[2][key]) for key, tensor in tensors[0].items())


def test_without_holdout_there_is_no_accuracy_and_the_model_says_it_is_not_calibrated(
    options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train_species_classifier(replace(options, holdout=[], holdout_fraction=0, steps=2))
    assert result.held_out_accuracy is None and result.calibration is None
    details = load_classifier(options.output)[1]
    assert details["calibrated"] is False and details["held_out_accuracy"] is None
    assert "not calibrated" in capfd.readouterr().err


def test_by_default_a_share_is_held_out_calibrates_and_is_what_is_judged_on(
    genomes: list[GenomeSpecification], options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    """With counted parts, which the table shows beside the whole."""
    changes = ["parts.markov=true", "parts.kmer=true", "parts.markov_order=2"]
    result = train_species_classifier(replace(options, holdout=[], steps=2, changes=changes))
    messages = capfd.readouterr().err
    assert "held out" in messages and "counted parts (markov, kmer)" in messages
    assert result.calibration is not None
    model, details = load_classifier(options.output)
    assert model.combination is not None and details["parts"]["cross_validated_accuracy"]["combined"]
    rows = evaluate_species_classifier(
        EvaluationOptions(options.output, (), lengths=[256, 1024], baselines=["composition"], threads=1)
    )
    by_name = {row.classifier: row.accuracy for row in rows if row.length == 1024}
    assert set(by_name) == {"genomamba", "part:stack", "part:markov", "part:kmer", "part:words", "composition"}
    # After two steps the stack knows nothing; the genomes differ in their composition.
    assert by_name["genomamba"] >= 0.95 and by_name["part:markov"] >= 0.95
    held_out = {(name, start, end) for _, _, name, _, start, end in details["stretches"]["held_out"]}
    trained = {(name, start, end) for _, _, name, _, start, end in details["stretches"]["training"]}
    assert (
        held_out
        and trained
        and not {
            1
            for name, start, end in held_out
            for other, first, last in trained
            if name == other and start < last and first < end
        }
    )
    assert "slightly optimistic" in capfd.readouterr().err


def test_held_out_sequences_shorter_than_a_window_still_calibrate_at_their_own_lengths(
    genomes: list[GenomeSpecification],
    options: SpeciesTrainingOptions,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    longer = []
    for genome in genomes:
        path = tmp_path / f"{genome.name}.fa"
        path.write_text(Path(genome.paths[0]).read_text(encoding="ascii") + ">short\n" + "ACGGT" * 300 + "\n")
        longer.append(GenomeSpecification(genome.name, (str(path),)))
    result = train_species_classifier(replace(options, genomes=longer, holdout=["short"], length=2048, steps=2))
    assert result.held_out_accuracy is None
    assert result.calibration is not None and list(result.calibration["windows_by_length"]) == ["1024"]
    assert "no held-out accuracy" in capfd.readouterr().err


def test_a_draft_in_short_contigs_is_calibrated_at_short_lengths(
    options: SpeciesTrainingOptions, tmp_path: Path
) -> None:
    random = np.random.default_rng(4)
    drafts = []
    for name, probabilities in (("at", [0.4, 0.1, 0.1, 0.4]), ("gc", [0.1, 0.4, 0.4, 0.1])):
        path = tmp_path / f"{name}-draft.fa"
        contigs = ("".join(random.choice(list("ACGT"), random.integers(520, 900), p=probabilities)) for _ in range(60))
        path.write_text("".join(f">{number}\n{contig}\n" for number, contig in enumerate(contigs)), encoding="ascii")
        drafts.append(GenomeSpecification(name, (str(path),)))
    result = train_species_classifier(replace(options, genomes=drafts, holdout=[], length=2048, steps=2))
    assert result.calibration is not None and list(result.calibration["windows_by_length"]) == ["256", "512"]


def test_minutes_fix_the_number_of_steps_and_are_kept(options: SpeciesTrainingOptions) -> None:
    result = train_species_classifier(replace(options, steps=None, minutes=0.06))
    state_file = next(options.output.glob("training/step-*/state.json"))
    schedule = Schedule(**json.loads(state_file.read_text(encoding="utf-8"))["schedule"])
    assert schedule.total_steps == result.steps > schedule.measured_steps > 0
    # A shared machine may stall in such a short run; what must not happen is that nobody looked at the clock.
    assert result.seconds < 10 * 60 * 0.06
    rates = np.array([float(row["learning_rate"]) for row in metrics_of(result.metrics_path)])
    # The time is planned again on the way: rates from there on are those of the recorded schedule, without a jump.
    planned = [schedule.learning_rate(step) for step in range(result.steps)]
    assert rates[schedule.replanned_step :] == pytest.approx(planned[schedule.replanned_step :], rel=1e-4)
    assert rates[: schedule.measured_steps] == pytest.approx(planned[: schedule.measured_steps], rel=1e-4)
    assert (np.diff(rates[schedule.warmup_steps :]) <= 0).all()


@pytest.mark.parametrize("measured_steps", [0, 12])
def test_the_learning_rate_warms_up_and_decays_without_jumps(measured_steps: int) -> None:
    schedule = Schedule(
        peak_learning_rate=1.0, warmup_steps=50, total_steps=1000, final_fraction=0.1, measured_steps=measured_steps
    )
    rates = np.array([schedule.learning_rate(step) for step in range(1000)])
    assert rates[49] == rates.max() == 1.0
    assert (np.diff(rates[:50]) > 0).all() and (np.diff(rates[50:]) < 0).all()
    assert np.abs(np.diff(rates)).max() < 0.03
    assert 0.1 < rates[-1] < 0.101


def test_a_loss_that_stops_being_finite_is_reported_and_the_last_good_state_is_kept(
    options: SpeciesTrainingOptions, tmp_path: Path
) -> None:
    recipe = tmp_path / "wild.yaml"
    recipe.write_text("model: {model_width: 8, layers: 1}\noptimizer: {learning_rate: 1e+30}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"at step \d+: the last good state is kept"):
        train_species_classifier(replace(options, recipe=str(recipe)))
    assert (options.output / "training" / "current.json").is_file()
    assert not (options.output / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"length": 0}, "--length is 0"),
        ({"minutes": 1.0}, "--minutes and --steps are both given"),
        ({"steps": None, "minutes": 0.0}, "--minutes is 0"),
        ({"steps": None, "minutes": float("nan")}, "--minutes is nan"),
        ({"steps": 0}, "--steps is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"recipe": "huge"}, "no recipe and no file named 'huge'"),
        ({"holdout": ["chrIX"]}, "chrIX"),
        ({"holdout": ["chrI", "chrII", "chrIII"]}, "no sequences left"),
        ({"holdout": ["chrI"], "holdout_fraction": 0.1}, "both given"),
        ({"holdout": [], "holdout_fraction": 0.9}, "0.9"),
        ({"groups": Path("no-such-file.tsv")}, "no-such-file"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_in_the_options_are_named_and_leave_nothing_behind(
    options: SpeciesTrainingOptions, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        train_species_classifier(replace(options, **changes))
    assert not options.output.exists()


def test_one_class_is_not_enough(options: SpeciesTrainingOptions) -> None:
    with pytest.raises(InputError, match="at least two classes"):
        train_species_classifier(replace(options, genomes=options.genomes[:1]))


def test_what_is_already_in_the_output_folder_is_never_overwritten(
    options: SpeciesTrainingOptions, tmp_path: Path
) -> None:
    notes = options.output / "README.md"
    options.output.mkdir()
    notes.write_text("mine", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(InputError, match="not empty"):
            train_species_classifier(replace(options, resume=resume))
    assert notes.read_text(encoding="utf-8") == "mine"
    with pytest.raises(InputError, match="is a file"):
        train_species_classifier(replace(options, output=notes))
    (options.output / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="holds a model"):
        train_species_classifier(replace(options, resume=True))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_accuracy_and_time_left(terminal: bool, tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    with shown.open("w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=terminal, width=150)
        with TrainingProgress(console) as progress:
            progress.start(0, None)
            progress.step(1, 2.0, 1000.0)
            progress.set_total(2)
            progress.validated("held-out accuracy 50.0%")
            progress.step(2, 2.0, 123_456.0)
    text = shown.read_text(encoding="utf-8")
    for figure in ("step 2/2", "loss 2.0000", "held-out accuracy 50.0%", "123,456 bases/s", "0:00 left"):
        assert figure in text
    assert ("\x1b" in text) is terminal


def test_durations_are_written_as_a_clock_shows_them() -> None:
    assert [format_duration(seconds) for seconds in (-1, 0, 59.6, 3599, 3661)] == [
        "0:00",
        "0:00",
        "1:00",
        "59:59",
        "1:01:01",
    ]


@pytest.mark.parametrize("recipe", ["small", "demo", "tiny"])
@pytest.mark.parametrize("length", [256, 8192, 65_536])
def test_a_plan_fills_the_time_and_counts_validation_and_calibration(recipe: str, length: int) -> None:
    plan = SpeciesPlan(
        load_task_recipe(SpeciesRecipe, recipe), length, classes=3, validation_windows=24, calibration_lengths=4
    )
    for seconds_per_step in (0.05, 0.3, 1.0):
        schedule = plan.schedule_for_time(12, seconds_per_step, seconds_left=600.0)
        affordable = 12 + 600.0 / seconds_per_step
        assert (
            schedule.total_steps < plan.work(schedule.total_steps) <= affordable < plan.work(schedule.total_steps + 1)
        )


def test_a_plan_takes_at_least_one_more_step_when_there_is_no_time_left() -> None:
    plan = SpeciesPlan(
        load_task_recipe(SpeciesRecipe, "small"), 8192, classes=3, validation_windows=0, calibration_lengths=0
    )
    assert plan.schedule_for_time(12, 1.0, seconds_left=-5.0).total_steps == 13
    assert plan.work(100) == 100


def test_a_run_without_a_time_ends_after_some_passes_over_the_training_sequence(
    options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load_task_recipe(SpeciesRecipe, "small")
    plan = SpeciesPlan(recipe, 8192, classes=2, validation_windows=0, calibration_lengths=0, most_steps=200)
    assert plan.schedule_for_time(12, 0.1, seconds_left=2400.0).total_steps == 200
    assert plan.schedule_for_time(12, 0.1, seconds_left=10.0).total_steps == 112
    assert plan.steps_within(300, 50.0) == 301
    training = hold_out(options, load_genomes(options.genomes)).training
    trained = train_species_classifier(replace(options, steps=None, minutes=None))
    own = load_task_recipe(SpeciesRecipe, options.recipe, options.changes)
    expected = steps_of_passes(own, options.length, training)
    assert trained.steps <= expected
    assert f"at most {expected:,} steps, {MOST_PASSES} passes" in capfd.readouterr().err


def test_long_runs_spend_little_on_held_out_windows() -> None:
    plan = SpeciesPlan(
        load_task_recipe(SpeciesRecipe, "small"), 8192, classes=3, validation_windows=96, calibration_lengths=5
    )
    assert plan.work(10_000) < 1.16 * 10_000
    assert (
        plan.calibration_bases_per_class(10_000) == load_task_recipe(SpeciesRecipe, "small").calibration.bases_per_class
    )
