"""The page of a training run shows the run, opens offline, and fits any window."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from browser import (
    NARROW_PX,
    WIDE_PX,
    assert_page_does_not_scroll_sideways,
    assert_pictures_are_seen,
    assert_players_play,
    browser,
    watched_page,
)
from mambacore.errors import InputError
from mambapipelines.cli.genomamba.main import main
from mambapipelines.pages.plots import plot_run_curve
from mambapipelines.training.report import run_page, write_run_report
from mambapipelines.training.state import RunFolder

COLUMNS = ("step", "loss", "learning_rate", "held_out_accuracy", "bases_per_second", "seconds")


def write_run(folder: Path, steps: int = 40) -> Path:
    """A run as training leaves it behind, without a finished model."""
    run = RunFolder(folder / "training", COLUMNS)
    fingerprint = {"--length": 1024, "--seed": 7, "recipe": {"model": {"layers": 3}, "precision": "float32"}}
    run.describe(fingerprint, {"versions": {"torch": "0.0.test"}, "git_revision": "abc123"})
    metrics = run.open_metrics(0)
    for step in range(1, steps + 1):
        accuracy = f"{step / steps:.4f}" if step % 10 == 0 else ""
        metrics.append(
            {
                "step": step,
                "loss": f"{2 / step:.6f}",
                "learning_rate": "0.001",
                "held_out_accuracy": accuracy,
                "bases_per_second": "1000",
                "seconds": "0.500",
            }
        )
    metrics.close()
    return folder


def sound() -> bytes:
    wave = 0.5 * np.sin(np.arange(8000) * 0.2)
    stream = io.BytesIO()
    soundfile.write(stream, wave, 8000, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def write_material(folder: Path) -> Path:
    folder.mkdir()
    (folder / "accuracy.tsv").write_text("length\tclassifier\taccuracy\n1024\tmodel <b>\t0.75\n", encoding="utf-8")
    (folder / "accuracy.png").write_bytes(plot_run_curve(np.arange(3.0), np.arange(3.0), "accuracy"))
    (folder / "clip.wav").write_bytes(sound())
    (folder / "clip.png").write_bytes(plot_run_curve(np.arange(3.0), np.arange(3.0), "waveform"))
    return folder


def test_the_page_has_curves_recipe_hardware_and_what_was_evaluated(tmp_path):
    text = run_page(write_run(tmp_path / "run"), [write_material(tmp_path / "evaluation")])
    assert text.count('<img src="data:image/png') == 3 + 2
    assert text.count("<audio controls") == 1
    for words in ("40 optimiser steps", "0:20", "last loss 0.0500", "1,000 bases", "not finished", "--resume"):
        assert words in text
    for words in ("Recipe", "model.layers", "versions.torch", "0.0.test", "abc123", "--seed", "accuracy.tsv"):
        assert words in text
    assert "model &lt;b&gt;" in text


def test_events_for_tensorboard_hold_the_rows_and_forget_what_was_not_saved(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    folder = write_run(tmp_path / "run", steps=6)
    again = RunFolder(folder / "training", COLUMNS).open_metrics(4)
    again.append({"step": 5, "loss": "9.0", "learning_rate": "0.001", "bases_per_second": "1", "seconds": "1"})
    again.close()
    events = EventAccumulator(str(folder / "training" / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, pytest.approx(2 / step)) for step in range(1, 5)),
        (5, 9.0),
    ]


def test_the_command_writes_the_page_into_the_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "holds no training run"),
        (["run", "no-such-evaluation"], "does not exist"),
        (["run", "--output", "no-such-folder/page.html"], "no-such-folder"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    write_run(tmp_path / "run")
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert words in complaint


def test_a_long_table_and_many_sounds_are_cut_and_say_so(tmp_path):
    folder = write_run(tmp_path / "run")
    material = tmp_path / "clips"
    material.mkdir()
    (material / "clips.tsv").write_text("clip\n" + "one\n" * 500, encoding="utf-8")
    for index in range(30):
        (material / f"{index}.wav").write_bytes(sound()[:400])
    text = run_page(folder, [material])
    assert "The first 200 of 500 rows" in text
    assert "The first 24 of 30 sounds" in text
    with pytest.raises(InputError, match="does not exist"):
        write_run_report(folder, [tmp_path / "missing"])


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [NARROW_PX, WIDE_PX])
def test_the_page_opens_offline_in_a_browser_with_plots_and_players(tmp_path, width_px):
    path = write_run_report(write_run(tmp_path / "run"), [write_material(tmp_path / "evaluation")])
    with browser() as chromium, watched_page(chromium, width_px, offline=True) as (page, wrong):
        page.goto(path.as_uri())
        assert_pictures_are_seen(page, width_px)
        assert_page_does_not_scroll_sideways(page, width_px)
        assert_players_play(page)
        assert wrong == []
