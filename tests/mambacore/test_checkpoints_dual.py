"""Mamba-2 and Mamba-3 checkpoints compute here what they compute at home, and the other way round."""

import json

import pytest
import torch
from safetensors.torch import load_file

from caduceus_equations import write_checkpoint
from foreign_checkpoints import causal, change_config, masked, problem_with, shaken, tokens, transformers
from mambacore.checkpoints import load, recognise, save_caduceus, save_mamba_ssm, save_transformers
from mambacore.errors import InputError
from tolerances import FLOAT32, relative_error

SHAPES = {
    "one group": {},
    "groups": {"n_groups": 2, "state_size": 7, "conv_kernel": 3},
    "a group for each head": {"n_groups": 6, "head_dim": 8, "num_heads": 6, "tie_word_embeddings": True},
    "biases": {"use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-2},
    "limited steps": {"time_step_limit": (0.02, 0.5), "residual_in_fp32": False},
}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
MAMBA2 = {"name": "mamba2", "state_size": 3, "head_width": 4, "groups": 2, "kernel_width": 3}
MAMBA3 = {"name": "mamba3", "state_size": 4, "head_width": 4, "groups": 2}
MODELS = {
    "mamba2": MAMBA2,
    "mamba2 with limits": MAMBA2 | {"step_limits": (0.01, 0.2), "linear_bias": True, "convolution_bias": False},
    "mamba3": MAMBA3,
    "mamba3 of rank 3": MAMBA3 | {"rank": 3, "rotated_share": 1.0, "output_norm": True},
}


def peer(**shape):
    """A random Mamba-2 model of transformers, an oracle."""
    config = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "n_groups": 1,
              "head_dim": 12, "num_heads": 4, "chunk_size": 8} | shape  # fmt: skip
    torch.manual_seed(0)
    return shaken(transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config)))


