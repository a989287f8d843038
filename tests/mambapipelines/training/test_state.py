"""The state of a run on disk: it comes back as it was saved, and damage is reported, not loaded."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mambacore.errors import InputError
from mambapipelines.training import state as run_state
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.state import (
    RunFolder,
    RunState,
    Schedule,
    optimizer_tensors,
    restore_optimizer,
)


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
