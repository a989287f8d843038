"""What cannot be loaded or saved is refused in one sentence that names everything that is wrong."""

import pytest
import torch

import mambacore.checkpoints.files
from foreign_checkpoints import (
    caduceus_folder,
    causal,
    change_config,
    change_tensors,
    masked,
    peer_folder,
    problem_with,
)
from mambacore.checkpoints import save_caduceus, save_mamba_ssm, save_transformers
from mambacore.errors import InputError


def test_a_complement_that_contradicts_itself_is_refused(tmp_path):
    folder = caduceus_folder(tmp_path)
    other = torch.arange(16)
    change_tensors(folder, **{"lm_head.complement_map": other})
    assert "in lm_head.complement_map but" in problem_with(folder)
    for wrong in ({"0": 1, "1": 2, "2": 0}, {"0": 0, "2": 2}, {"0": "1"}, [0, 1], {"0": 99}):
        change_config(folder, complement_map=wrong)
        assert "complement" in problem_with(folder)


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path):
    folder = peer_folder(tmp_path)
    change_tensors(
        folder,
        **{
            "backbone.layers.0.mixer.A_log": None,
            "backbone.norm_f.weight": None,
            "backbone.layers.1.mixer.D": torch.zeros(3),
            "backbone.layers.1.mixer.conv1d.weight": torch.zeros(48, 4),
            "backbone.layers.1.mixer.dt_proj.bias": torch.zeros(48, dtype=torch.int64),
            "backbone.layers.2.norm.weight": torch.zeros(24),
        },
    )
    problem = problem_with(folder)
    assert "lacks backbone.layers.0.mixer.A_log, backbone.norm_f.weight" in problem
    assert "has backbone.layers.2.norm.weight, which the model does not have" in problem
    assert "backbone.layers.1.mixer.D as float32 (3,) where the model has (48,)" in problem
    assert "conv1d.weight as float32 (48, 4) where the model has (48, 1, 4)" in problem
    assert "dt_proj.bias as int64 (48,)" in problem
    assert str(folder) in problem


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": ..., "vocab_size": ...}, ["lacks vocab_size, hidden_size"]),
        ({"hidden_size": "24", "state_size": 0, "use_bias": 1}, ["hidden_size as '24'", "state_size as 0", "use_bias"]),
        ({"time_step_rank": "full", "layer_norm_epsilon": None}, ["time_step_rank as 'full'", "layer_norm_epsilon"]),
        ({"hidden_act": "gelu"}, ["hidden_act as 'gelu', but only SiLU"]),
        ({"model_type": "falcon_mamba"}, ["model type 'falcon_mamba'"]),
        ({"model_type": ...}, ["unknown kind"]),
    ],
)
def test_configurations_of_transformers_that_cannot_be_used(tmp_path, changes, parts):
    folder = peer_folder(tmp_path)
    change_config(folder, **changes)
    problem = problem_with(folder)
    assert all(part in problem for part in parts) and "config.json" in problem


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"ssm_cfg": {"layer": "Mamba9"}}, "ssm_cfg.layer as 'Mamba9', but only"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 4}}, "ssm_cfg.d_ssm as 4, but a perceptron"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim as True"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [1, 0]}}, "ssm_cfg.dt_limit as [1, 0], which is not two"),
        ({"ssm_cfg": {"layer": "Mamba3", "is_mimo": True, "mimo_rank": 1}}, "mimo_rank of 1"),
        ({"ssm_cfg": {"layer": "Mamba3", "rope_fraction": 0.25}}, "rope_fraction of 0.25, which is not 0.5 or 1.0"),
        ({"ssm_cfg": {"d_state": 3, "headdim": 64}}, "ssm_cfg.headdim, which are not supported"),
        ({"ssm_cfg": 7}, "ssm_cfg"),
        ({"rms_norm": False}, "rms_norm as False, but layer norm"),
        ({"attn_layer_idx": [1], "attn_cfg": {}}, "attn_layer_idx as [1], but attention"),
        ({"d_intermediate": 64}, "d_intermediate as 64"),
        ({"n_layer": ...}, "unknown kind"),
    ],
)
def test_configurations_of_mamba_ssm_that_cannot_be_used(tmp_path, changes, part):
    save_mamba_ssm(causal(), tmp_path / "folder")
    change_config(tmp_path / "folder", **changes)
    assert part in problem_with(tmp_path / "folder")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bidirectional": False}, "bidirectional as False"),
        ({"bidirectional_strategy": "concat"}, "bidirectional_strategy as 'concat'"),
        ({"rms_norm": False}, "layer norm"),
        ({"d_model": ...}, "lacks d_model"),
    ],
)
def test_configurations_of_caduceus_that_cannot_be_used(tmp_path, changes, part):
    folder = caduceus_folder(tmp_path)
    change_config(folder, **changes)
    assert part in problem_with(folder)


class Program:
    """A pickle of this writes a file when it is read by a reader that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_more_than_tensors_is_neither_run_nor_read(tmp_path, zipped):
    folder, written = peer_folder(tmp_path / "folder"), tmp_path / "written"
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"weight": Program(written)}, path, _use_new_zipfile_serialization=zipped)
    problem = problem_with(folder)
    assert "holds more than tensors" in problem and "safe_serialization=True" in problem and "\n" not in problem
    torch.save([torch.ones(3)], path)
    assert "is not a table of tensors by name" in problem_with(folder)
    torch.save({"weight": torch.ones(3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in problem_with(folder)
    assert not written.exists()


def test_damaged_and_pickled_files_are_refused(tmp_path):
    assert "there is no folder" in problem_with(tmp_path / "nowhere")
    folder = peer_folder(tmp_path / "folder")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert "model.safetensors is truncated or damaged" in problem_with(folder)
    weights.unlink()
    assert "neither model.safetensors nor" in problem_with(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is truncated or damaged" in problem_with(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in problem_with(folder)
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in problem_with(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in problem_with(folder)


def test_models_that_have_no_foreign_form_are_refused(tmp_path):
    complex_state = {"name": "selective", "complex_state": True}
    fixed_output = {"name": "selective", "selective": ["step", "input"]}
    for model, save, part in [
        (causal(mixers=("selective", "attention")), save_transformers, "only fully selective mixers with a real state"),
        (causal(mixers=(complex_state,)), save_mamba_ssm, "only fully selective mixers with a real state"),
        (causal(mixers=(fixed_output,)), save_mamba_ssm, "only fully selective mixers with a real state"),
        (causal(mixers=("selective", {"name": "selective", "state_size": 3})), save_transformers, "differ"),
        (causal(norm_epsilon=1e-6), save_mamba_ssm, "no setting for norm_epsilon"),
        (masked(), save_transformers, "a MaskedLanguageModel"),
        (causal(), save_caduceus, "a CausalLanguageModel"),
        (masked(equivariant=True, tied_head=False), save_caduceus, "always ties"),
    ]:
        with pytest.raises(InputError, match=part):
            save(model, tmp_path / "folder")
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        save_transformers(causal(), taken)
    assert [entry.name for entry in taken.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save_transformers(causal(), tmp_path / "empty")
    assert sorted(entry.name for entry in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]

    def full_disk(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mambacore.checkpoints.files, "save_file", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_transformers(causal(), tmp_path / "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "taken"]
