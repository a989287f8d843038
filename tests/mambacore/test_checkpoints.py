"""Foreign checkpoints compute here what they compute at home, and what is saved here computes the same there."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from caduceus_equations import (
    BACKBONE,
    COMPLEMENT,
    caduceus_config,
    caduceus_logits,
    caduceus_tensors,
    write_checkpoint,
)
from foreign_checkpoints import (
    caduceus_folder,
    causal,
    change_config,
    change_tensors,
    masked,
    peer,
    peer_folder,
    problem_with,
    tokens,
    transformers,
)
from mambacore.checkpoints import load, recognise, save_caduceus, save_mamba_ssm, save_transformers
from mambacore.checkpoints.names import CADUCEUS_COMPLEMENTS
from mambacore.models import (
    MaskedLanguageModel,
    MaskedLanguageModelConfig,
)
from tolerances import FLOAT32, FLOAT64, relative_error

SHAPES = {
    "defaults": {},
    "wide": {"hidden_size": 40, "state_size": 7, "conv_kernel": 3, "expand": 3, "time_step_rank": 5},
    "biases": {"use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-2},
    "untied": {"tie_word_embeddings": False, "residual_in_fp32": False, "num_hidden_layers": 3},
    "narrow": {"hidden_size": 8, "state_size": 1, "conv_kernel": 2, "expand": 1, "vocab_size": 5},
}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
CADUCEUS = {
    "PS fused": {},
    "PS fused, an even number of layers": {"n_layer": 2},
    "PS not fused": {"fused_add_norm": False},
    "PS multiplied": {"bidirectional_strategy": "ew_multiply"},
    "PS untied directions": {"bidirectional_weight_tie": False, "fused_add_norm": False},
    "PS with biases": {"ssm_cfg": {"d_state": 2, "d_conv": 3, "expand": 3, "dt_rank": 2, "bias": True}},
    "PH": {"rcps": False},
    "PH not fused, untied head": {"rcps": False, "fused_add_norm": False, "tie_word_embeddings": False},
    "PH without complement": {"rcps": False, "complement_map": None, "norm_epsilon": 1e-2},
}
CADUCEUS_KINDS = pytest.mark.parametrize("changes", CADUCEUS.values(), ids=CADUCEUS.keys())


@SHAPE
@torch.no_grad()
def test_logits_equal_those_of_transformers(tmp_path, shape):
    model = peer(**shape)
    model.save_pretrained(tmp_path)
    read = tokens(model.config.vocab_size)
    assert relative_error(load(tmp_path)(read)[0], model(read).logits) < FLOAT32


@SHAPE
@torch.no_grad()
def test_transformers_loads_what_is_saved_with_equal_logits(tmp_path, shape):
    ours = load(peer_folder(tmp_path / "theirs", **shape))
    save_transformers(ours, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    read = tokens(ours.config.vocabulary_size)
    assert relative_error(theirs.eval()(read).logits, ours(read)[0]) < FLOAT32
    assert theirs.config.tie_word_embeddings == (ours.head is None)


@torch.no_grad()
def test_transformers_loads_a_padded_vocabulary(tmp_path):
    ours = causal(vocabulary_multiple=8, residual_in_float32=True)
    save_transformers(ours, tmp_path / "folder")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "folder").eval()
    logits = ours(tokens(13))[0]
    assert theirs.config.vocab_size == logits.shape[2] == 16
    assert relative_error(theirs(tokens(13)).logits, logits) < FLOAT32


@torch.no_grad()
def test_generation_equals_that_of_transformers_token_by_token(tmp_path):
    theirs = peer(tie_word_embeddings=False)  # a tied head mostly repeats the last token
    theirs.save_pretrained(tmp_path)
    ours, prompt = load(tmp_path), tokens(20, length=6)
    expected = theirs.generate(prompt, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 6:]
    assert len(expected.unique()) > 2
    assert torch.equal(ours.generate(prompt, 15, temperature=0).tokens, expected)
    (found, state), peers = ours(prompt), theirs(prompt, use_cache=True)
    for position in range(15):
        assert relative_error(found[:, -1], peers.logits[:, -1]) < FLOAT32
        piece = expected[:, position : position + 1]
        found, state = ours(piece, state)
        peers = theirs(piece, cache_params=peers.cache_params, use_cache=True)


@torch.no_grad()
def test_bfloat16_checkpoints_and_models(tmp_path):
    theirs = peer().bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    read = tokens(20)
    assert relative_error(ours(read)[0], theirs.float()(read).logits) < FLOAT32
    save_transformers(load(tmp_path / "theirs", torch.bfloat16), tmp_path / "ours")
    assert transformers.MambaForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    again = load(tmp_path / "ours")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), ours.parameters(), strict=True))


@torch.no_grad()
def test_a_checkpoint_in_several_files(tmp_path):
    model = peer()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert relative_error(load(tmp_path)(tokens(20))[0], model(tokens(20)).logits) < FLOAT32
    next(tmp_path.glob("*-00002-*")).unlink()
    assert "00002" in problem_with(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere"}}))
    assert "not in its folder" in problem_with(tmp_path)
    index.write_text("{}")
    assert "no weight_map" in problem_with(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickled_checkpoint_is_read_as_tensors_alone(tmp_path, shards):
    """As mamba_ssm publishes its own."""
    model = causal()
    save_mamba_ssm(model, tmp_path / "safe")
    tensors = load_file(tmp_path / "safe" / "model.safetensors")
    (tmp_path / "safe" / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, tmp_path / "safe" / "pytorch_model.bin")
    else:
        names = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(tensors)}
        for shard in set(names.values()):
            part = {name: tensor for name, tensor in tensors.items() if names[name] == shard}
            torch.save(part, tmp_path / "safe" / shard)
        index = tmp_path / "safe" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": names}))
    assert torch.equal(load(tmp_path / "safe")(tokens(13))[0], model(tokens(13))[0])


@torch.no_grad()
@pytest.mark.parametrize("pickled", [False, True])
def test_a_checkpoint_on_the_hub_is_found_by_name(tmp_path, monkeypatch, pickled):
    model, asked = causal(), []
    folder = tmp_path / "cache"
    save_mamba_ssm(model, folder)
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(load("hf://state-spaces/mamba@main")(tokens(13))[0], model(tokens(13))[0])
    assert {one[:2] for one in asked} == {("state-spaces/mamba", "main")}
    patterns = [pattern for one in asked for pattern in one[2]]
    assert "config.json" in patterns and "*.safetensors" in patterns
    # A pickle is not even downloaded where there are safetensors.
    assert ("pytorch_model*.bin" in patterns) is pickled


@SHAPE
@torch.no_grad()
def test_mamba_ssm_both_ways(tmp_path, shape):
    if "layer_norm_epsilon" in shape:
        shape = shape | {"layer_norm_epsilon": 1e-5}
    theirs = peer(**shape)
    config = theirs.config
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    tensors["lm_head.weight"] = theirs.lm_head.weight.clone()
    document = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "d_state": config.state_size,
            "d_conv": config.conv_kernel,
            "expand": config.expand,
            "dt_rank": shape.get("time_step_rank", "auto"),
            "bias": config.use_bias,
            "conv_bias": config.use_conv_bias,
        },
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
    ours = load(write_checkpoint(tmp_path / "theirs", document, {k: v.contiguous() for k, v in tensors.items()}))
    assert relative_error(ours(tokens(config.vocab_size))[0], theirs(tokens(config.vocab_size)).logits) < FLOAT32
    save_mamba_ssm(ours, tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written.keys() == document.keys()
    for key in document.keys() - {"ssm_cfg"}:
        assert written[key] == document[key] or key == "residual_in_fp32"


def test_mamba_ssm_settings_have_their_defaults(tmp_path):
    ours = causal(mixers=("selective",) * 2, vocabulary_multiple=8, residual_in_float32=True)
    save_mamba_ssm(ours, tmp_path / "folder")
    change_config(tmp_path / "folder", ssm_cfg={}, rms_norm=..., residual_in_fp32=..., pad_vocab_size_multiple=...)
    again = load(tmp_path / "folder")
    assert again.config.vocabulary_size == 13 and again.config.padded_vocabulary_size == 16
    assert torch.equal(again(tokens(13))[0], ours(tokens(13))[0])
    change_config(tmp_path / "folder", ssm_cfg=None)
    assert torch.equal(load(tmp_path / "folder")(tokens(13))[0], ours(tokens(13))[0])


@CADUCEUS_KINDS
@torch.no_grad()
def test_caduceus_equals_its_equations(tmp_path, changes):
    config = caduceus_config(**changes)
    tensors = caduceus_tensors(config)
    model = load(write_checkpoint(tmp_path, config, tensors), torch.float64)
    read = tokens(12, length=9)
    found = model(read)
    expected = torch.stack([caduceus_logits(config, tensors, row) for row in read])
    assert relative_error(found, expected) < FLOAT64
    if config["complement_map"] is not None:
        other = torch.tensor([[COMPLEMENT[int(token)] for token in row.flip(0)] for row in read])
        assert torch.equal(model.reverse_complement(read), other)
        of_other = torch.stack([caduceus_logits(config, tensors, row) for row in other]).flip(1)
        conjoined = (expected + of_other[..., [COMPLEMENT[token] for token in range(16)]]) / 2
        assert relative_error(model.conjoined_logits(read), conjoined) < FLOAT64


@CADUCEUS_KINDS
def test_saving_caduceus_gives_back_what_was_loaded(tmp_path, changes):
    model = load(caduceus_folder(tmp_path / "theirs", **changes), torch.float64)
    save_caduceus(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = load(tmp_path / "ours", torch.float64)
    assert torch.equal(again(tokens(12)), model(tokens(12)))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    original = caduceus_config(**changes)
    assert original.keys() <= written.keys()
    for key in original.keys() - {"ssm_cfg", "complement_map", "fused_add_norm"}:
        assert written[key] == original[key]
    assert written["fused_add_norm"] == original["fused_add_norm"] or not original["rcps"]
    if original["complement_map"] is not None:
        assert list(written["complement_map"].items()) == [(str(one), COMPLEMENT[one]) for one in range(16)]


def test_the_strands_change_places_in_fused_checkpoints_only(tmp_path):
    config = caduceus_config()
    exchanged = load(write_checkpoint(tmp_path / "fused", config, caduceus_tensors(config)))
    plain = caduceus_config(fused_add_norm=False)
    in_place = load(write_checkpoint(tmp_path / "plain", plain, caduceus_tensors(plain)))
    for one, other in zip(exchanged.parameters(), in_place.parameters(), strict=True):
        assert torch.equal(one, other)
    assert relative_error(exchanged(tokens(12)), in_place(tokens(12))) > 1e-2


def test_the_published_size_has_the_published_number_of_parameters():
    config = MaskedLanguageModelConfig(16, 256, 16, tuple(COMPLEMENT.values()), equivariant=True, exchange_strands=True)
    assert sum(parameter.numel() for parameter in MaskedLanguageModel(config).parameters()) == 7_725_312


def test_the_order_of_the_complement_map_means_nothing(tmp_path):
    folder = caduceus_folder(tmp_path)
    expected = load(folder)(tokens(12))
    table = {str(token): COMPLEMENT[token] for token in range(16)}
    for order in (sorted(table), sorted(table, reverse=True)):
        change_config(folder, complement_map={token: table[token] for token in order}, vocab_size=16)
        assert torch.equal(load(folder)(tokens(12)), expected)
    change_config(folder, complement_map=None)  # the tensors have it as well
    assert torch.equal(load(folder)(tokens(12)), expected)
    change_tensors(folder, **dict.fromkeys(CADUCEUS_COMPLEMENTS))
    assert "lacks complement_map" in problem_with(folder)
    change_config(folder, complement_map=table)
    assert torch.equal(load(folder)(tokens(12)), expected)


def test_tied_tensors_may_be_in_the_file_if_they_are_equal(tmp_path):
    config = caduceus_config()
    tensors = caduceus_tensors(config)
    expected = load(write_checkpoint(tmp_path, config, tensors))(tokens(12))
    rev = f"{BACKBONE}.layers.0.mixer.submodule.mamba_rev.in_proj.weight"
    table = f"{BACKBONE}.embeddings.word_embeddings.embedding.weight"
    again = {rev: tensors[rev.replace("rev", "fwd")].clone(), "lm_head.lm_head.weight": tensors[table].clone()}
    change_tensors(tmp_path, **again)
    assert torch.equal(load(tmp_path)(tokens(12)), expected)
    change_tensors(tmp_path, **{table: None})  # kept under its other name only
    assert torch.equal(load(tmp_path)(tokens(12)), expected)
    change_tensors(tmp_path, **{table: tensors[table], **{name: tensor + 1 for name, tensor in again.items()}})
    problem = problem_with(tmp_path)
    assert rev in problem and "lm_head.lm_head.weight unlike" in problem and "ties them" in problem


@pytest.mark.parametrize("save", [save_transformers, save_mamba_ssm])
@pytest.mark.parametrize("tied_head", [True, False])
def test_round_trips_give_identical_tensors(tmp_path, save, tied_head):
    model = causal(tied_head=tied_head)
    save(model, tmp_path / "folder")
    random_numbers = torch.get_rng_state()
    again = load(tmp_path / "folder")
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not again.training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"equivariant": True},
        {"equivariant": True, "exchange_strands": True},
        {"tied_projections": False, "combination": "multiply"},
        {"tied_head": False},
    ],
)
def test_round_trips_of_masked_models_give_identical_models(tmp_path, options):
    model = masked(**options)
    save_caduceus(model, tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(again(tokens(6)), model(tokens(6)))
    assert torch.equal(again.complement, model.complement)
    for option, value in options.items():
        assert getattr(again.config, option) == value


def test_kinds_are_recognised():
    assert recognise({"model_type": "mamba"}, "") == "transformers"
    assert recognise({"d_model": 1, "n_layer": 1}, "") == "mamba_ssm"
    assert recognise({"d_model": 1, "n_layer": 1, "rcps": True}, "") == "caduceus"
