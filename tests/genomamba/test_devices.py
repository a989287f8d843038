"""Every model of DNA trains, is saved, read and used on a device as on the CPU, in both precisions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import genomamba
from genomamba.classification.records import RecordClassifier, Share
from genomamba.data.targets import TargetDescription
from genomamba.io.vcf import HaplotypeWindows
from genomamba.models.language_model import save_language_model
from genomamba.models.sequence_model import SequenceModel, save_sequence_model, sequence_model_on
from genomamba.models.species_classifier import SpeciesClassifier, save_classifier
from genomamba.prediction.loss import SequenceLoss
from genomamba.prediction.predict import predict_sequences
from genomamba.scoring.likelihood import base_losses
from genomamba.scoring.variant_scores import VariantScorer
from genomamba.tokenizer import CharacterTokenizer
from mambacore import devices
from mambacore.errors import InputError
from model_laws import PRECISIONS, train_alike
from on_pretend import first_process, passed_on_pretend
from tiny_language_models import language_model
from tiny_species import bases, combined_model, random_bases, tiny_model
from tolerances import DEVICE_FLOAT32, relative_error

LETTERS = bases(70).decode()
HEADS = {
    "classes": TargetDescription("classes", ("kind",), ("a", "b", "c")),
    "labels": TargetDescription("labels", ("one", "two")),
    "numbers": TargetDescription("numbers", ("one",), means=(1.0,), deviations=(2.0,)),
}
precisions = pytest.mark.parametrize("precision", PRECISIONS)


def on(place, array):
    return torch.from_numpy(np.ascontiguousarray(array)).to(place)


def same_numbers(found, expected):
    """Whether two results have the same numbers, and all else is equal."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (found, expected))
    assert relative_error(torch.from_numpy(one), torch.from_numpy(other)) < DEVICE_FLOAT32


@precisions
@pytest.mark.parametrize("kind", ["causal", "contexts", "hybrid", "masked", "equivariant"])
def test_language_models(kind, precision, device, tmp_path):
    tokens = np.stack([random_bases(40, seed).astype(np.int64) for seed in range(2)])

    def loss_of(model, place):
        read = on(place, tokens)
        causal = hasattr(model, "generate")
        logits = model(read)[0][:, :-1] if causal else model(read)
        return F.cross_entropy(logits.flatten(0, 1).float(), (read[:, 1:] if causal else read).flatten())

    wrapped = language_model(kind)
    model = train_alike(wrapped.model.float().train(), loss_of, device, precision).eval()
    save_language_model(tmp_path / "model", model, {})
    used, plain = (genomamba.load(tmp_path / "model", device=place) for place in (device, "cpu"))
    same_numbers(used.embed(LETTERS).vectors, plain.embed(LETTERS).vectors)
    same_numbers(
        *(
            [score.log_likelihood_ratio, score.embedding_distance]
            for one in (used, plain)
            for score in VariantScorer(one.model).score([HaplotypeWindows(b"ACGTACGT", b"ACCAT", b"GCCAT", 5, 1, True)])
        )
    )
    read = torch.from_numpy(tokens)
    same_numbers(base_losses(used.model, read), base_losses(plain.model, read))
    if used.model.objective == "causal":
        found, expected = (one.generate(20, prompt="ACGTT", records=2).rows for one in (used, plain))
        assert [row[:2] for row in found] == [row[:2] for row in expected]


@precisions
def test_the_species_classifier(precision, device, tmp_path):
    tokens = np.stack([random_bases(48, seed) for seed in range(2)])
    labels = np.array([0, 2])
    model = train_alike(
        tiny_model().train(), lambda model, place: sum(model.loss(on(place, tokens), on(place, labels)).values()),
        device, precision,
    ).eval()  # fmt: skip
    counted = combined_model(gated=True)
    model.parts, model.combination = counted.parts, counted.combination
    save_classifier(tmp_path / "model", model, details={})
    used, plain = (genomamba.load(tmp_path / "model", device=place) for place in (device, "cpu"))
    one, other = used.classify(LETTERS).rows[0], plain.classify(LETTERS).rows[0]
    numbers = [[value for value in row if isinstance(value, float)] for row in (one, other)]
    assert [value for value in one if not isinstance(value, float)] == [
        value for value in other if not isinstance(value, float)
    ]
    same_numbers(*numbers)


