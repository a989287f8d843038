"""Random foreign checkpoints in folders, ways to damage them, and models to save."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from caduceus_equations import caduceus_config, caduceus_tensors, write_checkpoint
from mambacore.checkpoints import load
from mambacore.errors import InputError
from mambacore.models import (
    CausalLanguageModel,
    CausalLanguageModelConfig,
    MaskedLanguageModel,
    MaskedLanguageModelConfig,
)

transformers = pytest.importorskip("transformers")


def tokens(below, length=19, seed=1):
    """Random whole numbers, (2, length)."""
    return torch.randint(0, below, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(model):
    """A model whose parameters all differ, also those that start as zeros, as ones or as copies."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.3 * torch.rand_like(parameter)).add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def peer(**shape):
    """A random model of transformers, an oracle."""
    config = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5} | shape
    torch.manual_seed(0)
    return shaken(transformers.MambaForCausalLM(transformers.MambaConfig(**config)))


def causal(**options):
    """A small causal model of ours."""
    torch.manual_seed(0)
    mixer = {"name": "selective", "state_size": 3, "kernel_width": 3}
    config = {"vocabulary_size": 13, "model_width": 8, "mixers": (mixer,) * 2} | options
    return shaken(CausalLanguageModel(CausalLanguageModelConfig(**config)))


def masked(**options):
    """A small masked model of ours."""
    torch.manual_seed(0)
    config = {"vocabulary_size": 6, "model_width": 8, "layers": 2, "complement": (3, 2, 1, 0), "vocabulary_multiple": 4}
    return shaken(MaskedLanguageModel(MaskedLanguageModelConfig(**(config | options))))


def peer_folder(folder, **shape):
    """A checkpoint of transformers."""
    peer(**shape).save_pretrained(folder)
    return folder


def caduceus_folder(folder, **changes):
    """A checkpoint of Caduceus."""
    config = caduceus_config(**changes)
    return write_checkpoint(folder, config, caduceus_tensors(config))


def change_config(folder, **changes):
    """Set keys of a configuration; ... removes one."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, **changes):
    """Set tensors of a checkpoint; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def problem_with(folder):
    """What loading says, which must be one line."""
    with pytest.raises(InputError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)
