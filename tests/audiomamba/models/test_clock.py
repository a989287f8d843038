"""The laws of a waveform model hold with a clock, which changes with time and is part of its state."""

import dataclasses
import json

import pytest
import torch

from audiomamba.data.clips import Clip, ClipCollection, ClipSampler
from audiomamba.data.clock import NO_CLOCK, QUANTILES, Clock, LabelDurations, label_durations
from audiomamba.data.labels import LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.generation import WaveformGenerator
from audiomamba.models import (
    StageConfig,
    WaveformModel,
    WaveformModelConfig,
    load_waveform_model,
    save_waveform_model,
)
from audiomamba.models.step_program import WaveformSteps, steps_library
from mambacore.backends import use_backend
from mambacore.errors import InputError
from mambacore.layers.step_weights import WEIGHT_FORMATS
from mambacore.longsequence import TokenCrossEntropy, backward_in_pieces
from tolerances import PIECES_FLOAT64, relative_error

LENGTH, BINS, PERIOD = 61, 5, 6
RATE = 1000
SELECTIVE = StageConfig(1, {"name": "selective", "state_size": 3})
S4D = StageConfig(1, {"name": "s4d", "state_size": 3, "convolution": False}, 2)
SETS = (LabelSet("digit", ("3", "7")), LabelSet("speaker", ("ann", "bob", "eve")))
LABELS = torch.tensor([[1, 0], [2, 3], [0, 0]])
# Durations and where the clips begin: within the piece, without a clock, and one that is nearly over.
CLOCKS = torch.tensor([[50, 7], [NO_CLOCK, 7], [31, 7]])
DURATIONS = (LabelDurations((1, 3), 2, (0.04, 0.05)), LabelDurations((2, 1), 1, (0.02, 0.02)))
ASKED = {"digit": "each", "speaker": "each"}

native = pytest.mark.skipif(
    steps_library(WaveformModel(WaveformModelConfig((SELECTIVE,), 8, ()))) is None, reason="no native library"
)


def clocked(by_label=True, sets=SETS, dtype=torch.float64):
    torch.manual_seed(0)
    config = WaveformModelConfig(
        (SELECTIVE, S4D, SELECTIVE),
        8,
        (2, 3),
        quantiser=Quantiser(sample_rate_hz=RATE),
        label_sets=sets,
        clock=Clock(BINS, by_label, DURATIONS if sets else (LabelDurations((), 4, (0.03, 0.05)),)),
    )
    model = WaveformModel(config)
    with torch.no_grad():
        for table in model.clock_embedding.tables:
            table.weight.normal_()
        model.head.weight.mul_(8)  # far from uniform
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["by label", "for all"])
def model(request):
    return clocked(request.param)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(256, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def test_bins_are_the_share_of_the_duration_and_change_with_whole_groups(model):
    positions = torch.arange(70)
    bins = model.clock_embedding.bins_at(torch.tensor([[50], [NO_CLOCK]]), positions)
    assert (bins[1] == NO_CLOCK).all() and bins[0, :50].unique().tolist() == [1, 2, 3, 4, 5]
    assert (bins[0, 54:] == BINS + 1).all()  # after the end, from the next group on
    assert (positions[1:][bins[0, 1:] != bins[0, :-1]] % PERIOD == 0).all()
    assert ((bins[0, :50] - 1) * 50 / BINS <= positions[:50]).all()


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [30, 31], [0, 1, 2, 3, 5, 7, 11, 0, 13, 4, 4, 8, 3, 0]])
def test_pieces_and_steps_equal_the_whole(model, tokens, lengths):
    with torch.no_grad():
        whole, _ = model(tokens, model.labelled_state(LABELS, CLOCKS))
        outputs, state = [], model.labelled_state(LABELS, CLOCKS)
        for piece in tokens.split(lengths, dim=1):
            output, state = model(piece, state)
            outputs.append(output)
    assert relative_error(torch.cat(outputs, dim=1), whole) < PIECES_FLOAT64


