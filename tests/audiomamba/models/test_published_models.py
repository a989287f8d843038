"""The published architectures: what they are made of, how large they are beside the papers, and their folders."""

import json

import pytest
import torch

from audiomamba.data.quantisers import Quantiser
from audiomamba.models import (
    ARCHITECTURES,
    StageConfig,
    WaveformModel,
    WaveformModelConfig,
    architecture,
    load_waveform_model,
    save_waveform_model,
)
from mambacore.errors import InputError

# Exact number of parameters; the paper's millions; how much larger ours is. The recipes' notes say why.
PARAMETERS = {
    "mamba-sc09-6m": (6_255_040, 6.1, +0.025),
    "mamba-sc09-24m": (24_850_912, 24.3, +0.023),
    "sc09-s4-attention": (5_902_784, 6.0, -0.016),
    "sc09-s4-s4": (6_175_168, 6.0, +0.029),
    "sc09-s4-mamba": (6_252_992, 6.0, +0.042),
    "sc09-mamba-attention": (5_904_832, 6.0, -0.016),
    "sc09-mamba-s4": (6_177_216, 6.0, +0.030),
    "sc09-mamba-mamba": (6_255_040, 6.0, +0.043),
    "sashimi": (6_175_168, 5.8, +0.065),
    "sashimi-no-unet": (4_981_696, 5.45, -0.086),
    "mamba-youtubemix": (3_557_184, 3.5, +0.016),
}


def parameters_of(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WaveformModel(config).parameters())


def test_every_recipe_is_counted():
    assert PARAMETERS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_beside_the_papers(name):
    expected, published, excess = PARAMETERS[name]
    found = parameters_of(architecture(name))
    assert found == expected
    assert ARCHITECTURES[name].published_parameters == published
    assert found / (published * 1e6) - 1 == pytest.approx(excess, abs=5e-4)
    assert ARCHITECTURES[name].note and ARCHITECTURES[name].source


def test_the_counts_differ_from_sashimis_by_the_state_matrices_alone():
    """Its code has 5.87M and, without the way down, 5.45M: the notes of the recipes, in numbers."""
    channels_of_layers = 8 * (2 * 64 + 2 * 128 + 256), 8 * (64 + 128 + 256)
    assert (PARAMETERS["sashimi"][0] - 64 * channels_of_layers[0]) / 1e6 == pytest.approx(5.87, abs=0.025)
    assert (PARAMETERS["sashimi-no-unet"][0] + (192 - 64) * channels_of_layers[1]) / 1e6 == pytest.approx(
        5.45, abs=0.025
    )


@pytest.mark.parametrize("name", ["sc09-s4-attention", "sc09-mamba-s4", "sc09-mamba-mamba"])
def test_a_layer_of_the_ablations_has_the_papers_six_squared_widths(name):
    """Appendix E.4.2: attention's feed-forward has expansion 1, that of S4 has 2; a Mamba block stands alone."""
    with torch.device("meta"):
        centre = WaveformModel(architecture(name)).scales.deeper.deeper
    matrices = [parameter for parameter in centre.up.parameters() if parameter.ndim == 2]
    assert sum(matrix.numel() for matrix in matrices if min(matrix.shape) > 64) == 8 * 6 * 256**2


def test_the_papers_models_have_the_papers_blocks():
    with torch.device("meta"):
        small = WaveformModel(architecture("mamba-sc09-6m"))
    outer, middle, centre = small.scales, small.scales.deeper, small.scales.deeper.deeper
    assert [len(outer.down) + len(outer.up), len(middle.down) + len(middle.up), len(centre.up)] == [16, 16, 8]
    assert [outer.down_pooling.factor, middle.down_pooling.factor] == [4, 4]
    assert centre.up[0].norm.weight.shape == (256,)
    large = architecture("mamba-sc09-24m")
    assert large.model_width == 96 and [stage.layers for stage in large.stages] == [15, 15, 15]
    music = architecture("mamba-youtubemix")
    assert music.pooling == (16, 16) and [stage.layers for stage in music.stages] == [3, 3, 3]
    assert all(mixer["complex_state"] for stage in music.stages for mixer in stage.mixers())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_configurations_survive_json(name):
    config = architecture(name)
    again = WaveformModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert parameters_of(again) == PARAMETERS[name][0]