@precisions
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["causal", "equivariant"])
def test_fine_tuned_heads(kind, head, precision, device, tmp_path):
    tokens, lengths = np.stack([random_bases(40, seed) for seed in range(2)]), np.array([40, 31])
    targets = {"classes": [[0.0], [2.0]], "labels": [[0, 1.0], [1, np.nan]], "numbers": [[0.5], [3.0]]}[head]

    def loss_of(model, place):
        outputs = model.padded(on(place, tokens), on(place, lengths))
        return SequenceLoss(HEADS[head]).mean(outputs, on(place, np.array(targets, dtype=np.float32)))

    made = sequence_model_on(language_model(kind), HEADS[head], "mean", True).float().train()
    model = train_alike(made, loss_of, device, precision).eval()
    save_sequence_model(tmp_path / "model", model, {})
    used, plain = (genomamba.load(tmp_path / "model", device=place).predict(LETTERS).rows for place in (device, "cpu"))
    same_numbers(*([value for value in rows[0] if isinstance(value, float)] for rows in (used, plain)))


@pytest.fixture
def memory(device, monkeypatch):
    """A device that 100 positions fit; the positions of all that was tried."""
    if device.type == "cpu":
        pytest.skip("PyTorch does not say that a CPU's memory is full")
    tried = []

    def limited(forward):
        def limited_forward(self, tokens, *rest):
            if tokens.device.type != "cpu":
                tried.append(tokens.numel())
                if tokens.numel() > 100:
                    raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return forward(self, tokens, *rest)

        return limited_forward

    monkeypatch.setattr(devices, "SMALLEST_POSITIONS", 1)
    monkeypatch.setattr(devices, "_fitting", {torch.device(device.type, device.index or 0): 512})
    for kind, names in ((SpeciesClassifier, ["forward"]), (SequenceModel, ["forward", "padded"])):
        for name in names:
            monkeypatch.setattr(kind, name, limited(getattr(kind, name)))
    return tried


RECORDS = [("short", random_bases(30, 0)), ("also", random_bases(45, 1)), ("long", random_bases(700, 2))]


@pytest.mark.parametrize("piece_length", [64, 4096])
def test_records_are_classified_in_pieces_that_fit(piece_length, device, memory):
    model, letters = tiny_model().eval(), CharacterTokenizer().decode
    records = {name: letters(tokens) for name, tokens in RECORDS}

    def evidence(place):
        classifier = RecordClassifier(model.to(place), piece_length=piece_length)
        return [(batch, record) for batch, record in classifier.evidence([records], Share())]

    expected, found = evidence("cpu"), evidence(device)
    assert [(batch, one.name, one.length) for batch, one in found] == [
        (batch, one.name, one.length) for batch, one in expected
    ]
    same_numbers(*([one.evidence for _, one in records] for records in (found, expected)))
    assert max(memory) > 100 and 64 in memory and memory[-1] <= 64


def test_sequences_are_predicted_in_pieces_that_fit(device, memory):
    made = sequence_model_on(language_model("causal"), HEADS["classes"], "mean", True).float().eval()
    expected = list(predict_sequences(made, RECORDS))
    found = list(predict_sequences(made.to(device), RECORDS))
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    same_numbers(*([row[2] for row in rows] for rows in (found, expected)))
    assert max(memory) > 100 and memory[-1] <= 64


def test_a_sequence_that_cannot_be_cut_and_does_not_fit_is_refused(device, memory):
    made = sequence_model_on(language_model("masked"), HEADS["classes"], "mean", True).float().eval().to(device)
    with pytest.raises(InputError, match=r"too small for 700 positions at once: give shorter sequences"):
        list(predict_sequences(made, RECORDS))


@first_process
def test_all_of_this_holds_on_the_pretended_device():
    assert passed_on_pretend(__file__) == 2 * (5 + 1 + 2 * len(HEADS)) + 4
