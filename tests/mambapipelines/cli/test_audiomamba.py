"""The command line audiomamba: train, resume, generate, and bad input in one sentence."""

import csv
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import soundfile
import torch

from audiomamba.data.labels import LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.splits import read_split_clips
from audiomamba.data.writing import write_waveform
from audiomamba.models import WaveformModel, load_waveform_model
from mambacore.errors import InputError
from mambapipelines.cli.audiomamba.main import main
from mambapipelines.training.recipe import load_task_recipe, recipe_names
from mambapipelines.waveforms.recipe import WaveformTrainingRecipe
from mambapipelines.waveforms.task import WaveformTask

RATE = 8000
FEW_STEPS = ("--steps", "4", "--recipe", "tiny", "--threads", "1")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for number in range(24):
        time = np.arange(600 + 40 * number) / RATE
        tone = 0.4 * np.sin(2 * np.pi * random.uniform(200, 900) * time)
        write_waveform(folder / f"{number % 3}_voice_{number:02d}.wav", torch.from_numpy(tone).float(), RATE)
    return folder


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "model"
    assert main(["train", str(clips), "--valid", "*_0[0-4].wav", "--output", str(folder), *FEW_STEPS]) == 0
    return folder


def test_training_leaves_a_model_metrics_and_clips(trained):
    model, details = load_waveform_model(trained)
    assert isinstance(model, WaveformModel) and details["steps"] == 4
    with (trained / "training" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[0]["loss"]) == pytest.approx(8, abs=1)  # bits of 256 classes
    assert float(rows[-1]["valid_bits_per_sample"]) == pytest.approx(details["valid_bits_per_sample"], abs=1e-4)
    samples = trained / "training" / "samples"
    assert {path.name for path in samples.iterdir()} >= {"step-000004.wav", "step-000004.png"}
    assert soundfile.info(samples / "step-000004.wav").samplerate == RATE


def test_a_run_that_was_cut_off_resumes_to_the_same_weights(clips, trained, tmp_path, monkeypatch):
    command = ["train", str(clips), "--valid", "*_0[0-4].wav", "--output", str(tmp_path / "model"), *FEW_STEPS]
    whole = WaveformTask.loss
    calls = []

    def interrupted(task, replica, micro_batch):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(task, replica, micro_batch)

    monkeypatch.setattr(WaveformTask, "loss", interrupted)
    assert main(command) == 143 and not (tmp_path / "model" / "config.json").exists()
    monkeypatch.setattr(WaveformTask, "loss", whole)
    assert main([*command, "--resume"]) == 0
    expected, found = (load_waveform_model(folder)[0].state_dict() for folder in (trained, tmp_path / "model"))
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_long_clips_in_pieces_give_the_same_losses(clips, tmp_path):
    losses = []
    for piece_length in (4096, 256):
        output = tmp_path / str(piece_length)
        command = ["train", str(clips), "--output", str(output), *FEW_STEPS]
        assert main([*command, "--set", f"batch.piece_length={piece_length}", "--set", "drawn.clips=0"]) == 0
        with (output / "training" / "metrics.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0][0] != losses[0][-1]


def test_generate_writes_sounds_a_table_and_a_page(trained, tmp_path, capsys):
    output = tmp_path / "clips"
    assert main(["generate", str(trained), "--clips", "5", "--seconds", "0.05", "--batch", "2", "--reject", "paper",
                 "--output", str(output)]) == 0  # fmt: skip
    assert re.search(r"[\d,]+ samples/s, real-time factor \d+\.\d\d", capsys.readouterr().err)
    rows = list(csv.DictReader((output / "clips.tsv").open(), delimiter="\t"))
    assert [row["number"] for row in rows] == ["0", "1", "2", "3", "4"]
    kept = [row["clip"] for row in rows if row["kept"] == "yes"]
    assert len(kept) == 3 and sorted(path.name for path in output.glob("*.wav")) == kept
    bits = {row["clip"]: float(row["bits_per_sample"]) for row in rows}
    assert max(bits[name] for name in kept) < max(bits.values())  # the least likely are left out
    samples, rate = soundfile.read(output / kept[0])
    assert rate == RATE and len(samples) == 400
    page = (output / "clips.html").read_text()
    assert (
        page.count("<audio") == 3 and "data:audio/wav;base64" in page and "http" not in page.replace("http-equiv", "")
    )


def test_continuing_keeps_the_clip_and_any_batch_gives_the_same(trained, clips, tmp_path):
    prompt = clips / "0_voice_09.wav"
    for batch in ("1", "3"):
        command = ["generate", str(trained), "--clips", "3", "--seconds", "0.02", "--continue", str(prompt)]
        assert main([*command, "--batch", batch, "--format", "flac", "--output", str(tmp_path / batch)]) == 0
    before = soundfile.read(prompt)[0]
    for number in range(3):
        one, other = (soundfile.read(tmp_path / batch / f"clip-{number:05d}.flac")[0] for batch in ("1", "3"))
        assert np.array_equal(one, other) and len(one) == len(before) + 160
        assert np.abs(one[: len(before)] - before).max() < 0.02  # mu-law steps


def test_search_keeps_what_is_as_likely_as_real_clips(trained, clips, tmp_path, capsys):
    command = ["generate", str(trained), "--clips", "4", "--seconds", "0.05", "--reject", "search"]
    assert main([*command, "--real", str(clips), "--output", str(tmp_path / "one")]) == 0
    assert "the central real clips have" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "two")]) == 2
    assert "belong together" in capsys.readouterr().err