def test_a_clip_does_not_depend_on_the_clocks_beside_it(model, tokens):
    with torch.no_grad():
        together, _ = model(tokens, model.labelled_state(LABELS, CLOCKS))
        for number in range(3):
            rows = slice(number, number + 1)
            alone, _ = model(tokens[rows], model.labelled_state(LABELS[rows], CLOCKS[rows]))
            assert relative_error(alone, together[rows]) < PIECES_FLOAT64
        without, _ = model(tokens, model.labelled_state(LABELS))
    assert relative_error(without[1], together[1]) < PIECES_FLOAT64  # a duration of 0 is no clock
    assert relative_error(without[0], together[0]) > 0.01


def test_training_in_pieces_gives_the_gradients_of_the_whole(model, tokens):
    targets = tokens.roll(-1, 1)
    total, count, _ = model.loss(tokens, targets, model.labelled_state(LABELS, CLOCKS))
    model.zero_grad()
    (total / count).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert expected["clock_embedding.tables.0.weight"].abs().sum() > 0
    model.zero_grad()
    state = model.labelled_state(LABELS, CLOCKS)
    backward_in_pieces(model, tokens, TokenCrossEntropy(targets), piece_length=13, state=state)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < PIECES_FLOAT64, name


@native
def test_native_steps_follow_the_model_through_its_bins(model, tokens):
    begin = CLOCKS * torch.tensor([1, 0])
    with torch.no_grad():
        logits, _ = model(tokens, model.labelled_state(LABELS, begin))
        _, state = model(tokens[:, :20], model.labelled_state(LABELS, begin))
    expected = torch.log_softmax(logits, -1)[:, :-1].gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
    steps, conditions = WaveformSteps(model, steps_library(model)), (LABELS, begin[:, 0])
    memory = steps.memory(3, model.labelled_state(LABELS, begin))
    found = steps.run(memory, tokens[:, 0].clone(), 0, given=tokens[:, 1:], conditions=conditions)[1]
    assert relative_error(found, expected) < PIECES_FLOAT64
    later = steps.run(steps.memory(3, state), tokens[:, 20].clone(), 20, given=tokens[:, 21:], conditions=conditions)[1]
    assert relative_error(later, expected[:, 20:]) < PIECES_FLOAT64


@pytest.mark.parametrize("options", [{}, {"guidance": 2.5}, {"clock": 0.037}, {"clock": 0.0}, {"prompt": 17}])
def test_clips_depend_on_their_own_request_alone(model, tokens, options):
    options = {"seconds": 0.06, "seed": 3, **options}
    if "prompt" in options:
        options["prompt"] = tokens[0, :17]
    generator = WaveformGenerator(model)
    together = generator.generate(4, labels=ASKED, **options)
    for number, labels in enumerate(together.labels):
        alone = generator.generate(1, labels=labels, first_clip=number, **options)
        assert torch.equal(alone.classes[0], together.classes[number])
        assert torch.equal(alone.log_likelihoods[0], together.log_likelihoods[number])
        pieces = list(generator.stream(labels=labels, number=number, samples_at_once=7, **options))
        assert torch.equal(torch.cat(pieces), together.samples[number])
    with use_backend("torch"):
        composed = WaveformGenerator(model)
        assert not composed.is_native
        expected = composed.generate(4, labels=ASKED, **options)
    assert torch.equal(expected.classes, together.classes)
    assert relative_error(together.log_likelihoods, expected.log_likelihoods) < PIECES_FLOAT64


@native
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_rounded_clips_depend_on_their_own_request_alone(weight_format):
    generator = WaveformGenerator(clocked(dtype=torch.float32), weight_format)
    many = generator.generate(3, 0.05, seed=9, labels=ASKED)
    alone = generator.generate(1, 0.05, seed=9, labels=many.labels[2], first_clip=2)
    assert torch.equal(alone.classes[0], many.classes[2])


@pytest.mark.parametrize("before", [0, 17])
def test_the_likelihoods_are_those_of_the_model_with_the_clock(model, tokens, before):
    """By default the clock of a continuation ends with it, and that of a new clip with one of the training clips."""
    generator = WaveformGenerator(model)
    prompt = tokens[0, :before] if before else None
    found = generator.generate(1, 0.043, labels={"digit": "7", "speaker": "ann"}, prompt=prompt)
    duration = before + 43 if before else 20  # `DURATIONS`
    inputs = torch.cat([torch.full((1, 1), generator.quantiser.middle_class), found.classes[:, :-1]], dim=1)
    with torch.no_grad():
        logits, _ = model(inputs, model.labelled_state(torch.tensor([[2, 1]]), torch.tensor([[duration, 0]])))
    expected = torch.log_softmax(logits, -1).gather(2, found.classes.unsqueeze(2)).squeeze(2)[:, before:]
    assert relative_error(found.log_likelihoods, expected) < PIECES_FLOAT64