def test_the_ablation_takes_mixers_that_are_younger_than_the_paper():
    config = architecture("sc09", outer="mamba2", centre="mamba3")
    assert [(stage.layers, stage.mixer) for stage in config.stages] == [(8, "mamba2"), (8, "mamba2"), (8, "mamba3")]
    assert architecture("sc09", centre="mamba2").stages[0] == architecture("sc09").stages[0]


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="there is no model 'wavenet'; choose sc09 or mamba-sc09-6m"):
        architecture("wavenet")


def tiny():
    torch.manual_seed(0)
    stages = (StageConfig(1, {"name": "s4d", "state_size": 2}, 2), StageConfig(2, ["attention", "selective"]))
    return WaveformModel(WaveformModelConfig(stages, 8, (3,), quantiser=Quantiser("linear", 9, 8000, 0.5)))


def test_a_model_folder_holds_weights_architecture_quantiser_and_rate(tmp_path):
    model = tiny().eval()
    model.save_pretrained(tmp_path / "model", {"steps": 3})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model"]["quantiser"] == {
        "scheme": "linear", "bits": 9, "sample_rate_hz": 8000, "full_scale": 0.5, "version": 1,
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    again, details = load_waveform_model(tmp_path / "model")
    assert details == {"steps": 3} and again.config == model.config and not again.training
    tokens = torch.randint(512, (2, 30))
    assert torch.equal(WaveformModel.from_pretrained(tmp_path / "model")(tokens)[0], model(tokens)[0])


def edited(folder, edit):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


MISTAKES = {
    "another kind": (lambda config: config.update(kind="species classifier"), "holds a species classifier"),
    "no model": (lambda config: config.pop("model"), "has no 'model' section"),
    "no quantiser": (lambda config: config["model"].pop("quantiser"), "has no quantiser"),
    "unknown key": (lambda config: config["model"].update(depth=3), "unknown key 'depth'"),
    "unknown stage key": (lambda config: config["model"]["stages"][0].update(depth=3), "unknown key 'depth'"),
    "stages of numbers": (lambda config: config["model"].update(stages=[1]), "not a list of tables"),
    "pooling of a number": (lambda config: config["model"].update(pooling=4), "list integers"),
    "pooling by one": (lambda config: config["model"].update(pooling=[1]), "an integer from 2"),
    "a pooling too many": (lambda config: config["model"].update(pooling=[3, 3]), "3 depths but 2 stages"),
    "no mixer": (lambda config: config["model"]["stages"][0].update(mixer="mamba4"), "no mixer 'mamba4'"),
    "no such option": (
        lambda config: config["model"]["stages"][0]["mixer"].update(heads=2),
        "no option 'heads'",
    ),
    "a layer too many": (lambda config: config["model"]["stages"][1].update(layers=3), "list one per layer"),
    "no layers": (lambda config: config["model"]["stages"][0].update(layers=0), "an integer from 1"),
    "yes": (lambda config: config["model"].update(blocks_on_the_way_down="yes"), "give true or false"),
    "another version": (lambda config: config["model"]["quantiser"].update(version=2), "version 2"),
    "another width": (lambda config: config["model"].update(model_width=16), "does not fit its configuration"),
}


@pytest.mark.parametrize(("edit", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path, edit, message):
    save_waveform_model(tmp_path / "model", tiny(), details={})
    edited(tmp_path / "model", edit)
    with pytest.raises(InputError, match=message) as caught:
        load_waveform_model(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)
