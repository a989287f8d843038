"""Resuming: a run that was stopped, whatever stopped it, ends in the numbers of a run that was not."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genomamba.data.genomes import GenomeSpecification
from mambacore.errors import InputError
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from mambapipelines.training import recorder
from mambapipelines.training import state as run_state
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.state import (
    RunFolder,
    RunState,
    Schedule,
    optimizer_tensors,
    restore_optimizer,
)

STEPS = 16
# Kills itself while it writes the state of step 10: the weights are on disk, the optimiser is not.
KILLED_WHILE_SAVING = """
import os, signal, sys
from mambapipelines.training import state as run_state
from mambapipelines.training import recorder
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from genomamba.data.genomes import GenomeSpecification

recorder.SECONDS_BETWEEN_SAVES = 0.0
save_file = run_state.save_file

def save_and_die(tensors, path):
    if path.name == "optimizer.safetensors" and "step-000010" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(tensors, path)

run_state.save_file = save_and_die
output, *genomes = sys.argv[1:]
train_species_classifier(SpeciesTrainingOptions(
    genomes=[GenomeSpecification(f"class{number}", (path,)) for number, path in enumerate(genomes)],
    length=128, output=__import__("pathlib").Path(output), holdout=["chrII"], steps=16, recipe="tiny", threads=1,
))
"""


@pytest.fixture(scope="module")
def genomes(tmp_path_factory: pytest.TempPathFactory) -> list[GenomeSpecification]:
    folder = tmp_path_factory.mktemp("genomes")
    random = np.random.default_rng(5)
    specifications = []
    for number, probabilities in enumerate([[0.3, 0.2, 0.2, 0.3], [0.2, 0.3, 0.3, 0.2]]):
        path = folder / f"{number}.fa"
        records = [
            f">{name}\n{''.join(random.choice(list('ACGT'), 3000, p=probabilities))}\n" for name in ("chrI", "chrII")
        ]
        path.write_text("".join(records), encoding="ascii")
        specifications.append(GenomeSpecification(f"class{number}", (str(path),)))
    return specifications


@pytest.fixture
def options(genomes: list[GenomeSpecification], tmp_path: Path) -> SpeciesTrainingOptions:
    return SpeciesTrainingOptions(
        genomes=genomes,
        length=128,
        output=tmp_path / "run",
        holdout=["chrII"],
        steps=STEPS,
        recipe="tiny",
        threads=1,
    )


@pytest.fixture(scope="module")
def uninterrupted(genomes: list[GenomeSpecification], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    train_species_classifier(
        SpeciesTrainingOptions(
            genomes=genomes, length=128, output=output, holdout=["chrII"], steps=STEPS, recipe="tiny", threads=1
        )
    )
    return output


def assert_same_run(first: Path, second: Path) -> None:
    """Model, optimiser and metrics agree to the last bit."""
    state = f"training/step-{STEPS:06d}"
    for name in ("model.safetensors", f"{state}/weights.safetensors", f"{state}/optimizer.safetensors"):
        tensors, others = load_file(first / name), load_file(second / name)
        assert tensors.keys() == others.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
    rows, other_rows = (read_metrics(folder / "training" / "metrics.csv") for folder in (first, second))
    columns = ("step", "loss", "accuracy", "learning_rate", "held_out_accuracy")
    assert [[row[column] for column in columns] for row in rows] == [
        [row[column] for column in columns] for row in other_rows
    ]
    assert (first / "README.md").read_text() == (second / "README.md").read_text()


def interrupt_at(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `action` while step `step` is being reported."""
    report = TrainingProgress.step

    def report_and_act(self: TrainingProgress, current: int, *figures: float) -> None:
        report(self, current, *figures)
        if current == step:
            action()

    monkeypatch.setattr(TrainingProgress, "step", report_and_act)


def test_a_run_killed_while_it_saves_resumes_to_the_same_numbers(
    options: SpeciesTrainingOptions, uninterrupted: Path
) -> None:
    paths = [path for genome in options.genomes for path in genome.paths]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(options.output), *paths], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert RunFolder(options.output / "training").load().step == 9
    assert not (options.output / "config.json").exists()
    train_species_classifier(replace(options, resume=True))
    assert_same_run(options.output, uninterrupted)
    assert [entry.name for entry in (options.output / "training").glob("*step-*")] == ["step-000016"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "term", "hup"])
