"""Of several candidates the clip is kept that fits its labels best, whatever else is generated beside it."""

import dataclasses

import pytest
import torch

from audiomamba.candidates import best_candidates
from audiomamba.data.labels import UNLABELLED, LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.sampling_settings import SamplingSettings
from audiomamba.data.waveforms import Waveform
from audiomamba.generation import WaveformGenerator
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig
from audiomamba.models.clip_classifier import (
    ClipClassifier,
    ClipClassifierConfig,
    load_clip_classifier,
    save_clip_classifier,
)
from audiomamba.models.log_mel import LogMelConfig
from mambacore.errors import InputError
from tolerances import PIECES_FLOAT64, relative_error

SELECTIVE = StageConfig(1, {"name": "selective", "state_size": 3})
ASKED = {"digit": "each"}


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    sets = (LabelSet("digit", ("3", "7", "9")), LabelSet("speaker", ("anna",)))
    model = WaveformModel(
        WaveformModelConfig((SELECTIVE, SELECTIVE), 8, (2,), quantiser=Quantiser(sample_rate_hz=1000), label_sets=sets)
    )
    with torch.no_grad():
        for table in model.label_embedding.tables:
            table.weight.mul_(20)
        model.head.weight.mul_(8)
    return WaveformGenerator(model.double())


def margins(model, clips, labels):
    """log p(clip | labels) - the highest log p(clip | one label replaced) of (clips, samples), from the logits."""
    inputs = torch.cat([torch.full((len(clips), 1), model.config.quantiser.middle_class), clips[:, :-1]], dim=1)
    digit, speaker = labels
    others = [(other, speaker) for other in (1, 2, 3) if other != digit]
    found = []
    for row in (labels, *others, *([(digit, UNLABELLED)] if speaker else [])):
        with torch.no_grad():
            logits, _ = model(inputs, model.labelled_state(torch.tensor(row).expand(len(clips), 2)))
        found.append(torch.log_softmax(logits, -1).gather(2, clips.unsqueeze(2)).sum((1, 2)))
    return found[0] - torch.stack(found[1:]).amax(0)


def test_the_candidate_that_is_told_apart_best_is_kept(generator):
    clips = torch.randint(256, (3, 7, 40), generator=torch.Generator().manual_seed(1))
    rows, clocks = torch.tensor([[1, 0], [2, 0], [3, 1]]), torch.zeros(3, dtype=torch.int64)
    chosen = best_candidates(generator.model, clips, rows, clocks)
    expected = [
        int(margins(generator.model, of_clip, row).argmax()) for of_clip, row in zip(clips, rows.tolist(), strict=True)
    ]
    assert chosen.tolist() == expected
    clips[0, expected[0]] = generator.quantiser.middle_class  # silence loses
    again = best_candidates(generator.model, clips, rows, clocks)
    assert again[0] != expected[0] and again[1:].tolist() == expected[1:]
    # What comes after the end of the clock does not count.
    clips[1, :, 30:] = torch.randint(256, (7, 10), generator=torch.Generator().manual_seed(2))
    expected[1] = int(margins(generator.model, clips[1, :, :30], (2, 0)).argmax())
    assert best_candidates(generator.model, clips[1:2], rows[1:2], torch.tensor([30])).tolist() == expected[1:2]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_choice_depends_on_seed_and_number_alone(generator, guidance):
    options = {"seconds": 0.04, "seed": 5, "labels": ASKED, "guidance": guidance}
    one, best = generator.generate(6, **options), generator.generate(6, candidates=4, **options)
    assert best.classes.shape == one.classes.shape and best.labels == one.labels and best.numbers == one.numbers
    improved = [
        margins(generator.model, clips[number : number + 1], (number % 3 + 1, 0)).item()
        for number in range(6)
        for clips in (best.classes, one.classes)
    ]
    pairs = list(zip(improved[::2], improved[1::2], strict=True))
    assert all(kept >= first - PIECES_FLOAT64 for kept, first in pairs)  # the first candidate is the clip without any
    assert any(kept > first for kept, first in pairs)
    alone = generator.generate(1, candidates=4, first_clip=3, **{**options, "labels": best.labels[3]})
    assert torch.equal(alone.classes[0], best.classes[3])
    assert relative_error(alone.log_likelihoods[0], best.log_likelihoods[3]) < PIECES_FLOAT64


@pytest.fixture
def classifier_folder(tmp_path):
    """A classifier that tells the digits apart, in an order of its own, and one that knows none of them."""
    torch.manual_seed(3)
    pictures = LogMelConfig(sample_rate_hz=4000, seconds=0.1, bands=4, frames=4)
    for name, classes in (("judge", ("9", "3", "0", "7")), ("stranger", ("yes", "no"))):
        sizes = {"stem_width": 2, "stage_width": 4, "blocks_per_stage": 1, "cardinality": 1, "base_width": 2}
        classifier = ClipClassifier(ClipClassifierConfig(classes, pictures, **sizes))
        save_clip_classifier(tmp_path / name, classifier.eval(), details={})
    return tmp_path


def test_a_classifier_can_be_the_judge(generator, classifier_folder):
    judge = str(classifier_folder / "judge")
    options = {"seconds": 0.05, "seed": 5, "labels": ASKED, "candidates": 4}
    best = generator.generate(3, judge=judge, **options)
    classifier, _ = load_clip_classifier(judge)
    for number, asked in enumerate(("3", "7", "9")):
        streams = {"seconds": 0.05, "seed": 5, "first_clip": number, "labels": {"digit": asked}}
        begun = generator._begin(1, 0.05, 5, {"digit": asked}, SamplingSettings(candidates=4), None, None, number)
        pieces = list(begun.pieces(generator._walk(begun), 1024))
        found = torch.cat([chosen for _, chosen, _ in pieces], dim=1)
        assert torch.equal(found[0], generator.generate(1, **streams).classes[0])
        fitted = torch.stack([classifier.fitted(Waveform(generator.quantiser.decode(one), 1000)) for one in found])
        with torch.no_grad():
            scores = classifier(fitted).log_softmax(-1)[:, ("9", "3", "0", "7").index(asked)]
        assert torch.equal(best.classes[number], found[int(scores.argmax())])


def test_a_judge_that_knows_no_label_is_refused_and_one_suggested_is_passed_over(generator, classifier_folder):
    stranger = str(classifier_folder / "stranger")
    options = {"seconds": 0.02, "labels": ASKED, "candidates": 3}
    with pytest.raises(InputError, match=r"stranger tells none of the labels apart that were asked for \(digit\)"):
        generator.generate(1, judge=stranger, **options)
    with pytest.raises(InputError, match="two or more"):
        generator.generate(1, 0.02, labels=ASKED, judge=stranger)
    suggesting = WaveformModel(dataclasses.replace(generator.model.config, sampling=SamplingSettings(judge=stranger)))
    suggesting.double().load_state_dict(generator.model.state_dict())
    found = WaveformGenerator(suggesting).generate(2, **options)
    assert torch.equal(found.classes, generator.generate(2, **options).classes)


def test_candidates_that_cannot_be_compared_are_refused(generator):
    with pytest.raises(InputError, match="ask for a label too"):
        generator.generate(1, 0.01, candidates=2)
    with pytest.raises(InputError, match="1 to 256"):
        generator.generate(1, 0.01, candidates=0, labels=ASKED)
