"""The species classifier: pieces equal the whole, evidence means what it says, folders bring the same model back."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from genomamba.models import species_classifier
from genomamba.models.species_classifier import (
    DEVIATION_SCALE,
    SpeciesClassifier,
    SpeciesClassifierConfig,
    load_classifier,
    save_classifier,
)
from mambacore.errors import InputError
from tiny_species import tiny_model
from tolerances import PIECES_FLOAT64, relative_error

CLASSES = ("oak", "elm", "ash")


def classifier(dtype=torch.float64, **changes) -> SpeciesClassifier:
    torch.manual_seed(0)
    options = {"model_width": 16, "layers": 2, "state_size": 4, "context_widths": (1, 3)}
    options |= {"evidence_context_widths": (2,), "feature_width": 8, "shortest_window_bp": 16}
    model = SpeciesClassifier(SpeciesClassifierConfig(class_names=CLASSES, **{**options, **changes})).to(dtype)
    with torch.no_grad():  # as if something had been learned
        model.class_next_base.weight.normal_()
        model.deviation.weight.normal_()
        model.context_evidence.tables[0].weight[:-1].normal_()
    return model


def random_tokens(batch, length, seed=0):
    return torch.randint(7, 12, (batch, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("lengths", [[1] * 100, [64, 36], [99, 1]], ids=["steps", "two", "all but one"])
def test_pieces_equal_the_whole(pooling, lengths):
    model, tokens = classifier(pooling=pooling), random_tokens(2, 100)
    whole, _ = model(tokens)
    state = None
    for piece in tokens.split(lengths, dim=1):
        found, state = model(piece, state)
    assert relative_error(found, whole) < PIECES_FLOAT64


def test_a_record_does_not_depend_on_its_neighbours_in_the_batch():
    model, tokens = classifier(), random_tokens(3, 80)
    together, _ = model(tokens)
    alone, _ = model(tokens[1:2])
    assert relative_error(alone, together[1:2]) < PIECES_FLOAT64


def test_likelihoods_are_those_of_the_predicted_bases():
    model, tokens = classifier(), random_tokens(1, 30)
    with torch.no_grad():
        model.deviation.weight.zero_()
        model.context_evidence.tables[0].weight.zero_()
        evidence, likelihood, _ = model._evidence(tokens, None)
        assert torch.equal(evidence, likelihood)
        _, before = model(tokens[:, :20])
    here = int(tokens[0, 20]) - 7
    expected = before.prediction[0, :, here] if here < 4 else torch.zeros(3)
    assert torch.allclose(likelihood[0, 20], expected.double())
    assert torch.allclose(before.prediction.exp().sum(-1), torch.ones(1, 3, dtype=torch.float64))
    assert (likelihood[0, tokens[0] == 11] == 0).all()  # N says nothing


def test_evidence_of_contexts_is_a_regression_on_the_kmer_spectrum():
    model, tokens = classifier(), random_tokens(1, 200)
    with torch.no_grad():
        for parameter in (model.deviation.weight, model.class_next_base.weight):
            parameter.zero_()
        pooled, _ = model(tokens)
        spectrum = torch.zeros(16, dtype=torch.float64)
        bases = (tokens[0].long() - 7).tolist()
        for first, second in itertools.pairwise(bases):
            if first < 4 and second < 4:
                spectrum[4 * first + second] += 1 / len(bases)
        table = model.context_evidence.tables[0].weight[:-1]
    expected = spectrum @ table * DEVIATION_SCALE
    assert relative_error(pooled[0] - pooled[0, 0], expected - expected[0]) < 1e-7


def test_the_classes_do_not_reach_into_the_layers_unless_asked():
    tokens, labels = random_tokens(2, 64), torch.tensor([0, 1])
    for share in (0.0, 0.5, 1.0):
        model = classifier(classification_gradient=share, likelihood_weight=0.0)
        model.loss(tokens, labels)["loss"].backward()
        weight = model.stack.blocks[0].mixer.input_projection.weight
        reached = 0.0 if weight.grad is None else float(weight.grad.abs().sum())
        assert (reached > 0) == (share > 0)
        assert model.deviation.weight.grad.abs().sum() > 0


def test_before_training_there_is_no_evidence_for_any_class():
    model = SpeciesClassifier(SpeciesClassifierConfig(class_names=CLASSES, model_width=16, layers=1))
    pooled, _ = model(random_tokens(2, 50))
    logits = model.logits(pooled, 50)
    assert torch.allclose(logits - logits[:, :1], torch.zeros_like(logits), atol=1e-4)


def test_confidence_grows_with_the_length_and_never_changes_the_call():
    model = classifier()
    evidence = torch.tensor([[0.001, 0.002, -0.001]], dtype=torch.float64)
    short, long = (F.softmax(model.logits(evidence, length), -1) for length in (1024, 65536))
    assert short.argmax() == long.argmax() == 1 and long[0, 1] > short[0, 1]
    many = model.logits(evidence.expand(2, -1), torch.tensor([1024, 65536]))
    assert torch.allclose(F.softmax(many, -1), torch.cat([short, long]))


def test_loss_averages_over_the_windows_within_the_window():
    model, tokens, labels = classifier(), random_tokens(2, 64), torch.tensor([0, 2])
    report = model.loss(tokens, labels)
    entropies = []
    with torch.no_grad():
        evidence, likelihood, _ = model._evidence(tokens, None)
        for window in (64, 32, 16):
            parts = [evidence[:, begin : begin + window].mean(1) for begin in range(0, 64, window)]
            losses = [F.cross_entropy(model.logits(part, window), labels) for part in parts]
            entropies.append(torch.stack(losses).mean())
        predicting = -(likelihood[0, :, 0].mean() + likelihood[1, :, 2].mean()) / 2
    assert torch.isclose(report["cross_entropy"], torch.stack(entropies).mean())
    assert torch.isclose(report["loss"].detach(), report["cross_entropy"] + predicting)


def test_training_makes_the_loss_fall():
    torch.manual_seed(0)
    model = SpeciesClassifier(
        SpeciesClassifierConfig(
            class_names=("rich", "poor"), model_width=16, layers=1, state_size=4, context_widths=(1, 2)
        )
    )
    generator = torch.Generator().manual_seed(1)
    weights = torch.tensor([[1.0, 3, 3, 1], [3.0, 1, 1, 3]])
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=0.01)
    for _ in range(30):
        labels = torch.randint(0, 2, (8,), generator=generator)
        tokens = torch.multinomial(weights[labels], 64, replacement=True, generator=generator) + 7
        report = model.loss(tokens, labels)
        optimizer.zero_grad()
        report["loss"].backward()
        optimizer.step()
    assert report["cross_entropy"] < 0.3 and report["accuracy"] > 0.8


def test_decay_spares_the_dynamics_and_covers_every_parameter_once():
    model = classifier()
    decaying, contexts, others = model.parameter_groups(0.1)
    assert decaying["weight_decay"] == 0.1 < contexts["weight_decay"] and others["weight_decay"] == 0.0
    ids = [id(parameter) for group in (decaying, contexts, others) for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decaying["params"]}
    assert "stack.blocks.0.mixer.input_projection.weight" in decayed
    assert not [
        name
        for name in decayed
        if any(word in name for word in ("log_decay_rate", "norm", "bias", "embedding", "confidence", "skip"))
    ]


def test_a_saved_model_comes_back_the_same(tmp_path):
    model = classifier(torch.float32, pooling="last")
    save_classifier(tmp_path / "model", model, details={"holdout": ["chr1"]})
    loaded, details = load_classifier(tmp_path / "model")
    assert details == {"holdout": ["chr1"]} and loaded.config == model.config and not loaded.training
    tokens = random_tokens(1, 40)
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert "chr1" in (tmp_path / "model" / "README.md").read_text()


def test_tampered_folders_are_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "model"
    save_classifier(folder, classifier(torch.float32), details={})
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")

    def refused(message, changed_config=config, changed_tensors=tensors):
        (folder / "config.json").write_text(json.dumps(changed_config))
        save_file(changed_tensors, folder / "model.safetensors")
        with pytest.raises(InputError, match=message) as caught:
            load_classifier(folder)
        assert "\n" not in str(caught.value)

    refused(
        "deviation.bias", changed_tensors={name: value for name, value in tensors.items() if name != "deviation.bias"}
    )
    refused("deviation.bias", changed_tensors={**tensors, "deviation.bias": torch.zeros(4)})
    refused("surplus", changed_tensors={**tensors, "surplus": torch.zeros(1)})
    refused("not a species classifier", {**config, "kind": "waveform model"})
    refused("unknown key 'depth'", {**config, "classifier": {**config["classifier"], "depth": 3}})
    refused("state_size", {**config, "classifier": {**config["classifier"], "state_size": "many"}})
    refused("version", {**config, "format_version": 99})
    refused("'tokenizer'", {key: value for key, value in config.items() if key != "tokenizer"})


def test_a_classifier_saves_and_loads_itself(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model", {"holdout": ["chrI"]})
    again = SpeciesClassifier.from_pretrained(str(tmp_path / "model"))
    tokens = torch.randint(7, 11, (2, 50))
    with torch.inference_mode():
        assert torch.equal(model(tokens)[0], again(tokens)[0])
    assert "chrI" in (tmp_path / "model" / "README.md").read_text()


def test_a_sequence_over_several_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(species_classifier, "active_ranks", object)
    with pytest.raises(InputError, match="give each rank whole records"):
        tiny_model()(torch.randint(7, 11, (1, 5)))