def test_a_run_stopped_by_a_signal_saves_and_resumes_to_the_same_numbers(
    options: SpeciesTrainingOptions,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    handlers = [signal.getsignal(each) for each in recorder.STOPPING_SIGNALS]
    with monkeypatch.context() as patch:
        interrupt_at(7, lambda: signal.raise_signal(number), patch)
        with pytest.raises(expected):
            train_species_classifier(options)
    assert [signal.getsignal(each) for each in recorder.STOPPING_SIGNALS] == handlers
    assert "--resume" in capfd.readouterr().err
    assert RunFolder(options.output / "training").load().step == 7
    train_species_classifier(replace(options, resume=True))
    assert "resuming after step 7 of 16" in capfd.readouterr().err
    assert_same_run(options.output, uninterrupted)


def test_a_signal_sent_twice_by_the_scheduler_and_by_torchrun_stops_after_the_step(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate_twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        interrupt_at(7, terminate_twice, patch)
        with pytest.raises(SystemExit) as stopped:
            train_species_classifier(options)
    assert stopped.value.code == 143
    assert RunFolder(options.output / "training").load().step == 7


def test_a_second_ctrl_c_ends_the_process_at_once(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)

    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        interrupt_at(7, interrupt_twice, patch)
        with pytest.raises(SystemExit) as stopped:
            train_species_classifier(options)
    assert stopped.value.code == 130
    assert RunFolder(options.output / "training").load().step == 6


def test_a_run_killed_between_training_and_writing_the_model_only_writes_the_model(
    options: SpeciesTrainingOptions, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_species_classifier(options)
    (options.output / "config.json").unlink()
    interrupt_at(STEPS, lambda: pytest.fail("there was nothing left to train"), monkeypatch)
    result = train_species_classifier(replace(options, resume=True))
    assert not result.already_finished
    assert_same_run(options.output, uninterrupted)


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    first = train_species_classifier(options)
    before = (options.output / "config.json").read_bytes()
    again = train_species_classifier(replace(options, resume=True))
    assert again.already_finished and again.steps == STEPS
    assert (again.held_out_accuracy, again.calibration) == (first.held_out_accuracy, first.calibration)
    assert "finished" in capfd.readouterr().err
    assert (options.output / "config.json").read_bytes() == before
    with pytest.raises(InputError, match="holds a training run already: add --resume"):
        train_species_classifier(options)


def test_resuming_where_nothing_is_starts_a_run(
    options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train_species_classifier(replace(options, resume=True, steps=2))
    assert result.steps == 2 and not result.already_finished
    assert "holds no training run to resume: starting one" in capfd.readouterr().err


def test_stopping_before_the_length_of_the_run_is_known_leaves_nothing_to_resume(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = replace(options, steps=None, minutes=0.05)
    with monkeypatch.context() as patch:
        interrupt_at(1, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train_species_classifier(measured)
    assert not RunFolder(options.output / "training").holds_a_run()
    monkeypatch.setattr(recorder, "TIMED_STEPS", 2)
    assert train_species_classifier(measured).steps > 2


def test_a_run_in_minutes_keeps_the_number_of_steps_it_once_measured(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = replace(options, steps=None, minutes=5.0)
    monkeypatch.setattr(recorder, "TIMED_STEPS", 2)
    plan = RunPlan.schedule_for_time

    def plan_a_fast_machine(self: RunPlan, measured_steps: int, seconds_per_step: float, seconds_left: float) -> Any:
        assert seconds_per_step > 0 and seconds_left < 300
        return plan(self, measured_steps, 1.0, 20.0)

    with monkeypatch.context() as patch:
        patch.setattr(RunPlan, "schedule_for_time", plan_a_fast_machine)
        interrupt_at(8, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train_species_classifier(measured)
    schedule = RunFolder(options.output / "training").load().schedule
    with monkeypatch.context() as patch:
        patch.setattr(RunPlan, "schedule_for_time", lambda *arguments: pytest.fail("measured once more"))
        result = train_species_classifier(replace(measured, resume=True))
    assert result.steps == schedule.total_steps > 8
    rates = [float(row["learning_rate"]) for row in read_metrics(result.metrics_path)]
    assert rates == pytest.approx([schedule.learning_rate(step) for step in range(result.steps)], rel=1e-4)


def test_resuming_with_other_options_or_sequences_names_the_difference(
    options: SpeciesTrainingOptions, tmp_path: Path
) -> None:
    short = replace(options, steps=2)
    train_species_classifier(short)
    (options.output / "config.json").unlink()
    changed = tmp_path / "changed.fa"
    letters = Path(options.genomes[1].paths[0]).read_text(encoding="ascii")
    changed.write_text(letters[:-10] + "ACGTACGTA\n", encoding="ascii")
    recipe = tmp_path / "other.yaml"
    recipe.write_text("minutes: 0.1\n", encoding="utf-8")
    other: list[tuple[dict[str, Any], str]] = [
        ({"length": 64}, "--length was 128 and is now 64"),
        ({"seed": 9}, "--seed was 0 and is now 9"),
        ({"steps": 1}, "--steps was 2 and is now 1"),
        ({"steps": None, "minutes": 1.0}, "--steps was 2 and is now not given"),
        ({"holdout": []}, "--holdout was chrII and is now empty"),
        ({"recipe": str(recipe)}, "recipe.model.model_width was 16 and is now not given"),
        ({"genomes": options.genomes[::-1]}, "classes was class0,class1 and is now class1,class0"),
        (
            {"genomes": [options.genomes[0], GenomeSpecification("class1", (str(changed),))]},
            r"sequence 'chrII' has other letters, one of class 'class1', which .* \(missing: .*; new: .*\)",
        ),
    ]
    for changes, expected in other:
        with pytest.raises(InputError, match=expected):
            train_species_classifier(replace(short, resume=True, **changes))


def make_state(step: int, value: float = 1.0) -> RunState:
    schedule = Schedule(peak_learning_rate=0.1, warmup_steps=2, total_steps=9, final_fraction=0.1)
    return RunState(
        step, schedule, {"--seed": 1}, 1, {"weight": torch.full((3,), value)}, {"weight/step": torch.ones(())}
    )


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "training")
    assert not folder.holds_a_run()
    folder.save(make_state(3))
    folder.save(make_state(5, value=2.5))
    state = folder.load()
    assert (state.step, state.fingerprint, state.threads) == (5, {"--seed": 1}, 1)
    assert asdict(state.schedule) == asdict(make_state(5).schedule)
    assert torch.equal(state.weights["weight"], torch.full((3,), 2.5))
    assert sorted(entry.name for entry in folder.path.iterdir()) == ["current.json", "step-000005"]


@pytest.mark.parametrize("function", ["save_file", "replaced_when_whole"])
def test_a_save_that_fails_leaves_the_state_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.save(make_state(3))

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_state, function, fail)
        with pytest.raises(OSError, match="no space"):
            folder.save(make_state(4))
    assert folder.load().step == 3
    folder.save(make_state(4, value=7.0))
    assert folder.load().weights["weight"][0] == 7.0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["current.json", "step-000004"]


def test_a_full_disk_is_reported_and_the_run_goes_on_from_the_state_before(
    options: SpeciesTrainingOptions, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)
    save_file = run_state.save_file

    def save_until_full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step-000005" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_file", save_until_full)
        with pytest.raises(InputError, match=r"cannot be written .*No space left"):
            train_species_classifier(options)
    train_species_classifier(replace(options, resume=True))
    assert_same_run(options.output, uninterrupted)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


STATE_FILES = ("weights.safetensors", "optimizer.safetensors", "average.safetensors", "state.json", "sha256sums.txt")


def damages() -> dict[str, tuple[Callable[[Path], object], str]]:
    """What may befall the state of step 3, and what is said of it."""
    cases: dict[str, tuple[Callable[[Path], object], str]] = {}
    for name in STATE_FILES:
        cases[f"flip {name}"] = (lambda state, name=name: flip_a_bit(state / name), "step-000003/")
        cases[f"remove {name}"] = (lambda state, name=name: (state / name).unlink(), f"{name} is missing")
        cases[f"empty {name}"] = (lambda state, name=name: (state / name).write_bytes(b""), "step-000003/")

    def rewrite(state: Path, old: str, new: str) -> None:
        text = (state / "state.json").read_text(encoding="utf-8")
        assert old in text
        (state / "state.json").write_text(text.replace(old, new), encoding="utf-8")

    cases["another step"] = (lambda state: rewrite(state, '"step": 3', '"step": 9'), "state.json is not what")
    cases["fewer steps in all"] = (
        lambda s: rewrite(s, '"total_steps": 9', '"total_steps": 3'),
        "state.json is not what",
    )
    cases["added file"] = (lambda state: (state / "more.txt").write_text(""), "more.txt is not what")
    cases["another folder"] = (lambda state: state.rename(state.with_name("step-000004")), "No such file")
    cases["pointer"] = (lambda state: (state.parent / "current.json").write_text("{"), "current.json is damaged")
    cases["pointer elsewhere"] = (
        lambda state: (state.parent / "current.json").write_text('{"folder": "../step-000003"}'),
        "current.json is damaged",
    )
    return cases


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_run_is_reported_not_loaded(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    folder.save(replace(make_state(3), average={"weight": torch.ones(3)}))
    assert folder.load().step == 3
    befall, expected = damages()[damage]
    befall(tmp_path / "step-000003")
    with pytest.raises(InputError, match=expected):
        folder.load()


def write_checksums(state: Path) -> None:
    """As `sha256sum` in the folder would."""
    files = [file for file in sorted(state.iterdir()) if file.name != "sha256sums.txt"]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (state / "sha256sums.txt").write_text("".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"state_version": 3', '"state_version": 4', "has format 4 and this program reads 3"),
        ('"step": 3', '"step": 2', "step-000003 holds step 2 of 9"),
        ('"total_steps": 9', '"total_steps": 2', "step-000003 holds step 3 of 2"),
    ],
)
def test_a_state_is_checked_against_its_version_and_its_folder(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.save(make_state(3))
    description = tmp_path / "step-000003" / "state.json"
    description.write_text(description.read_text().replace(old, new))
    write_checksums(description.parent)
    with pytest.raises(InputError, match=expected):
        folder.load()


def test_a_state_of_the_version_before_checksums_is_loaded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(make_state(3))
    state = tmp_path / "step-000003"
    (state / "sha256sums.txt").unlink()
    with pytest.raises(InputError, match=r"sha256sums\.txt is missing"):
        folder.load()
    description = json.loads((state / "state.json").read_text())
    del description["seconds"]
    description["state_version"] = 2
    for name in ("replanned_step", "replanned_progress"):
        del description["schedule"][name]
    (state / "state.json").write_text(json.dumps(description))
    loaded = folder.load()
    assert loaded.step == 3 and loaded.seconds is None and loaded.schedule == make_state(3).schedule


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"x,0.5\n", b"4\n", b"4,0.5,7\n", b"4,many\n", b"4,\0\n"])
def test_damaged_metrics_are_one_sentence(tmp_path: Path, damage: bytes) -> None:
    folder = RunFolder(tmp_path)
    log = folder.open_metrics(0)
    for step in range(1, 4):
        log.append({"step": step, "loss": 0.5})
    log.close()
    before = folder.metrics_path.read_bytes()
    folder.metrics_path.write_bytes(before + damage + b"5,0.5\n")
    with pytest.raises(InputError, match=r"metrics\.csv (are damaged at line 5|cannot be read)"):
        folder.open_metrics(3)


def test_metrics_are_cut_back_to_the_resumed_step_and_unfinished_rows_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = folder.open_metrics(0)
    for step in range(1, 6):
        log.append({"step": step, "loss": 0.5})
    log.close()
    with folder.metrics_path.open("a", encoding="utf-8") as file:
        file.write("6,0.25,0")
    folder.open_metrics(3).close()
    assert [int(row["step"]) for row in read_metrics(folder.metrics_path)] == [1, 2, 3]
    folder.open_metrics(0).close()
    assert read_metrics(folder.metrics_path) == []


def test_an_optimizer_goes_on_as_if_it_had_never_been_saved() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.AdamW]:
        model = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        groups = [{"params": [model.bias], "weight_decay": 0.0}, {"params": [model.weight]}]
        return model, torch.optim.AdamW(groups, lr=0.1)

    def take_step(model: torch.nn.Module, optimizer: torch.optim.AdamW, value: float) -> None:
        optimizer.zero_grad()
        model(torch.full((1, 3), value)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    take_step(model, optimizer, 1.0)
    restored_model, restored = make()
    restored_model.load_state_dict(model.state_dict())
    restore_optimizer(restored, restored_model, optimizer_tensors(optimizer, model))
    take_step(model, optimizer, 2.0)
    take_step(restored_model, restored, 2.0)
    assert all(
        torch.equal(first, second)
        for first, second in zip(model.parameters(), restored_model.parameters(), strict=True)
    )
    with pytest.raises(InputError, match="'bogus'"):
        restore_optimizer(restored, restored_model, {"bogus/step": torch.ones(())})
