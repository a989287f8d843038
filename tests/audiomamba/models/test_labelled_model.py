"""The laws of a waveform model hold with labels, which are part of its state."""

import dataclasses
import json

import pytest
import torch

from audiomamba.data.labels import LabelSet
from audiomamba.data.preparation import ClipPreparation
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
from mambacore.longsequence import TokenCrossEntropy, backward_in_pieces
from tolerances import PIECES_FLOAT64, relative_error

LENGTH = 61
SELECTIVE = StageConfig(1, {"name": "selective", "state_size": 3})
S4D = StageConfig(1, {"name": "s4d", "state_size": 3, "convolution": False}, 2)
SETS = (LabelSet("digit", ("3", "7")), LabelSet("speaker", ("ann", "bob", "eve")))
LABELS = torch.tensor([[1, 0], [2, 3], [0, 0]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = WaveformModelConfig((SELECTIVE, S4D, SELECTIVE), 8, (2, 3), label_sets=SETS)
    return WaveformModel(config).double()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(256, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [30, 31], [0, 1, 2, 3, 5, 7, 11, 0, 13, 4, 4, 8, 3, 0]])
def test_pieces_and_steps_equal_the_whole(model, tokens, lengths):
    with torch.no_grad():
        whole, _ = model(tokens, model.labelled_state(LABELS))
        outputs, state = [], model.labelled_state(LABELS)
        for piece in tokens.split(lengths, dim=1):
            output, state = model(piece, state)
            outputs.append(output)
    assert relative_error(torch.cat(outputs, dim=1), whole) < PIECES_FLOAT64


def test_a_clip_does_not_depend_on_the_labels_beside_it(model, tokens):
    with torch.no_grad():
        together, _ = model(tokens, model.labelled_state(LABELS))
        for number in range(3):
            rows = slice(number, number + 1)
            alone, _ = model(tokens[rows], model.labelled_state(LABELS[rows]))
            assert relative_error(alone, together[rows]) < PIECES_FLOAT64


def test_no_labels_are_the_labels_that_say_nothing(model, tokens):
    with torch.no_grad():
        assert torch.equal(model(tokens)[0][2], model(tokens, model.labelled_state(LABELS))[0][2])


def test_training_in_pieces_gives_the_gradients_of_the_whole(model, tokens):
    targets = tokens.roll(-1, 1)
    total, count, _ = model.loss(tokens, targets, model.labelled_state(LABELS))
    model.zero_grad()
    (total / count).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert expected["label_embedding.tables.1.weight"].abs().sum(1).tolist()[1:3] == [0, 0]  # nobody is ann or bob
    model.zero_grad()
    backward_in_pieces(model, tokens, TokenCrossEntropy(targets), piece_length=13, state=model.labelled_state(LABELS))
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < PIECES_FLOAT64, name


@pytest.mark.skipif(
    steps_library(WaveformModel(WaveformModelConfig((SELECTIVE,), 8, ()))) is None, reason="no native library"
)
def test_native_steps_follow_the_model_with_labels(model, tokens):
    with torch.no_grad():
        logits, _ = model(tokens, model.labelled_state(LABELS))
        _, state = model(tokens[:, :20], model.labelled_state(LABELS))
    expected = torch.log_softmax(logits, -1)[:, :-1].gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
    steps = WaveformSteps(model, steps_library(model))
    found = steps.run(steps.memory(3, model.labelled_state(LABELS)), tokens[:, 0].clone(), 0, given=tokens[:, 1:])[1]
    assert relative_error(found, expected) < PIECES_FLOAT64
    later = steps.run(steps.memory(3, state), tokens[:, 20].clone(), 20, given=tokens[:, 21:])[1]
    assert relative_error(later, expected[:, 20:]) < PIECES_FLOAT64


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_generated_clips_depend_on_their_own_labels_and_number_alone(model, tokens, guidance):
    generator = WaveformGenerator(model)
    asked = {"digit": "each", "speaker": "eve"}
    options = {"seconds": 0.002, "seed": 3, "guidance": guidance, "prompt": tokens[0, :17]}
    together = generator.generate(4, labels=asked, **options)
    assert [one["digit"] for one in together.labels] == ["3", "7", "3", "7"]
    for number, labels in enumerate(together.labels):
        alone = generator.generate(1, labels=labels, first_clip=number, **options)
        assert torch.equal(alone.classes[0], together.classes[number])
        assert torch.equal(alone.log_likelihoods[0], together.log_likelihoods[number])
    with use_backend("torch"):
        composed = WaveformGenerator(model)
        assert not composed.is_native
        expected = composed.generate(4, labels=asked, **options)
    assert torch.equal(expected.classes, together.classes)
    assert relative_error(together.log_likelihoods, expected.log_likelihoods) < PIECES_FLOAT64


def test_guidance_moves_the_logits_away_from_those_without_labels(model):
    """With temperature 0 the likeliest class of u + g (c - u) is taken, and its likelihood is that under c."""
    generator = WaveformGenerator(model)
    found = generator.generate(1, 1 / 16_000, temperature=0, labels={"digit": "7"}, guidance=3)
    start = torch.full((1, 1), generator.quantiser.middle_class)
    with torch.no_grad():
        labelled = model(start, model.labelled_state(torch.tensor([[2, 0]])))[0][0, 0]
        unlabelled = model(start)[0][0, 0]
    chosen = (unlabelled + 3 * (labelled - unlabelled)).argmax()
    assert found.classes.tolist() == [[int(chosen)]]
    assert relative_error(found.log_likelihoods[0, 0], torch.log_softmax(labelled, -1)[chosen]) < PIECES_FLOAT64


def test_guidance_that_makes_no_sense_is_refused(model):
    generator = WaveformGenerator(model)
    with pytest.raises(InputError, match="ask for a label too"):
        generator.generate(1, 0.01, guidance=2)
    with pytest.raises(InputError, match="from 0 to 20"):
        generator.generate(1, 0.01, guidance=-1, labels={"digit": "7"})


def test_a_folder_keeps_labels_and_preparation_and_older_folders_load(model, tmp_path):
    preparation = ClipPreparation(target_rms=0.1, typical_gain=2.5)
    kept = WaveformModel(dataclasses.replace(model.config, preparation=preparation))
    save_waveform_model(tmp_path / "model", kept, details={})
    loaded, _ = load_waveform_model(tmp_path / "model")
    assert loaded.config == kept.config and loaded.config.label_sets == SETS
    plain = WaveformModel(WaveformModelConfig((SELECTIVE,), 8, ()))
    save_waveform_model(tmp_path / "older", plain, details={})
    path = tmp_path / "older" / "config.json"
    content = json.loads(path.read_text())
    del content["model"]["label_sets"], content["model"]["preparation"]
    path.write_text(json.dumps(content))
    assert load_waveform_model(tmp_path / "older")[0].config == plain.config


def test_a_prompt_gets_the_gain_of_the_training_clips_and_loses_it_again(model, tmp_path):
    import soundfile  # noqa: PLC0415 - to write floating samples

    tone = 0.01 * torch.sin(torch.arange(400) * 0.4)
    soundfile.write(tmp_path / "quiet.wav", tone.numpy(), 16_000, subtype="FLOAT")
    config = dataclasses.replace(model.config, preparation=ClipPreparation(target_rms=0.1, largest_gain=100))
    generator = WaveformGenerator(WaveformModel(config))
    found = generator.continue_clip(tmp_path / "quiet.wav", 0.001)
    assert found.gain == pytest.approx(0.1 / (0.01 / 2**0.5), rel=0.01)
    assert relative_error(found.samples[0, :400], tone * found.gain) < 0.05
    assert relative_error(found.samples_as_recorded[0, :400], tone) < 0.05