def test_a_clock_needs_no_labels(tokens):
    generator = WaveformGenerator(clocked(by_label=True, sets=()))
    together = generator.generate(3, 0.06, seed=1)
    alone = generator.generate(1, 0.06, seed=1, first_clip=2)
    assert torch.equal(alone.classes[0], together.classes[2])
    assert generator.generate(1, 0.02, prompt=tokens[0, :9]).classes.shape == (1, 29)


def test_durations_are_those_of_clips_with_the_labels():
    found = label_durations([((1, 1), 0.2), ((1, 1), 0.4), ((2, 1), 1.0)])
    assert [(one.labels, one.clips, len(one.seconds)) for one in found] == [
        ((1, 1), 2, QUANTILES), ((2, 1), 1, QUANTILES),
    ]  # fmt: skip
    clock = Clock(4, durations=found)
    assert clock.typical_seconds((1, 1), (0.9, 0.25)) == pytest.approx(0.25)
    assert clock.typical_seconds((0, 0), (0.9, 0.5)) == 1.0 and clock.typical_seconds((0, 1), (0.6, 0.5)) < 0.4
    assert clock.typical_seconds((1, 2), (0.9, 0.5)) == 1.0  # no clip has these labels: any of them
    with pytest.raises(InputError, match="no durations"):
        Clock(4).typical_seconds((), (0.5, 0.5))


def test_the_sampler_drops_the_clock_by_itself():
    quantiser = Quantiser(sample_rate_hz=RATE)
    clips = ClipCollection(
        (Clip("a", torch.arange(30) % 256, (1, 2)), Clip("b", torch.arange(90) % 256, (2, 1))), quantiser
    )
    examples = [
        ClipSampler(clips, 40, 0, silence_after=5, drop_labels=0.5, drop_clock=0.5).sample(n) for n in range(200)
    ]
    kept = [example for example in examples if int(example.clock[0]) != NO_CLOCK]
    assert 70 < len(kept) < 130
    assert {int(example.clock[0]) for example in kept} == {30, 90}
    for example in kept:
        assert int(example.targets[0]) == int(example.clock[1])  # the clips count their own samples
    assert any(int(example.labels.sum()) == 0 for example in kept)
    assert any(int(example.labels.sum()) > 0 for example in examples if int(example.clock[0]) == NO_CLOCK)


def test_a_folder_keeps_the_clock_and_older_folders_load(tmp_path):
    model = clocked(dtype=torch.float32)
    save_waveform_model(tmp_path / "model", model, details={})
    assert load_waveform_model(tmp_path / "model")[0].config == model.config
    plain = WaveformModel(WaveformModelConfig((SELECTIVE,), 8, ()))
    save_waveform_model(tmp_path / "older", plain, details={})
    path = tmp_path / "older" / "config.json"
    content = json.loads(path.read_text())
    del content["model"]["clock"]
    path.write_text(json.dumps(content))
    older = load_waveform_model(tmp_path / "older")[0]
    assert older.config == plain.config and older.clock_embedding is None
    for damage in ({"bins": -1}, {"bins": 3, "durations": [{"labels": [1], "clips": 1}]}, {"ticks": 3}, [3]):
        path.write_text(json.dumps({**content, "model": {**content["model"], "clock": damage}}))
        with pytest.raises(InputError, match="clock"):
            load_waveform_model(tmp_path / "older")


def test_what_makes_no_sense_is_refused(model):
    plain = WaveformGenerator(WaveformModel(WaveformModelConfig((SELECTIVE,), 8, ())))
    with pytest.raises(InputError, match="without a clock"):
        plain.generate(1, 0.01, clock=0.5)
    with pytest.raises(InputError, match="runs for -1 seconds"):
        WaveformGenerator(model).generate(1, 0.01, clock=-1)
    with pytest.raises(InputError, match="other label sets"):
        dataclasses.replace(model.config, label_sets=SETS[:1])
