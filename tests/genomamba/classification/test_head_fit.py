"""Fitting the heads again: better on sequences left out, or nothing changes; and the model says what was fitted."""

import numpy as np
import pytest
import torch

from genomamba.classification import head_fit
from genomamba.classification.evidence import evidence_of_records
from genomamba.classification.head_fit import fit_heads
from genomamba.data.genomes import GenomeCollection
from genomamba.data.windows import evaluation_windows
from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig
from genomamba.tokenizer import ANY_BASE_TOKEN, CharacterTokenizer

SHARES = {"rich": [0.22, 0.28, 0.28, 0.22], "poor": [0.28, 0.22, 0.22, 0.28]}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_fit, "BLOCK_BP", 128)
    monkeypatch.setattr(head_fit, "BLOCKS_PER_WINDOW", (1, 4, 16))
    monkeypatch.setattr(head_fit, "BLOCKS_PER_STRETCH", 16)
    monkeypatch.setattr(head_fit, "REGULARISATIONS", (1000.0, 30.0))


def bases(random: np.random.Generator, share: list[float], length: int = 4096) -> np.ndarray:
    return (7 + random.choice(4, length, p=share)).astype(np.uint8)


def genomes(names: int = 6, length: int = 4096) -> GenomeCollection:
    """Two classes whose chromosomes differ in composition."""
    random = np.random.default_rng(3)
    return GenomeCollection.from_tokens(
        {
            name: {f"chr{number}": bases(random, share, length) for number in range(names)}
            for name, share in SHARES.items()
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


def everything(collection: GenomeCollection) -> list[head_fit._Stretch]:
    return head_fit._choose_stretches(collection, blocks_per_class=10**6, seed=0)


def test_fitted_heads_tell_classes_apart_that_untrained_ones_do_not():
    model, collection = classifier(), genomes()
    before = accuracy(model, collection)
    fit = fit_heads(model, collection, bases_trained=1_000_000, seed=0)
    assert fit is not None and fit.cross_entropy_after < fit.cross_entropy_before
    assert fit.regularisation in head_fit.REGULARISATIONS
    assert accuracy(model, collection) > max(before, 0.85)


def test_what_tells_classes_apart_on_single_chromosomes_only_is_not_believed():
    """Each chromosome of each class is easy to know by its own composition, which says nothing about another one."""
    random = np.random.default_rng(5)
    collection = GenomeCollection.from_tokens(
        {
            name: {f"chr{number}": bases(random, random.dirichlet([30] * 4).tolist()) for number in range(5)}
            for name in SHARES
        }
    )
    fit = fit_heads(classifier(), collection, bases_trained=1_000_000, seed=0)
    guessing = np.log(2)
    assert fit is None or fit.cross_entropy_after > guessing - 0.01


def test_the_models_evidence_on_both_strands_is_what_was_fitted():
    model, collection = classifier(), genomes()
    torch.nn.init.normal_(model.class_next_base.weight)
    stretches = everything(collection)
    windows, scaling = head_fit._read(model, stretches, head_fit._folds(stretches, 2, seed=0))
    heads = head_fit._Heads(
        torch.randn(windows.inputs.shape[1], 2) * 0.01, torch.tensor([0.3, -0.2]), torch.tensor(700.0)
    )
    whole = windows.blocks == head_fit.BLOCKS_PER_STRETCH
    slope = float(model.confidence_slope.detach())
    expected = heads.logits(windows, slope)[whole].softmax(1)
    head_fit._put_into(model, heads, scaling)
    tokens = [stretch.sequence.tokens(stretch.start, stretch.start + 16 * 128) for stretch in stretches]
    evidence = evidence_of_records(model, np.stack(tokens))
    with torch.inference_mode():
        found = model.logits(torch.from_numpy(evidence).float(), 16 * 128).softmax(1)
    assert expected.std() > 0.05
    assert torch.allclose(found, expected, atol=2e-3)
    again = head_fit._heads_of(model, scaling)
    assert torch.allclose(again.weight * heads.likelihood_weight, heads.weight, atol=1e-4)


def test_a_stretch_and_its_reverse_complement_read_the_same():
    model = classifier()
    torch.nn.init.normal_(model.class_next_base.weight)
    forward = bases(np.random.default_rng(1), SHARES["rich"], 5 * 128)
    reverse = CharacterTokenizer().reverse_complement(forward)
    with torch.no_grad():
        one = head_fit._block_means(model, torch.from_numpy(np.stack([forward, reverse])))
        other = head_fit._block_means(model, torch.from_numpy(np.stack([reverse, forward])))
    for found, expected in zip(one, other, strict=True):
        assert torch.allclose(found, expected.flip(0), atol=1e-6)


def test_every_class_is_read_equally_much_and_no_base_twice():
    random = np.random.default_rng(2)
    collection = GenomeCollection.from_tokens(
        {
            "rich": {f"chr{number}": bases(random, SHARES["rich"], 20_000) for number in range(9)},
            "poor": {f"chr{number}": bases(random, SHARES["poor"], 9_000) for number in range(3)},
        }
    )
    stretches = head_fit._choose_stretches(collection, blocks_per_class=150, seed=0)
    assert [sum(stretch.blocks for stretch in stretches if stretch.label == label) for label in (0, 1)] == [150, 150]
    assert max(stretch.blocks for stretch in stretches) <= head_fit.BLOCKS_PER_STRETCH
    read = np.zeros((2, 9, 20_000), dtype=int)
    for stretch in stretches:
        number = int(stretch.sequence.name.removeprefix("chr"))
        read[stretch.label, number, stretch.start : stretch.start + stretch.blocks * 128] += 1
    assert read.max() == 1


def test_every_class_and_length_weighs_the_same():
    stretches = everything(genomes()) + everything(genomes(names=2))[:2]
    windows, _ = head_fit._read(classifier(), stretches, head_fit._folds(stretches, 2, seed=0))
    chosen = windows.folds > 0
    weights = windows.weights(chosen)
    assert weights.sum().item() == pytest.approx(1)
    assert not weights[~chosen].any()
    for count in head_fit.BLOCKS_PER_WINDOW:
        for label in (0, 1):
            share = weights[(windows.blocks == count) & (windows.labels == label)].sum().item()
            assert share == pytest.approx(1 / 6)


def test_blocks_with_gaps_are_left_out():
    collection = genomes()
    stretches = everything(collection)
    whole, _ = head_fit._read(classifier(), stretches, head_fit._folds(stretches, 2, seed=0))
    tokens = {
        name: {sequence.name: sequence.tokens(0, sequence.length) for sequence in collection.sequences_of(name)}
        for name in collection.class_names
    }
    tokens["rich"]["chr0"][300:310] = ANY_BASE_TOKEN
    stretches = everything(GenomeCollection.from_tokens(tokens))
    gapped, _ = head_fit._read(classifier(), stretches, head_fit._folds(stretches, 2, seed=0))
    assert int((gapped.blocks == 1).sum()) == int((whole.blocks == 1).sum()) - 1


def test_the_likelihood_weight_is_shrunk_because_its_heads_were_trained_on_these_sequences():
    model, collection = classifier(), genomes()
    torch.nn.init.normal_(model.class_next_base.weight)
    stretches = everything(collection)
    windows, _ = head_fit._read(model, stretches, head_fit._folds(stretches, 2, seed=0))
    weights = windows.weights(torch.ones(len(windows.labels), dtype=torch.bool))
    slope = float(model.confidence_slope.detach())
    # A likelihood that knows the answer, as that of memorised sequences does.
    windows.likelihood[:] = torch.nn.functional.one_hot(windows.labels, 2) * 0.001
    windows.likelihood.add_(torch.randn(windows.likelihood.shape) * 0.001)
    free = head_fit._solve(windows, weights, slope, 1000.0)
    held = head_fit._solve(windows, weights, slope, 1000.0, likelihood_weight=torch.tensor(100.0))
    assert free.likelihood_weight > 100 and held.likelihood_weight == 100
    assert held.weight.norm() > free.weight.norm()


@pytest.mark.parametrize(
    ("collection", "pooling", "bases_trained"),
    [
        (genomes(), "last", 10**6),
        (genomes(), "mean", 10_000),
        (genomes(length=100), "mean", 10**6),
    ],
    ids=["last pooling", "hardly any bases", "nothing as long as a block"],
)
def test_without_enough_to_go_by_the_model_stays_as_it_was(collection, pooling, bases_trained):
    model = classifier(pooling)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fit_heads(model, collection, bases_trained, seed=0) is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_genomes_of_one_sequence_are_fitted_by_stretches():
    assert fit_heads(classifier(), genomes(names=1), bases_trained=10**6, seed=0) is not None


def test_the_same_seed_fits_the_same_heads():
    models = [classifier(), classifier()]
    for model in models:
        fit_heads(model, genomes(), bases_trained=1_000_000, seed=4)
    assert all(
        torch.equal(one, other) for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
