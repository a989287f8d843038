"""`genomamba train --from`: a species classifier that starts from a pretrained language model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.data.genomes import GenomeSpecification
from genomamba.models.language_model import LanguageModel, build_language_model, save_language_model
from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig, load_classifier
from genomamba.models.transfer import classifier_settings, start_from_language_model
from mambacore.errors import InputError
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from tolerances import FLOAT32, relative_error

SETTINGS = {
    "model_width": 12,
    "mixers": ["selective", {"name": "s4d", "state_size": 6}],
    "context_widths": [3],
    "tied_head": True,
}


@pytest.fixture
def language_model() -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LanguageModel(build_language_model("causal", SETTINGS).eval(), source="pretrained")


@pytest.fixture
def options(tmp_path: Path, language_model: LanguageModel) -> SpeciesTrainingOptions:
    random = np.random.default_rng(5)
    specifications = []
    for number, odds in enumerate([[0.3, 0.2, 0.2, 0.3], [0.2, 0.3, 0.3, 0.2]]):
        path = tmp_path / f"{number}.fa"
        path.write_text("".join(f">chr{name}\n{''.join(random.choice(list('ACGT'), 2000, p=odds))}\n" for name in "12"))
        specifications.append(GenomeSpecification(f"class{number}", (str(path),)))
    save_language_model(tmp_path / "pretrained", language_model.model, {})
    return SpeciesTrainingOptions(
        genomes=specifications, length=128, output=tmp_path / "run", holdout=["chr2"], steps=2, recipe="tiny",
        threads=1, start_from=str(tmp_path / "pretrained"),
    )  # fmt: skip


def test_the_classifier_predicts_what_the_language_model_does(language_model: LanguageModel) -> None:
    config = SpeciesClassifierConfig(("one", "other"), **classifier_settings(language_model))
    classifier = SpeciesClassifier(config)
    start_from_language_model(classifier, language_model)
    tokens = torch.randint(7, 11, (2, 40))
    expected, _ = language_model.next_base_log_probabilities(tokens)
    here = expected[:, :-1].gather(2, tokens[:, 1:, None] - 7).squeeze(2)
    reading, _ = classifier.read(tokens)
    for label in range(2):
        assert relative_error(reading.likelihood[:, 1:, label], here) < FLOAT32
    assert not classifier.deviation.weight.any()


def test_training_starts_from_the_given_weights_and_resumes_only_with_them(
    options: SpeciesTrainingOptions, language_model: LanguageModel, tmp_path: Path
) -> None:
    train_species_classifier(options)
    trained, details = load_classifier(options.output)
    assert details["start_from"] == options.start_from
    before = language_model.model.state_dict()
    after = trained.stack.state_dict()
    # Two short steps move the weights, and not far.
    for name, tensor in after.items():
        assert float((tensor - before[f"stack.{name}"]).abs().max()) < 0.05, name
    assert any(not torch.equal(tensor, before[f"stack.{name}"]) for name, tensor in after.items())
    other = build_language_model("causal", SETTINGS)
    save_language_model(tmp_path / "other", other, {})
    with pytest.raises(InputError, match=r"cannot resume the run in .*: --from was"):
        train_species_classifier(
            SpeciesTrainingOptions(**{**vars(options), "start_from": str(tmp_path / "other"), "resume": True})
        )


def test_what_does_not_fit_is_named(
    options: SpeciesTrainingOptions, language_model: LanguageModel, tmp_path: Path
) -> None:
    settings = classifier_settings(language_model)
    for changed, sentence in (
        ({"model_width": 16}, "pretrained has model_width 12 but the classifier 16"),
        ({"layers": 3, "mixer": "s4d"}, "pretrained has layers 2 but the classifier 3"),
        (
            {"mixer": [settings["mixer"][0], {"name": "s4d", "state_size": 4}]},
            "layer 2 .* state_size 6 but the classifier 4",
        ),
        ({"mixer": settings["mixer"][0]}, "layer 2 .* name s4d but the classifier selective"),
        ({"context_widths": (1, 2)}, "contexts of 3 bases .* add 3"),
    ):
        classifier = SpeciesClassifier(SpeciesClassifierConfig(("one", "other"), **{**settings, **changed}))
        with pytest.raises(InputError, match=sentence):
            start_from_language_model(classifier, language_model)
    with pytest.raises(InputError, match=r"--set model.layers=8 is determined by the model given with --from"):
        train_species_classifier(SpeciesTrainingOptions(**{**vars(options), "changes": ("model.layers=8",)}))
    masked = build_language_model("masked", {"model_width": 8, "layers": 1})
    save_language_model(tmp_path / "masked", masked, {})
    with pytest.raises(InputError, match="is a masked language model"):
        train_species_classifier(SpeciesTrainingOptions(**{**vars(options), "start_from": str(tmp_path / "masked")}))
