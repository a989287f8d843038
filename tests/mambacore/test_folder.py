"""A model folder: what is written is what is read, whole or not at all, and damage is named."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mambacore.model_folder
from mambacore.errors import InputError
from mambacore.model_folder import (
    FORMAT_VERSION,
    check_output_folder,
    is_model_folder,
    load_tensors_into,
    read_model_folder,
    write_model_folder,
)

CONFIG = {"classes": ["a", "b"], "width": 3}


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def write(folder: Path, config: dict[str, Any] | None = None, model: nn.Module | None = None) -> None:
    write_model_folder(folder, config or CONFIG, (model or small_model()).state_dict(), "# A model\n")


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    model = small_model()
    write(tmp_path / "new" / "model", model=model)
    config, tensors = read_model_folder(tmp_path / "new" / "model")
    assert {name: config[name] for name in CONFIG} == CONFIG
    assert config["format_version"] == FORMAT_VERSION
    assert isinstance(config["package_version"], str)
    assert (tmp_path / "new" / "model" / "README.md").read_text() == "# A model\n"
    other = small_model(seed=1)
    load_tensors_into(other, tensors, tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)
    assert names_in(tmp_path / "new") == ["model"]


def test_the_same_model_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    """The library writes metadata in an order that changes by chance from write to write."""
    contents = set()
    for number in range(8):
        write(tmp_path / str(number), {"kind": "test", "objective": "causal", "model_type": "test"})
        contents.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(contents) == 1


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        write(tmp_path / "model")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755
    for name in names_in(tmp_path / "model"):
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == 0o644


def test_tied_and_strided_tensors_can_be_written(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write_model_folder(tmp_path / "model", CONFIG, {"one": weight, "same": weight, "turned": weight.T}, "card")
    _, tensors = read_model_folder(tmp_path / "model")
    assert torch.equal(tensors["one"], weight)
    assert torch.equal(tensors["same"], weight)
    assert torch.equal(tensors["turned"], weight.T)


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
def test_a_model_is_replaced_and_other_files_stay(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(mambacore.model_folder, "_exchange", lambda *_: False)
    folder = tmp_path / "model"
    write(folder)
    (folder / "report.html").write_text("plots")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last").write_text("state")
    write(folder, {"width": 4}, small_model(seed=2))
    config, tensors = read_model_folder(folder)
    assert config["width"] == 4
    assert torch.equal(tensors["0.weight"], small_model(seed=2).state_dict()["0.weight"])
    assert (folder / "report.html").read_text() == "plots"
    assert (folder / "checkpoints" / "last").read_text() == "state"
    assert names_in(tmp_path) == ["model"]


def test_an_empty_folder_is_filled_and_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    write(tmp_path / "link", {"width": 5})
    assert (tmp_path / "link").is_symlink()
    assert read_model_folder(tmp_path / "real")[0]["width"] == 5


def test_a_failure_leaves_the_old_model_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mambacore.model_folder, "save_file", fail)
    with pytest.raises(InputError, match="No space left"):
        write(folder, {"width": 9})
    with pytest.raises(ValueError, match="JSON"):
        write(folder, {"width": float("nan")})
    assert read_model_folder(folder)[0]["width"] == 3
    assert names_in(tmp_path) == ["model"]


def test_a_folder_of_other_files_and_a_file_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    (tmp_path / "file").write_text("words")
    for place, message in (("thesis", "is not a model folder"), ("file", "is a file")):
        with pytest.raises(InputError, match=message):
            write(tmp_path / place)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "model")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "words"
    assert (tmp_path / "file").read_text() == "words"
    assert names_in(tmp_path) == ["file", "thesis"]


def test_a_checkpoint_of_another_program_is_not_taken_for_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not is_model_folder(tmp_path)
    with pytest.raises(InputError, match="is not a model folder"):
        check_output_folder(tmp_path)


def damage_nothing_there(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()


def damage_file_instead(folder: Path) -> None:
    damage_nothing_there(folder)
    folder.write_text("model")


def damage_tensors_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_tensors_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def damage_config(**changes: object) -> Any:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "there is no model folder"),
        (damage_file_instead, "is a file"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"width": '), "is not valid JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "states no format_version"),
        (lambda folder: (folder / "config.json").write_text("{}"), "states no format_version"),
        (damage_config(format_version=2), "was written by version 2 of the model format, this program reads 1"),
        (damage_tensors_cut, "is truncated or damaged"),
        (damage_tensors_header, "is truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated or damaged"),
    ],
)
def test_damage_is_named_in_one_sentence(damage: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        read_model_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_loaded() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    del tensors["0.bias"], tensors["1.bias"]
    tensors["head.weight"] = torch.zeros(1)
    tensors["0.weight"] = torch.zeros(4, 2)
    tensors["1.weight"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError) as caught:
        load_tensors_into(model, tensors, "model/model.safetensors")
    text = str(caught.value)
    assert text.startswith("model/model.safetensors does not fit its configuration")
    assert "lacks 0.bias, 1.bias" in text
    assert "has head.weight, which the model does not have" in text
    assert "0.weight as float32 (4, 2) where the model has float32 (4, 3)" in text
    assert "1.weight as int64 (4,) where the model has float32 (4,)" in text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