def damage(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return str(path)


BAD_FILES = {
    "empty": b"",
    "text": b"this is no sound\n" * 10,
    "cut off": b"RIFF\x24\x10\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x80\x3e\x00\x00\x02\x00"
    b"\x10\x00data\x00\x10\x00\x00\x00\x00",
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_named_or_skipped(clips, tmp_path, capsys, content):
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in clips.iterdir():
        (folder / path.name).symlink_to(path)
    damage(folder, "bad.wav", content)
    command = ["train", str(folder), "--output", str(tmp_path / "model"), *FEW_STEPS, "--set", "drawn.clips=0"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "bad.wav" in message and message.count("\n") == 1 and not (tmp_path / "model").exists()
    assert main([*command, "--skip-bad"]) == 0
    message = capsys.readouterr().err
    assert "left out: " in message and "bad.wav" in message and "1 files in all are left out" in message


MISTAKES = {
    "no such folder": (["train", "NOWHERE", "--output", "OUT", "--recipe", "tiny"], "there is no folder"),
    "no such recipe": (["train", "CLIPS", "--output", "OUT", "--recipe", "wavenet"], "give a YAML file or one of"),
    "no output": (["train", "CLIPS", "--recipe", "tiny"], "--output is missing"),
    "unknown key": (
        ["train", "CLIPS", "--output", "OUT", "--recipe", "tiny", "--set", "batch.clip=3"],
        "unknown key 'clip'",
    ),
    "unknown architecture": (
        ["train", "CLIPS", "--output", "OUT", "--recipe", "mamba-sc09-6m", "--set", "model.architecture=wavenet"],
        "there is no model 'wavenet'",
    ),
    "stages of a number": (
        ["train", "CLIPS", "--output", "OUT", "--recipe", "tiny", "--set", "model.stages=3"],
        "not a list of tables",
    ),
    "no model": (["generate", "NOWHERE", "--output", "OUT"], "there is no model folder"),
    "output in use": (["generate", "MODEL", "--output", "CLIPS"], "choose a new or empty folder"),
    "no such format": (
        ["generate", "MODEL", "--output", "OUT", "--format", "m4a"],
        "the audio format 'm4a' cannot be written",
    ),
    "no such rejection": (["generate", "MODEL", "--output", "OUT", "--reject", "all"], "use paper or search"),
    "no seconds": (["generate", "MODEL", "--output", "OUT", "--seconds", "0"], "use more than 0"),
    "no clips": (["generate", "MODEL", "--output", "OUT", "--clips", "0"], "use a number of 1 or more"),
    "no prompt": (["generate", "MODEL", "--output", "OUT", "--continue", "NOWHERE"], "there is no file"),
}


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_end_in_one_sentence_and_status_2(clips, trained, tmp_path, capsys, command, message):
    places = {"NOWHERE": tmp_path / "nowhere", "OUT": tmp_path / "out", "CLIPS": clips, "MODEL": trained}
    assert main([str(places.get(word, word)) for word in command]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("audiomamba: error: ") and message in captured and captured.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_another_rate_and_a_missing_encoder_are_refused(trained, tmp_path, capsys, monkeypatch):
    write_waveform(tmp_path / "other.wav", torch.zeros(100), 44_100)
    command = ["generate", str(trained), "--output", str(tmp_path / "out")]
    assert main([*command, "--continue", str(tmp_path / "other.wav")]) == 2
    assert "has 44100 Hz but the model 8000 Hz" in capsys.readouterr().err
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "WAV"})
    assert main([*command, "--format", "flac"]) == 2
    assert "no encoder for flac" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_no_part_of_a_file(trained, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mambacore.files.os.replace", full)
    assert main(["generate", str(trained), "--seconds", "0.01", "--output", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_odd_clips_are_said(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    write_waveform(tmp_path / "clips" / "silent.wav", torch.zeros(900), RATE)
    write_waveform(tmp_path / "clips" / "loud.wav", torch.ones(900), RATE)
    output = str(tmp_path / "model")
    assert main(["train", str(tmp_path / "clips"), "--output", output, *FEW_STEPS, "--set", "drawn.clips=0"]) == 0
    message = capsys.readouterr().err
    assert "1 clips to train on are silent" in message and "1 clips to train on are clipped" in message


@pytest.mark.parametrize("name", recipe_names("audio"))
def test_every_recipe_describes_a_model(name):
    recipe = load_task_recipe(WaveformTrainingRecipe, name)
    with torch.device("meta"):
        model = WaveformModel(recipe.model_config())
    assert model.config.quantiser.sample_rate_hz in (8000, 16000)
    assert json.dumps(recipe.to_dict())


def test_the_recipes_of_the_digits_have_equal_numbers_of_parameters():
    counts = {}
    for name in recipe_names("audio"):
        if name.startswith("digits-"):
            with torch.device("meta"):
                model = WaveformModel(load_task_recipe(WaveformTrainingRecipe, name).model_config())
            counts[name] = sum(parameter.numel() for parameter in model.parameters())
    assert len(counts) == 4 and max(counts.values()) < 1.01 * min(counts.values())


@pytest.mark.parametrize("name", sorted(WaveformTrainingRecipe.aliases))
def test_earlier_names_of_recipes_are_the_recipe_sc09(name):
    earlier = load_task_recipe(WaveformTrainingRecipe, name)
    outer, centre = ("mamba", "mamba") if name == "mamba-sc09-6m" else name.split("-")[1:]
    now = load_task_recipe(WaveformTrainingRecipe, "sc09", [f"model.outer={outer}", f"model.centre={centre}"])
    assert earlier.model_config() == now.model_config() and earlier.batch == now.batch
    assert earlier.model == {"architecture": name}  # as runs recorded it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.outer=attention"], "model.outer is 'attention'; choose mamba, s4"),
        (["model.architecture=sashimi"], "apply to the architecture sc09, not to sashimi"),
    ],
)
def test_blocks_that_no_published_model_has_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        load_task_recipe(WaveformTrainingRecipe, "sc09", changes).model_config()


def test_the_section_of_samples_keeps_its_earlier_name_and_older_runs_their_fingerprint():
    earlier = load_task_recipe(WaveformTrainingRecipe, "tiny", ["drawn.clips=7"])
    assert earlier == load_task_recipe(WaveformTrainingRecipe, "tiny", ["samples.clips=7"])
    recorded = earlier.fingerprint()
    assert recorded["drawn"] == {"clips": 7, "seconds": 0.1}
    assert not recorded.keys() & {"samples", "preparation", "labels", "clock"}
    assert "preparation" in load_task_recipe(WaveformTrainingRecipe, "digits").fingerprint()


def test_a_model_learns_labels_and_is_asked_for_them(clips, tmp_path, capsys):
    model, output = str(tmp_path / "model"), tmp_path / "clips"
    labels = ["--labels", "digit=^([0-9])_", "--labels", r"take=_0?(\d+)\.wav"]
    change = ["--set", "preparation.target_rms=0.1", "--set", "preparation.end_seconds=0.01"]
    valid = ["--valid", "*_0[0-4].wav"]
    assert main(["train", str(clips), *valid, "--output", model, *FEW_STEPS, *labels, *change]) == 0
    said = capsys.readouterr().err
    assert "labels digit: 3 values (0, 1, 2)" in said
    assert "5 clips have no label take that training clips have" in said
    assert "bits/sample of held-out clips by digit: 0 " in said
    details = load_waveform_model(model)[1]
    assert details["label_rules"] == labels[1::2] and set(details["valid_bits_by_label"]["digit"]) == {"0", "1", "2"}
    asked = ["--label", "digit=each", "--label", "take=7", "--guidance", "1.5"]
    assert main(["generate", model, "--clips", "4", "--seconds", "0.01", *asked, "--output", str(output)]) == 0
    rows = list(csv.DictReader((output / "clips.tsv").open(), delimiter="\t"))
    assert [row["labels"] for row in rows] == [f"digit={digit},take=7" for digit in (0, 1, 2, 0)]
    assert main(["generate", model, "--label", "digit=9", "--output", str(tmp_path / "no")]) == 2
    assert "digit has no value '9'; choose 0, 1, 2" in capsys.readouterr().err


def test_a_clock_is_added_to_an_earlier_model_and_its_candidates_are_compared(clips, tmp_path, capsys):
    first, model, common = str(tmp_path / "first"), str(tmp_path / "clocked"), [str(clips), "--valid", "*_0[0-3].wav"]
    labels, change = ["--labels", "digit=^([0-9])_"], ["--set", "preparation.trim_db=40", "--set", "samples.clips=0"]
    assert main(["train", *common, "--output", first, *FEW_STEPS, *labels, *change]) == 0
    clock = ["--set", "clock.bins=8", "--set", "clock.by_label=true", "--set", "optimizer.learning_rate=1e-30"]
    started = ["train", *common, *FEW_STEPS, *labels, *change, *clock, "--from"]
    assert main([*started, first, "--output", model]) == 0
    before, after = (load_waveform_model(folder)[0] for folder in (first, model))
    assert before.config.clock.bins == 0 and after.config.clock.bins == 8
    assert {one.labels for one in after.config.clock.durations} == {(1,), (2,), (3,)}
    assert torch.allclose(after.head.weight, before.head.weight)  # where the training starts from
    assert load_waveform_model(model)[1]["start_from"] == first
    asked = ["--label", "digit=each", "--candidates", "3", "--clock", "0.02", "--seconds", "0.03", "--clips", "2"]
    assert main(["generate", model, *asked, "--threads", "1", "--output", str(tmp_path / "made")]) == 0
    assert "the best of 3 candidates each" in capsys.readouterr().err
    assert len(list((tmp_path / "made").glob("*.wav"))) == 2
    other = ["--output", str(tmp_path / "other")]
    for options, message in (
        ([*started, first, "--set", "model.model_width=4"], "has another model_width than the recipe"),
        ([*started[:-1], "--set", "clock.bins=5", "--from", model], "has another clock than the recipe"),
        (["train", *common, *FEW_STEPS, *change, "--from", first], "has other labels than these clips"),
    ):
        assert main([*options, *other]) == 2
        assert message in capsys.readouterr().err


def test_words_of_speech_commands_are_labels_by_themselves(tmp_path):
    words = ("one", "two")
    for word in words:
        (tmp_path / word).mkdir()
        for speaker in ("aa", "bb", "cc"):
            tone = 0.3 * torch.sin(torch.arange(300) * 0.3)
            write_waveform(tmp_path / word / f"{speaker}_nohash_0.wav", tone, RATE)
    (tmp_path / "validation_list.txt").write_text("one/bb_nohash_0.wav\ntwo/bb_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("one/cc_nohash_0.wav\n")
    split = read_split_clips(tmp_path, Quantiser(sample_rate_hz=RATE), words=words)
    assert split.label_sets == (LabelSet("word", words),)
    assert [clip.labels for clip in split.valid.clips] == [(1,), (2,)]
    assert read_split_clips(tmp_path, Quantiser(sample_rate_hz=RATE), words=words, labels=["none"]).label_sets == ()


@pytest.mark.parametrize("package", ["soundfile", "torchaudio"])
def test_without_the_extra_a_command_says_what_to_install(package, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.transforms", None)
    rate = ["--set", "quantiser.sample_rate_hz=4000"]
    assert main(["train", str(clips), "--output", str(tmp_path / "model"), *FEW_STEPS, *rate]) == 2
    said = capsys.readouterr().err
    assert f"audio needs the package {package}" in said and "pip install 'genomamba[audio]'" in said
    assert said.count("\n") == 1 and not (tmp_path / "model").exists()
