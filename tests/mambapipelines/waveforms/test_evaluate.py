"""The commands `audiomamba train-classifier` and `audiomamba evaluate`, end to end on tones that take seconds."""

import csv
import math
import os
import shutil
import signal

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

from audiomamba.metrics.likelihood import file_likelihoods, recording_likelihood
from audiomamba.models import load_waveform_model
from audiomamba.models.clip_classifier import load_clip_classifier
from mambapipelines.cli.audiomamba.main import main
from mambapipelines.waveforms.train_classifier import ClassifierTask

RATE = 8000
PATTERNS = ("--valid", "*_1[0-4].wav", "--test", "*_[5-9].wav")
LABELS = ("--label-pattern", "^([0-9])_")
TRAINING = (*PATTERNS, *LABELS, "--sample-rate", "8000", "--clip-seconds", "0.25", "--size", "tiny", "--threads", "1")
FAST = ("--resamples", "20", "--threads", "1")


def write_tone(path, frequency_hz, random, rate=RATE, seconds=0.2):
    time = np.arange(round(seconds * rate * random.uniform(0.6, 1))) / rate
    tone = 0.3 * np.sin(2 * np.pi * frequency_hz * random.uniform(0.9, 1.1) * time)
    soundfile.write(path, tone + 0.003 * random.standard_normal(len(time)), rate)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Three classes of tones, as 60 files; takes 5 to 9 are for the test and 10 to 14 for validation."""
    folder, random = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    for label, frequency_hz in enumerate((300, 900, 2700)):
        for take in range(5, 25):
            write_tone(folder / f"{label}_ann_{take}.wav", frequency_hz, random)
    return folder


@pytest.fixture(scope="module")
def classifier(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "trained"
    assert main(["train-classifier", str(digits), *TRAINING, "--steps", "80", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def models(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    command = ["train", str(digits), "--recipe", "tiny", *PATTERNS, "--threads", "1", "--set", "drawn.clips=0"]
    for name, steps, seed in (("long", "25", "0"), ("short", "1", "7")):
        assert main([*command, "--steps", steps, "--seed", seed, "--output", str(folder / name)]) == 0
    return folder


def table_of(text):
    return {row["set"]: row for row in csv.DictReader(text.splitlines(), delimiter="\t")}


def sentence(command, capsys):
    """What a command that must fail says, in one line."""
    capsys.readouterr()
    assert main(command) == 2
    written = capsys.readouterr()
    assert "Traceback" not in written.err and not written.out
    return written.err.splitlines()[-1]


def test_the_classifier_learns_the_tones_and_says_how_well(classifier):
    details = load_clip_classifier(classifier)[1]
    assert details["test_accuracy"] >= 0.8
    assert details["clips"] == {"train": 30, "valid": 15, "test": 15}


def test_a_tiny_train_generate_evaluate_run_ends_in_one_table(digits, classifier, models, tmp_path, capsys):
    generated, output = tmp_path / "generated", tmp_path / "scores"
    assert (
        main(["generate", str(models / "short"), "--clips", "12", "--seconds", "0.25", "--output", str(generated)]) == 0
    )
    capsys.readouterr()
    command = [
        f"a={models / 'long'}",
        f"b={models / 'short'}",
        "--clips",
        f"b={generated}",
        "--clips",
        f"c={generated}",
    ]
    command += ["--generate", "12", "--data", str(digits), *PATTERNS, *LABELS, "--classifier", str(classifier), *FAST]
    assert main(["evaluate", *command, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert (output / "metrics.tsv").read_text() == text
    assert (output / "metrics.png").read_bytes().startswith(b"\x89PNG")
    rows = table_of(text)
    assert list(rows) == ["train data", "test data", "a", "b", "c", "shuffled noise", "silence"]
    assert (rows["a"]["seed"], rows["b"]["seed"], rows["c"]["seed"]) == ("0", "7", "NA")
    assert float(rows["a"]["bits_per_sample"]) < float(rows["b"]["bits_per_sample"])
    assert [rows["b"][score] for score in ("FID", "IS", "mIS", "AM")] == [
        rows["c"][score] for score in ("FID", "IS", "mIS", "AM")
    ]
    for row in rows.values():
        for score in ("FID", "IS", "mIS", "AM"):
            low, value, high = (float(row[f"{score}{end}"]) for end in ("_low", "", "_high"))
            assert 0 <= low <= high and math.isfinite(value)
    assert float(rows["test data"]["FID"]) < float(rows["shuffled noise"]["FID"])
    assert float(rows["test data"]["classifier_accuracy"]) >= 0.8
    assert float(rows["silence"]["mIS"]) == 1
    per_clip = list(csv.DictReader((output / "likelihoods.tsv").open(), delimiter="\t"))
    assert [(row["model"], row["clip"]) for row in per_clip[14:16]] == [("a", "2_ann_9.wav"), ("b", "0_ann_5.wav")]


def test_generating_in_evaluate_is_what_generate_writes(digits, classifier, models, tmp_path, capsys):
    generated = tmp_path / "generated"
    assert main(["generate", str(models / "long"), "--clips", "10", "--seconds", "0.25", "--seed", "3", "--output",
                 str(generated)]) == 0  # fmt: skip
    command = ["evaluate", "--data", str(digits), *PATTERNS, *LABELS, "--classifier", str(classifier), *FAST]
    command += ["--seed", "3"]
    capsys.readouterr()
    assert main([*command, str(models / "long"), "--generate", "10", "--clips", f"files={generated}"]) == 0
    rows = table_of(capsys.readouterr().out)
    for score in ("FID", "IS", "AM"):  # the files have 16 bits
        assert float(rows["long"][score]) == pytest.approx(float(rows["files"][score]), rel=1e-2, abs=1e-3)


def test_likelihoods_alone_need_no_labels_and_are_those_of_the_loss(digits, models, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(12):
        shutil.copy(digits / f"{number % 3}_ann_{5 + number // 3}.wav", flat / f"{number}.wav")
    assert main(["evaluate", str(models / "long"), "--data", str(flat), "--test", "[0-4].wav", *FAST]) == 2
    (flat / "extra.wav").write_bytes((flat / "0.wav").read_bytes())
    assert main(["evaluate", str(models / "long"), "--data", str(flat), "--test", "[0-9]*.wav", *FAST]) == 0
    row = table_of(capsys.readouterr().out)["long"]
    model = load_waveform_model(models / "long")[0].eval()
    nats = samples = 0
    for number in range(12):
        classes = model.config.quantiser.encode(
            torch.from_numpy(soundfile.read(flat / f"{number}.wav", dtype="float32")[0])
        )
        inputs = torch.cat([torch.tensor([model.config.quantiser.middle_class]), classes[:-1].long()])
        with torch.no_grad():
            nats += float(F.cross_entropy(model(inputs.unsqueeze(0))[0][0], classes.long(), reduction="sum"))
        samples += len(classes)
    assert float(row["nats_per_sample"]) == pytest.approx(nats / samples, abs=2e-4)
    assert float(row["bits_per_sample"]) == pytest.approx(nats / samples / math.log(2), abs=2e-4)


def test_words_choose_by_label_with_and_without_a_classifier(digits, classifier, models, capsys):
    unlabelled = ["evaluate", str(models / "long"), "--data", str(digits), *PATTERNS, "--words", "0,2", *FAST]
    command = [*unlabelled, *LABELS]
    assert main(command) == 0
    assert main([*command, "--classifier", str(classifier)]) == 0
    written = capsys.readouterr()
    assert "\ntest data\t10\t" in written.out
    assert "group" in sentence([*unlabelled, "--label-pattern", "[0-9]"], capsys)


def test_a_clip_of_any_length_goes_through_in_pieces_and_in_any_order(models, tmp_path):
    model, random = load_waveform_model(models / "long")[0].eval(), np.random.default_rng(1)
    paths = []
    for number, seconds in enumerate((0.5, 0.02, 0.3, 0.05)):
        paths.append(tmp_path / f"{number}.wav")
        write_tone(paths[-1], 500, random, rate=16_000 if number == 2 else RATE, seconds=seconds)
    largest = []
    hidden = model.hidden
    model.hidden = lambda inputs, state=None: largest.append(inputs.numel()) or hidden(inputs, state)
    found = file_likelihoods(model, paths, piece_samples=700)
    assert max(largest) <= 700
    whole = [recording_likelihood(model, path) for path in paths]
    assert [one.samples for one in found] == [one.samples for one in whole]
    assert [one.nats for one in found] == pytest.approx([one.nats for one in whole], rel=1e-5)


def test_an_interrupted_classifier_resumes_to_the_same_weights(digits, tmp_path, monkeypatch, capsys):
    command = ["train-classifier", str(digits), *TRAINING, "--steps", "4", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    loss, calls = ClassifierTask.loss, []

    def interrupted(task, replica, micro_batch):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(task, replica, micro_batch)

    monkeypatch.setattr(ClassifierTask, "loss", interrupted)
    assert main([*command, str(tmp_path / "cut")]) == 143 and not (tmp_path / "cut" / "config.json").exists()
    monkeypatch.setattr(ClassifierTask, "loss", loss)
    assert "--resume" in sentence([*command, str(tmp_path / "cut")], capsys)
    assert main([*command, str(tmp_path / "cut"), "--resume"]) == 0
    expected, found = (load_clip_classifier(tmp_path / name)[0].state_dict() for name in ("whole", "cut"))
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert "--seed was 0 and is now 1" in sentence([*command, str(tmp_path / "cut"), "--resume", "--seed", "1"], capsys)


def test_clips_of_other_rates_silence_and_noise_are_scored(digits, classifier, tmp_path, capsys):
    random = np.random.default_rng(2)
    for number in range(12):
        write_tone(tmp_path / f"{number}.flac", (300, 900, 2700)[number % 3], random, rate=22_050)
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), RATE)
    assert main(["evaluate", "--data", str(digits), *PATTERNS, *LABELS, "--classifier", str(classifier), "--clips",
                 f"other rate={tmp_path}", *FAST]) == 0  # fmt: skip
    rows = table_of(capsys.readouterr().out)
    assert rows["other rate"]["clips"] == "13"
    assert float(rows["other rate"]["FID"]) < float(rows["shuffled noise"]["FID"])


def test_bad_files_end_both_commands_or_are_left_out_by_name(digits, classifier, models, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    (data / "1_bad_7.wav").write_bytes(b"no sound")
    soundfile.write(data / "1_empty_20.wav", np.zeros(0), RATE)
    train = ["train-classifier", str(data), *TRAINING, "--steps", "1", "--output", str(tmp_path / "out")]
    assert "1_empty_20.wav holds no samples" in sentence(train, capsys)
    assert not (tmp_path / "out" / "config.json").exists()
    assert main([*train, "--skip-bad"]) == 0
    assert "2 files in all are left out" in capsys.readouterr().err
    evaluate = ["evaluate", str(models / "long"), "--data", str(data), *PATTERNS, *LABELS, *FAST]
    evaluate += ["--classifier", str(classifier), "--output", str(tmp_path / "scores")]
    assert "1_bad_7.wav cannot be read" in sentence(evaluate, capsys)
    assert not list((tmp_path / "scores").iterdir())
    assert main([*evaluate, "--skip-bad"]) == 0
    written = capsys.readouterr()
    assert written.err.count("left out: ") == 2
    assert "\ntest data\t15\t" in written.out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--label-pattern", "^([0-9])_", "--words", "1"), "all labelled '1'"),
        ((), "give --label-pattern"),
        (("--label-pattern", "^(x)"), "finds no label"),
        (("--label-pattern", "^([0-9])_", "--words", "9"), "has no clips of the words 9"),
        (("--label-pattern", "^([0-9])_", "--set", "noise.share=2"), "share from 0 to 1"),
    ],
)
def test_train_classifier_refuses_what_it_cannot_learn(digits, tmp_path, capsys, change, expected):
    command = ["train-classifier", str(digits), *PATTERNS, *change, "--size", "tiny", "--steps", "1"]
    assert expected in sentence([*command, "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_label_without_training_clips_is_refused(digits, tmp_path, capsys):
    command = ["train-classifier", str(digits), *LABELS, "--test", "2_*.wav", "--steps", "1", "--size", "tiny"]
    assert "'2', which no training clip has" in sentence([*command, "--output", str(tmp_path / "out")], capsys)


def test_evaluate_refuses_what_makes_no_sense(digits, classifier, models, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    data = ("--data", str(digits), *PATTERNS, *LABELS)
    judged = ("--classifier", str(classifier))
    model = str(models / "long")
    for arguments, expected in (
        ((*data,), "nothing to score"),
        ((*data, "--generate", "12"), "needs a MODEL"),
        ((model, *data, "--generate", "12"), "--classifier"),
        ((model, *data, *judged, "--generate", "3"), "use 10 or more"),
        ((model, model, *data), "are named 'long'"),
        ((f"silence={model}", *data), "row of its own"),
        ((model, "--data", str(digits)), "no test clips"),
        ((model, "--data", str(tmp_path / "nothing"), *PATTERNS), "no audio file"),
        ((str(tmp_path / "missing"), *data), "missing"),
        ((*data, "--classifier", str(tmp_path / "missing")), "missing"),
        ((*data, "--classifier", model), "not a clip classifier"),
        ((*data, *judged, "--clips", str(tmp_path / "nothing")), "no audio file"),
        ((model, *data, "--output", str(digits / "0_ann_5.wav")), "cannot be made"),
        ((*data, *judged, "--label-pattern", "ann_([0-9])"), "does not have"),
    ):
        assert expected in sentence(["evaluate", *arguments, *FAST], capsys), arguments


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_classifier_is_refused(digits, classifier, tmp_path, capsys, name):
    damaged = tmp_path / "damaged"
    shutil.copytree(classifier, damaged)
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    command = ["evaluate", "--data", str(digits), *PATTERNS, *LABELS, "--classifier", str(damaged), *FAST]
    assert "damaged" in sentence(command, capsys)


def test_fewer_clips_than_scores_need_are_refused(digits, classifier, tmp_path, capsys):
    write_tone(tmp_path / "one.wav", 300, np.random.default_rng(0))
    command = ["evaluate", "--data", str(digits), *PATTERNS, *LABELS, "--classifier", str(classifier), *FAST]
    assert "at least 10" in sentence([*command, "--clips", f"few={tmp_path}"], capsys)
