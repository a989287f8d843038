"""Fitting the heads again: better on sequences set aside, or nothing changes; and the model says what was fitted."""

import numpy as np
import pytest
import torch

from genomamba.genomes import GenomeCollection
from genomamba.models import SpeciesClassifier, SpeciesClassifierConfig
from genomamba.windows import evaluation_windows
from mambapipelines import head_fit
from mambapipelines.head_fit import fit_heads


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_fit, "BLOCK_BP", 128)
    monkeypatch.setattr(head_fit, "LONGEST_STRETCH_BP", 2048)


def genomes(same: bool = False, names: int = 6) -> GenomeCollection:
    """Two classes whose chromosomes differ in composition, or do not."""
    random = np.random.default_rng(3)
    shares = {"rich": [0.22, 0.28, 0.28, 0.22], "poor": [0.28, 0.22, 0.22, 0.28]}
    return GenomeCollection.from_tokens(
        {
            name: {
                f"chr{number}": (7 + random.choice(4, 8192, p=[0.25] * 4 if same else share)).astype(np.uint8)
                for number in range(names)
            }
            for name, share in shares.items()
        }
    )


def classifier(pooling: str = "mean") -> SpeciesClassifier:
    torch.manual_seed(0)
    config = SpeciesClassifierConfig(
        class_names=("rich", "poor"), model_width=16, layers=1, state_size=4, context_widths=(1, 2),
        evidence_context_widths=(1, 2), feature_width=8, pooling=pooling,
    )  # fmt: skip
    return SpeciesClassifier(config).eval()


def accuracy(model: SpeciesClassifier, collection: GenomeCollection) -> float:
    windows = evaluation_windows(collection, 512, 40, seed=9).windows
    tokens = torch.from_numpy(np.stack([window.tokens() for window in windows]))
    with torch.inference_mode():
        evidence, _ = model(tokens)
    return float((evidence.argmax(1).numpy() == [window.label for window in windows]).mean())


def test_fitted_heads_tell_classes_apart_that_untrained_ones_do_not():
    model, collection = classifier(), genomes()
    before = accuracy(model, collection)
    fit = fit_heads(model, collection, bases_trained=1_000_000, seed=0)
    assert fit is not None and fit.cross_entropy_after < fit.cross_entropy_before
    assert fit.regularisation in head_fit.REGULARISATIONS
    assert accuracy(model, collection) > max(before, 0.85)


def test_the_models_evidence_is_what_was_fitted():
    model, collection = classifier(), genomes()
    torch.nn.init.normal_(model.class_next_base.weight)
    windows = evaluation_windows(collection, 2048, 8, seed=0).windows
    statistics = head_fit._read(model, windows)
    scaling = head_fit._Scaling(statistics.inputs.flatten(0, 1).mean(0), statistics.inputs.flatten(0, 1).std(0) + 1e-3)
    heads = head_fit._Heads(torch.randn(statistics.inputs.shape[2], 2) * 0.01, torch.zeros(2), torch.tensor(700.0))
    head_fit._put_into(model, heads, scaling)
    inputs = (statistics.inputs - scaling.mean) / scaling.spread
    expected = statistics.likelihood.mean(1) + (inputs.mean(1) @ heads.weight) / heads.trust
    tokens = torch.from_numpy(np.stack([window.tokens() for window in windows]))
    with torch.inference_mode():
        found, _ = model(tokens)
    assert torch.allclose(found[:, 0] - found[:, 1], expected[:, 0] - expected[:, 1], atol=2e-6)
    assert model.confidence_intercept.exp().item() == pytest.approx(700.0, rel=1e-4)
    again = head_fit._heads_of(model, scaling)
    assert torch.allclose(again.weight * heads.trust, heads.weight, atol=1e-4)


@pytest.mark.parametrize(
    ("collection", "pooling", "bases"),
    [(genomes(names=1), "mean", 10**6), (genomes(), "last", 10**6), (genomes(), "mean", 10_000)],
    ids=["one name", "last pooling", "hardly any bases"],
)
def test_without_enough_to_go_by_the_model_stays_as_it_was(collection, pooling, bases):
    model = classifier(pooling)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fit_heads(model, collection, bases_trained=bases, seed=0) is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_fits_the_same_heads():
    models = [classifier(), classifier()]
    for model in models:
        fit_heads(model, genomes(), bases_trained=1_000_000, seed=4)
    assert all(
        torch.equal(one, other) for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
