"""Caduceus, slowly: a checkpoint of random tensors under its published names, and its logits from the equations.

Nothing here calls the package: loops over positions, explicit flips, float64.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

BACKBONE = "caduceus.backbone"
# As published: A, C, G, T are 7, 8, 9, 10, everything else is its own complement.
COMPLEMENT = {**{token: token for token in range(16)}, 7: 10, 8: 9, 9: 8, 10: 7}


def caduceus_config(**changes) -> dict:
    """A small configuration with all keys of the published ones."""
    config = {
        "model_type": "caduceus",
        "d_model": 6,
        "n_layer": 3,
        "vocab_size": 12,
        "ssm_cfg": {"d_state": 3, "d_conv": 4, "expand": 2, "dt_rank": "auto", "use_fast_path": True},
        "rms_norm": True,
        "residual_in_fp32": False,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "norm_epsilon": 1e-5,
        "bidirectional": True,
        "bidirectional_strategy": "add",
        "bidirectional_weight_tie": True,
        "rcps": True,
        "complement_map": {str(token): COMPLEMENT[token] for token in range(12)},
    }
    return config | changes


def caduceus_tensors(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names of the published safetensors, which leave out what is tied."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    ssm = config["ssm_cfg"]
    width, states, taps = config["d_model"], ssm["d_state"], ssm["d_conv"]
    inner, rows = ssm["expand"] * width, 16
    rank = math.ceil(width / 16) if ssm["dt_rank"] == "auto" else ssm["dt_rank"]
    rcps, fused = config["rcps"], config["fused_add_norm"]
    norm = "submodule.weight" if rcps and not fused else "weight"
    embeddings = f"{BACKBONE}.embeddings.word_embeddings"
    tensors = {f"{embeddings}.embedding.weight" if rcps else f"{embeddings}.weight": normal(rows, width)}
    if rcps:
        complement = torch.tensor([COMPLEMENT[token] for token in range(rows)])
        tensors |= {f"{embeddings}.complement_map": complement, "lm_head.complement_map": complement.clone()}
    for layer in range(config["n_layer"]):
        prefix = f"{BACKBONE}.layers.{layer}"
        tensors[f"{prefix}.norm.{norm}"] = 1 + normal(width, scale=0.5)
        mixer = f"{prefix}.mixer.submodule" if rcps else f"{prefix}.mixer"
        for direction in ("mamba_fwd", "mamba_rev"):
            one = f"{mixer}.{direction}"
            if direction == "mamba_fwd" or not config["bidirectional_weight_tie"]:
                tensors[f"{one}.in_proj.weight"] = normal(2 * inner, width, scale=width**-0.5)
                tensors[f"{one}.out_proj.weight"] = normal(width, inner, scale=inner**-0.5)
                if ssm.get("bias"):
                    tensors[f"{one}.in_proj.bias"] = normal(2 * inner)
                    tensors[f"{one}.out_proj.bias"] = normal(width)
            tensors[f"{one}.conv1d.weight"] = normal(inner, 1, taps, scale=0.5)
            tensors[f"{one}.conv1d.bias"] = normal(inner)
            tensors[f"{one}.x_proj.weight"] = normal(rank + 2 * states, inner, scale=inner**-0.5)
            tensors[f"{one}.dt_proj.weight"] = normal(inner, rank)
            tensors[f"{one}.dt_proj.bias"] = normal(inner) - 1
            tensors[f"{one}.A_log"] = normal(inner, states)
            tensors[f"{one}.D"] = normal(inner)
    tensors[f"{BACKBONE}.norm_f.{norm}"] = 1 + normal(width, scale=0.5)
    if not config.get("tie_word_embeddings", True):
        tensors["lm_head.lm_head.weight" if rcps else "lm_head.weight"] = normal(rows, width)
    return tensors


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    """``config.json`` and ``model.safetensors`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def mamba(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """One causal Mamba (arXiv 2312.00752, algorithm 2 and figure 3) over (length, width), position by position."""
    projected = F.linear(inputs, weights["in_proj.weight"], weights.get("in_proj.bias"))
    inner = projected.shape[1] // 2
    values, gates = projected[:, :inner], projected[:, inner:]
    taps, state_size = weights["conv1d.weight"].shape[2], weights["A_log"].shape[1]
    state, outputs = torch.zeros(inner, state_size, dtype=torch.float64), []
    for position in range(len(inputs)):
        convolved = weights["conv1d.bias"].clone()
        for back in range(taps):
            if position >= back:
                convolved += weights["conv1d.weight"][:, 0, taps - 1 - back] * values[position - back]
        here = F.silu(convolved)
        selection = weights["x_proj.weight"] @ here
        rank = len(selection) - 2 * state_size
        step = F.softplus(weights["dt_proj.weight"] @ selection[:rank] + weights["dt_proj.bias"])
        for channel in range(inner):
            decay = torch.exp(-step[channel] * weights["A_log"][channel].exp())
            state[channel] = decay * state[channel] + step[channel] * here[channel] * selection[rank:-state_size]
        read = state @ selection[-state_size:] + weights["D"] * here
        outputs.append(
            F.linear(read * F.silu(gates[position]), weights["out_proj.weight"], weights.get("out_proj.bias"))
        )
    return torch.stack(outputs)


def bimamba(config: dict, tensors: dict[str, Tensor], prefix: str, inputs: Tensor) -> Tensor:
    """forward(x) and flip(reverse(flip(x))), added or multiplied."""
    weights = {
        direction: {
            name.removeprefix(f"{prefix}.{direction}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{prefix}.{direction}.")
        }
        for direction in ("mamba_fwd", "mamba_rev")
    }
    if config["bidirectional_weight_tie"]:
        for name in ("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"):
            if name in weights["mamba_fwd"]:
                weights["mamba_rev"][name] = weights["mamba_fwd"][name]
    ahead = mamba(weights["mamba_fwd"], inputs)
    behind = mamba(weights["mamba_rev"], inputs.flip(0)).flip(0)
    return ahead * behind if config["bidirectional_strategy"] == "ew_multiply" else ahead + behind


def root_mean_square_norm(config: dict, weight: Tensor, inputs: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight."""
    return inputs / torch.sqrt((inputs**2).mean(-1, keepdim=True) + config["norm_epsilon"]) * weight


def caduceus_logits(config: dict, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits (length, 16) of (length,) tokens, layer by layer as the published model computes them."""
    rcps, width = config["rcps"], config["d_model"]
    norm = "submodule.weight" if rcps and not config["fused_add_norm"] else "weight"
    embeddings = f"{BACKBONE}.embeddings.word_embeddings"
    table = tensors[f"{embeddings}.embedding.weight" if rcps else f"{embeddings}.weight"]
    hidden = table[tokens]
    complement = torch.tensor([COMPLEMENT[token] for token in range(16)])
    if rcps:
        of_other_strand = table[complement[tokens.flip(0)]]
        hidden = torch.cat([hidden, of_other_strand.flip(0, 1)], dim=1)
    residual = torch.zeros_like(hidden)
    for layer in range(config["n_layer"]):
        prefix = f"{BACKBONE}.layers.{layer}"
        residual = residual + hidden
        weight = tensors[f"{prefix}.norm.{norm}"]
        if not rcps:
            normal = root_mean_square_norm(config, weight, residual)
            hidden = bimamba(config, tensors, f"{prefix}.mixer", normal)
            continue
        if config["fused_add_norm"]:  # the published slip: what is called forward is the second half
            residual = torch.cat([residual[:, width:], residual[:, :width]], dim=1)
        first = root_mean_square_norm(config, weight, residual[:, :width])
        second = root_mean_square_norm(config, weight, residual[:, width:].flip(0, 1))
        mixed = [bimamba(config, tensors, f"{prefix}.mixer.submodule", strand) for strand in (first, second)]
        hidden = torch.cat([mixed[0], mixed[1].flip(0, 1)], dim=1)
    residual = residual + hidden
    weight = tensors[f"{BACKBONE}.norm_f.{norm}"]
    head = tensors.get("lm_head.lm_head.weight" if rcps else "lm_head.weight", table)
    if not rcps:
        return root_mean_square_norm(config, weight, residual) @ head.T
    first = root_mean_square_norm(config, weight, residual[:, :width])
    second = root_mean_square_norm(config, weight, residual[:, width:].flip(0, 1)).flip(0, 1)
    return first @ head.T + second.flip(1) @ head[complement].T
