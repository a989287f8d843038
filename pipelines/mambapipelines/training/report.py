"""The HTML report of a training run: curves, recipe, data, hardware, evaluations and generated clips."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mambacore.errors import InputError
from mambacore.model_folder import CONFIG_NAME
from mambapipelines.console import format_duration
from mambapipelines.files import write_whole
from mambapipelines.pages.html import Item, Picture, Player, Section, Table, page
from mambapipelines.pages.plots import plot_run_curve, plot_run_pace
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.options import RUN_FOLDER_NAME
from mambapipelines.training.state import RUN_DESCRIPTION_NAME, RunFolder

REPORT_NAME: Final = "report.html"
SPEED_SUFFIX: Final = "_per_second"
# Columns of the metrics that are not plotted as learning curves.
BOOKKEEPING: Final = frozenset({"step", "learning_rate", "seconds"})
SOUND_TYPES: Final = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".mp3": "audio/mpeg"}
# Limits beyond which a page is slow to open.
MOST_TABLE_ROWS: Final = 200
MOST_PLAYERS: Final = 24
MOST_MATERIAL_BYTES: Final = 16 << 20


def write_run_report(folder: Path, material: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the report of a run, replacing an earlier one.

    Args:
        folder: output folder of a training command, finished or not.
        material: further folders or files with evaluation tables (.tsv), plots (.png) and sounds to show; those in
            `folder` itself are always shown.
        output: file for the report; by default `report.html` in the folder.

    Returns:
        The path of the page.

    Raises:
        InputError: if the folder has no run, material does not exist, or the report cannot be written.
    """
    output = output if output is not None else folder / REPORT_NAME
    for path in material:
        if not path.exists():
            raise InputError(f"{path} does not exist: give folders or files of evaluations.")
    write_whole(output, run_page(folder, material))
    return output


def run_page(folder: Path, material: Sequence[Path] = ()) -> str:
    """The page of `write_run_report` as HTML."""
    run = RunFolder(folder / RUN_FOLDER_NAME)
    rows = read_metrics(run.metrics_path)
    if rows and not {"step", "loss", "learning_rate", "seconds"} <= rows[0].keys():
        raise InputError(f"the metrics {run.metrics_path} lack columns: restore the file.")
    if not rows:
        raise InputError(f"{folder} holds no training run: give the --output folder of a training command.")
    described = _json_file(run.path / RUN_DESCRIPTION_NAME)
    details = _mapping(_json_file(folder / CONFIG_NAME).get("details"))
    finished = (folder / CONFIG_NAME).is_file()
    sections = [
        Section("", [_overview(rows, finished)]),
        Section("Curves", list(_curves(rows))),
        *_material_sections([folder, *material]),
    ]
    figures = {key: value for key, value in details.items() if not isinstance(value, (dict, list))}
    if figures:
        sections.append(Section("The finished model", [_settings(figures)]))
    fingerprint = _mapping(described.get("depends_on"))
    recipe = _mapping(fingerprint.get("recipe"))
    asked = {key: value for key, value in fingerprint.items() if key != "recipe" and not isinstance(value, dict)}
    for heading, values in (
        ("Options of the run", asked),
        ("Recipe", recipe),
        ("Software and hardware", _mapping(described.get("provenance"))),
    ):
        if values:
            sections.append(Section(heading, [_settings(values)]))
    return page(f"Training run {folder.resolve().name}", sections)


def _overview(rows: Sequence[Mapping[str, str]], finished: bool) -> str:
    last = rows[-1]
    seconds = sum(float(row["seconds"]) for row in rows)
    speed = next((name for name in last if name.endswith(SPEED_SUFFIX)), None)
    text = (
        f"{int(last['step']):,} optimiser steps in {format_duration(seconds)} (hours, minutes, seconds) of training, "
        f"last loss {float(last['loss']):.4f}"
    )
    if speed is not None:
        median = float(np.median([float(row[speed]) for row in rows]))
        text += f", {median:,.0f} {speed.removesuffix(SPEED_SUFFIX)} per second in the median"
    return text + (". The model is finished." if finished else ". The run is not finished: continue it with --resume.")


def _curves(rows: Sequence[Mapping[str, str]]) -> Iterator[Picture]:
    """One picture per figure of the metrics, and one of learning rate and speed."""
    speed = next((name for name in rows[0] if name.endswith(SPEED_SUFFIX)), None)
    for name in rows[0]:
        if name in BOOKKEEPING or name == speed:
            continue
        steps, values = _column(rows, name)
        if len(values):
            words = name.replace("_", " ")
            yield Picture(plot_run_curve(steps, values, words), f"{words.capitalize()} over the steps of the run.")
    steps, rates = _column(rows, "learning_rate")
    pace = _column(rows, speed)[1] if speed is not None else np.array([])
    unit = speed.removesuffix(SPEED_SUFFIX) if speed is not None else ""
    if len(rates):
        yield Picture(plot_run_pace(steps, rates, pace, unit), "Learning rate and speed over the steps of the run.")


def _column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(float(row["step"]), float(row[name])) for row in rows if row[name] != ""]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def _material_sections(places: Sequence[Path]) -> Iterator[Section]:
    """What lies in the places: tables, plots and sounds, a section for each folder that has any."""
    folders: dict[Path, list[Path]] = {}
    for place in places:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            inside_run = RUN_FOLDER_NAME in file.relative_to(place).parts if file != place else False
            known = file.suffix.lower() in {".tsv", ".png", *SOUND_TYPES}
            if known and file.is_file() and not inside_run and file not in folders.get(file.parent, []):
                folders.setdefault(file.parent, []).append(file)
    for parent, files in folders.items():
        items = list(_items(files))
        if items:
            yield Section(f"From {parent.name or parent}", items)


def _items(files: Sequence[Path]) -> Iterator[Item]:
    for file in (file for file in files if file.suffix.lower() == ".tsv"):
        yield from _table(file)
    budget = MOST_MATERIAL_BYTES
    pictures = {file.stem: file for file in files if file.suffix.lower() == ".png"}
    sounds = [file for file in files if file.suffix.lower() in SOUND_TYPES]
    heard = {file.stem for file in sounds}
    for stem, file in pictures.items():
        if stem not in heard:
            yield Picture(file.read_bytes(), file.name)
    shown = 0
    for file in sounds[:MOST_PLAYERS]:
        budget -= file.stat().st_size
        if budget < 0:
            break
        picture = pictures[file.stem].read_bytes() if file.stem in pictures else None
        yield Player(file.read_bytes(), file.name, SOUND_TYPES[file.suffix.lower()], picture)
        shown += 1
    if shown < len(sounds):
        yield f"The first {shown} of {len(sounds)} sounds."


def _table(file: Path) -> Iterator[Item]:
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        lines = [line for line in csv.reader(stream, delimiter="\t") if line]
    if len(lines) < 2:
        return
    yield f"{file.name}:"
    if len(lines) - 1 > MOST_TABLE_ROWS:
        yield f"The first {MOST_TABLE_ROWS} of {len(lines) - 1:,} rows."
    yield Table(lines[0], lines[1 : MOST_TABLE_ROWS + 1])


def _settings(values: Mapping[str, Any]) -> Table:
    """Nested values, one row each."""
    return Table(["setting", "value"], [[key, _shown(value)] for key, value in _flattened(values)])


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, as it is in an undamaged file."""
    return value if isinstance(value, dict) else {}


def _json_file(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where there is none, because a page of an unfinished run is better than no page."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