@SHAPE
@torch.no_grad()
def test_logits_equal_those_of_transformers_both_ways(tmp_path, shape):
    theirs = peer(**shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, read = load(tmp_path / "theirs"), tokens(20)
    assert relative_error(ours(read)[0], theirs(read).logits) < FLOAT32
    save_transformers(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is transformers.Mamba2ForCausalLM
    assert relative_error(again(read).logits, theirs(read).logits) < FLOAT32
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())


@torch.no_grad()
def test_generation_equals_that_of_transformers_for_fifty_tokens(tmp_path):
    theirs = peer(n_groups=2)
    theirs.save_pretrained(tmp_path)
    ours, prompt = load(tmp_path), tokens(20, length=6)
    expected = theirs.generate(prompt, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 6:]
    assert len(expected.unique()) > 2
    assert torch.equal(ours.generate(prompt, 50, temperature=0).tokens, expected)


@SHAPE
@torch.no_grad()
def test_mamba_ssm_both_ways(tmp_path, shape):
    theirs = peer(**(shape | ({"layer_norm_epsilon": 1e-5} if "layer_norm_epsilon" in shape else {})))
    config = theirs.config
    state = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    state["lm_head.weight"] = theirs.lm_head.weight.clone()
    document = {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": config.state_size,
            "d_conv": config.conv_kernel,
            "headdim": config.head_dim,
            "ngroups": config.n_groups,
            "bias": config.use_bias,
            "conv_bias": config.use_conv_bias,
            "chunk_size": 16,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
    if "time_step_limit" in shape:
        document["ssm_cfg"]["dt_limit"] = shape["time_step_limit"]
    folder = write_checkpoint(tmp_path / "theirs", document, {k: v.contiguous() for k, v in state.items()})
    ours, read = load(folder), tokens(20)
    assert relative_error(ours(read)[0], theirs(read).logits) < FLOAT32
    save_mamba_ssm(ours, tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = document["ssm_cfg"] | {"expand": 2}
    del expected["chunk_size"]
    assert written["ssm_cfg"] == json.loads(json.dumps(expected))


@torch.no_grad()
def test_mamba_ssm_settings_have_their_defaults(tmp_path):
    """As in the published folders, whose ssm_cfg states the kind of the layers alone."""
    mixer = {"name": "mamba2", "state_size": 128, "head_width": 64}
    ours = causal(model_width=32, mixers=(mixer,), vocabulary_multiple=8)
    save_mamba_ssm(ours, tmp_path / "folder")
    change_config(tmp_path / "folder", ssm_cfg={"layer": "Mamba2"}, attn_layer_idx=[], d_intermediate=0)
    assert torch.equal(load(tmp_path / "folder")(tokens(13))[0], ours(tokens(13))[0])


@pytest.mark.parametrize("mixer", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("tied_head", [True, False])
@torch.no_grad()
def test_round_trips_give_identical_models(tmp_path, mixer, tied_head):
    model = causal(mixers=(mixer,) * 2, tied_head=tied_head)
    saves = [save_mamba_ssm] if mixer["name"] == "mamba3" else [save_mamba_ssm, save_transformers]
    for number, save in enumerate(saves):
        save(model, tmp_path / str(number))
        again = load(tmp_path / str(number))
        assert torch.equal(again(tokens(13))[0], model(tokens(13))[0])


def test_mamba3_tensors_have_their_published_names_and_shapes(tmp_path):
    mixer = MAMBA3 | {"rank": 3, "output_norm": True}
    save_mamba_ssm(causal(mixers=(mixer,), vocabulary_multiple=1), tmp_path / "folder")
    found = {
        name.removeprefix("backbone.layers.0.mixer."): tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "folder" / "model.safetensors").items()
        if ".mixer." in name
    }
    heads, inner, size, rank, groups = 4, 16, 4, 3, 2
    assert found == {
        "in_proj.weight": (2 * inner + 2 * size * groups * rank + 3 * heads + 1, 8),
        "dt_bias": (heads,),
        "B_bias": (heads, rank, size),
        "C_bias": (heads, rank, size),
        "B_norm.weight": (size,),
        "C_norm.weight": (size,),
        "mimo_x": (heads, rank, 4),
        "mimo_z": (heads, rank, 4),
        "mimo_o": (heads, rank, 4),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (8, inner),
    }
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert written["ssm_cfg"] == {"layer": "Mamba3", "d_state": 4, "headdim": 4, "ngroups": 2, "expand": 2,
                                  "rope_fraction": 0.5, "is_outproj_norm": True, "is_mimo": True,
                                  "mimo_rank": 3}  # fmt: skip


def test_kinds_are_recognised():
    assert recognise({"model_type": "mamba2"}, "") == "transformers_mamba2"
    for layers in ("Mamba2", "Mamba3"):
        found = recognise({"d_model": 1, "n_layer": 1, "ssm_cfg": {"layer": layers}}, "")
        assert found == f"mamba_ssm_{layers.lower()}"


def test_heads_that_contradict_the_width_are_refused(tmp_path):
    peer().save_pretrained(tmp_path)
    change_config(tmp_path, num_heads=3)
    assert "has 3 heads of 12 channels, which are not its 48 inner channels" in problem_with(tmp_path)


def test_models_that_have_no_foreign_form_are_refused(tmp_path):
    for mixers, save, part in [
        ((MAMBA2, MAMBA3), save_mamba_ssm, "selective mixers"),
        ((MAMBA3,), save_transformers, "transformers does not support Mamba-3"),
        ((MAMBA3 | {"trapezoidal": False},), save_mamba_ssm, "always has the trapezoidal rule"),
        ((MAMBA2 | {"norm_epsilon": 1e-3},), save_transformers, "one epsilon for all norms"),
        ((MAMBA2, MAMBA2 | {"groups": 1}), save_mamba_ssm, "differ"),
    ]:
        with pytest.raises(InputError, match=part):
            save(causal(mixers=mixers), tmp_path / "folder")
    with pytest.raises(InputError, match="selective mixers"):
        save_caduceus(masked(mixer=MAMBA2), tmp_path / "folder")
    assert not any(tmp_path.iterdir())
