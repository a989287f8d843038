"""The state of a training run on disk, written atomically.

Layout of the folder:

    current.json              {"folder": "step-000120"}: which state counts; replaced by one rename
    step-000120/state.json    step, schedule, options and recipe
    step-000120/sha256sums.txt    of the other files, for `sha256sum --check`; a state that differs is not loaded
    step-000120/weights.safetensors
    step-000120/optimizer.safetensors
    step-000120/average.safetensors     the moving average of the weights, where the run has one
    step-000120/weights-00001-of-00004.safetensors ...   the same where processes each hold a part of every tensor
    metrics.csv               one row per step, cut back to the step that a resumed run starts from
    events/                   the same for TensorBoard
    run.json                  what the run depends on, and the versions and the machine it was last started with

A state is written under a temporary name, renamed, and only then pointed at, so weights, optimiser and step never
disagree, whenever the process is killed. Besides the state that counts, those before it and the one of the best
validation may be kept, as the recipe says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from mambacore.errors import InputError
from mambacore.files import replaced_when_whole, temporary_name
from mambapipelines.training.metrics import METRICS_NAME, MetricsLog
from mambapipelines.training.ranks import ONE_PROCESS, Ranks
from mambapipelines.training.schedules import Schedule, ValidationHistory

STATE_VERSION = 3
# Version 2 can be read as well; it has neither checksums nor the elapsed time.
OLDEST_STATE_VERSION = 2
POINTER_NAME = "current.json"
STATE_NAME = "state.json"
CHECKSUMS_NAME = "sha256sums.txt"
RUN_DESCRIPTION_NAME = "run.json"


@dataclass(frozen=True)
class RunState:
    """Everything a run needs to continue as if uninterrupted.

    Attributes:
        step: optimiser steps taken.
        schedule: learning rate and total number of steps.
        fingerprint: what the run depends on (options, recipe, sequences); a resumed run must have the same.
        threads: CPU threads of the process that wrote the state; another number may change the last bits.
        weights: parameters and buffers of the model by name.
        optimizer: tensors of AdamW, named `PARAMETER/TENSOR`.
        average: moving average of the parameters by name; empty if there is none.
        history: the validations so far.
        seconds: wall time of the run so far, over all its processes; `None` where that was not recorded.
        placed: device, precision and number of processes, in words; empty where that was not recorded.
        positions: that go through the model at once on a device; `None` where the recipe decides.
    """

    step: int
    schedule: Schedule
    fingerprint: dict[str, Any]
    threads: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    history: ValidationHistory = field(default_factory=ValidationHistory)
    seconds: float | None = None
    placed: dict[str, str] = field(default_factory=dict)
    positions: int | None = None


class RunFolder:
    """The folder `training` of an output folder.

    Args:
        path: the folder.
        metrics_columns: columns of the metrics log.
        keep_last: number of the last states to keep, including the current one.
        keep_best: whether to keep the state of the best validation as well.
    """

    def __init__(
        self,
        path: Path,
        metrics_columns: Sequence[str] = ("step", "loss"),
        keep_last: int = 1,
        keep_best: bool = False,
    ) -> None:
        self.path = path
        self.metrics_columns = tuple(metrics_columns)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.metrics_path = path / METRICS_NAME

    def holds_a_run(self) -> bool:
        """Return whether a state has been written here."""
        return (self.path / POINTER_NAME).is_file()

    def save(self, state: RunState, ranks: Ranks = ONE_PROCESS) -> None:
        """Write `state` and make it the current one, then remove older ones and leftovers of killed writers.

        Every process calls it; the first one writes, and with sharded parameters each writes what it holds.

        Raises:
            OSError: in every process, if one of them could not write; the state before this one still counts.
        """
        name = _folder_name(state.step)
        if ranks.of_first([float(ranks.is_first and self._current_name() == name)])[0]:
            if ranks.is_first:
                self._remove_others(state)
            return
        writer = int(ranks.of_first([os.getpid()])[0])
        temporary = temporary_name(self.path / name, writer)
        with ranks.all_or_none():
            if ranks.is_first:
                self.path.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        with ranks.all_or_none():
            if ranks.is_first or ranks.sharded:
                _write_tensors(state, temporary, _part_suffix(ranks.rank, ranks.count) if ranks.sharded else "")
        with ranks.all_or_none():
            if ranks.is_first:
                self._make_current(state, name, temporary, ranks.count if ranks.sharded else 1)
                self._remove_others(state)

    def _make_current(self, state: RunState, name: str, temporary: Path, parts: int) -> None:
        """Complete the folder `temporary` of a state, rename it, and make it the current one."""
        description = {
            "state_version": STATE_VERSION,
            "step": state.step,
            "schedule": asdict(state.schedule),
            "threads": state.threads,
            "history": asdict(state.history),
            "seconds": state.seconds,
            "placed": state.placed,
            "positions": state.positions,
            "fingerprint": state.fingerprint,
        }
        if parts > 1:
            tensors = {"weights": state.weights, "optimizer": state.optimizer, "average": state.average}
            description["parts"] = parts
            description["divided"] = {
                kind: [key for key, tensor in named.items() if isinstance(tensor, DTensor)]
                for kind, named in tensors.items()
            }
        (temporary / STATE_NAME).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(temporary.iterdir())]
        (temporary / CHECKSUMS_NAME).write_text("".join(sums), encoding="utf-8")
        for file in temporary.iterdir():
            _flush_to_disk(file)
        # A folder of this name that nothing points at was left by a process that was killed right here.
        shutil.rmtree(self.path / name, ignore_errors=True)
        temporary.rename(self.path / name)
        _write_durably(self.path / POINTER_NAME, json.dumps({"folder": name}) + "\n")

    def _remove_others(self, state: RunState) -> None:
        """Remove states that are not kept along with `state`, and leftovers of killed writers."""
        kept = self._kept_names(state)
        for entry in self.path.iterdir():
            if entry.is_dir() and entry.name not in kept and entry.name.lstrip(".").startswith("step-"):
                shutil.rmtree(entry, ignore_errors=True)

    def load(self, step: int | None = None) -> RunState:
        """Load the current state, or that of an earlier step that was kept.

        Raises:
            InputError: if the folder was written by another version, or its files are damaged or missing.
        """
        name = self._current_name()
        if name is None:
            raise InputError(f"{self.path} holds no training run: remove --resume to start one")
        if step is not None:
            name = _folder_name(step)
        folder = self.path / name
        try:
            return _read_state(folder)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(
                f"the training run in {self.path} is damaged ({error}): start again with another --output"
            ) from error

    def open_metrics(self, step: int) -> MetricsLog:
        """Open the metrics log, truncated to the rows up to `step`."""
        return MetricsLog(self.path, self.metrics_columns, step)

    def describe(self, fingerprint: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Record what the run depends on and its environment, for people and reports."""
        description = {"depends_on": fingerprint, "provenance": provenance}
        self.path.mkdir(parents=True, exist_ok=True)
        _write_durably(self.path / RUN_DESCRIPTION_NAME, json.dumps(description, indent=1) + "\n")

    def _kept_names(self, state: RunState) -> set[str]:
        """Return the folders to keep once `state` is the current one."""
        # A later step than the one that counts was left by a process that was killed before it could say so.
        steps = sorted(_step_of(entry.name) for entry in self.path.glob("step-*") if _step_of(entry.name) <= state.step)
        kept = {_folder_name(step) for step in steps[-self.keep_last :]}
        if self.keep_best and state.history.best_step is not None:
            kept.add(_folder_name(state.history.best_step))
        return kept

    def _current_name(self) -> str | None:
        try:
            name = str(json.loads((self.path / POINTER_NAME).read_text(encoding="utf-8"))["folder"])
            if name != _folder_name(_step_of(name)):
                raise ValueError(f"it names {name!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path / POINTER_NAME} is damaged ({error}): start again with another --output"
            ) from error
        return name


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors of the optimiser's state, named `PARAMETER/TENSOR`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": tensor.detach().contiguous()
        for parameter, tensors in optimizer.state.items()
        for key, tensor in tensors.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore the tensors of `optimizer_tensors`, replacing the optimiser's state.

    Raises:
        InputError: if a tensor does not belong to a parameter of the model.
    """
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise InputError(f"the optimiser state names {name!r}, which the model lacks: start with another --output")
        parameter = parameters[name]
        restored = divided_like(tensor, parameter)
        # The count of steps lies on the CPU, unless the whole update is one kernel of the device.
        on_device = tensor.dim() > 0 or optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = restored.to(parameter.device) if on_device else restored


def divided_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor, divided among the processes as the parameter is if it has the parameter's shape."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.clone(), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.clone()


def _read_state(folder: Path) -> RunState:
    """The state in a folder.

    Raises:
        InputError: another version wrote it.
        OSError, ValueError, KeyError, TypeError, SafetensorError: it is damaged.
    """
    if (folder / CHECKSUMS_NAME).is_file():
        _verify_checksums(folder)
    description = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    version = description["state_version"]
    if version not in range(OLDEST_STATE_VERSION, STATE_VERSION + 1):
        raise InputError(
            f"the training run in {folder.parent} has format {version} and this program reads {STATE_VERSION}: "
            "resume it with the version that wrote it, or start again with another --output"
        )
    if version > OLDEST_STATE_VERSION and not (folder / CHECKSUMS_NAME).is_file():
        raise ValueError(f"{folder.name}/{CHECKSUMS_NAME} is missing")
    schedule = Schedule(**description["schedule"])
    if description["step"] != _step_of(folder.name) or description["step"] > schedule.total_steps:
        raise ValueError(f"{folder.name} holds step {description['step']} of {schedule.total_steps}")
    return RunState(
        step=description["step"],
        schedule=schedule,
        fingerprint=description["fingerprint"],
        threads=description["threads"],
        weights=_read_tensors(folder, "weights", description),
        optimizer=_read_tensors(folder, "optimizer", description),
        average=_read_tensors(folder, "average", description),
        history=ValidationHistory(**description["history"]),
        seconds=description.get("seconds"),
        placed=description.get("placed", {}),
        positions=description.get("positions"),
    )


def _verify_checksums(folder: Path) -> None:
    """Raise `ValueError` that names the first file that is missing, added, or other than it was written."""
    lines = (folder / CHECKSUMS_NAME).read_text(encoding="utf-8").splitlines()
    recorded = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    present = {file.name for file in folder.iterdir()} - {CHECKSUMS_NAME}
    for name in sorted(recorded.keys() | present):
        if name not in present:
            raise ValueError(f"{folder.name}/{name} is missing")
        if recorded.get(name) != _sha256(folder / name):
            raise ValueError(f"{folder.name}/{name} is not what was written")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(state: RunState, folder: Path, suffix: str) -> None:
    """Write this process's part of a state's tensors.

    Raises:
        OSError: if a file cannot be written.
    """
    for kind, tensors in (("weights", state.weights), ("optimizer", state.optimizer), ("average", state.average)):
        if kind == "average" and not tensors:
            continue
        own = {
            # A copy, because tied tensors share memory and files do not.
            name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        try:
            save_file(own, folder / f"{kind}{suffix}.safetensors")
        except SafetensorError as error:
            # This is how safetensors says that a disk is full.
            raise OSError(str(error)) from error


def _read_tensors(folder: Path, kind: str, description: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors, put together from the parts where several processes wrote them."""
    parts = description.get("parts", 1)
    if kind == "average" and not list(folder.glob("average*")):
        return {}
    if parts == 1:
        return load_file(folder / f"{kind}.safetensors")
    read = [load_file(folder / f"{kind}{_part_suffix(part, parts)}.safetensors") for part in range(parts)]
    divided = set(description["divided"][kind])
    return {
        name: torch.cat([tensors[name] for tensors in read]) if name in divided else tensor
        for name, tensor in read[0].items()
    }


def _part_suffix(part: int, parts: int) -> str:
    return f"-{part + 1:05d}-of-{parts:05d}"


def _write_durably(path: Path, text: str) -> None:
    """Replace the file `path` by `text` atomically.

    Raises:
        OSError: if it cannot be written.
    """
    with replaced_when_whole(path, durable=True) as stream:
        stream.write(text.encode())


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(folder_name: str) -> int:
    """The opposite of `_folder_name`; a name of another kind is of no step that is kept."""
    digits = folder_name.removeprefix("step-")
    return int(digits) if digits.isdigit() else sys.maxsize


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
