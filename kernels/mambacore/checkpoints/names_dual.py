"""Names used by other projects for Mamba-2 and Mamba-3: the tables of `names` for these two."""

from __future__ import annotations

from typing import Final

from mambacore.checkpoints.names import EMBEDDING, HEAD, Family, Key, Refused

_MAMBA2: Final = {
    "input_projection.weight": "in_proj.weight",
    "input_projection.bias": "in_proj.bias",
    "convolution_weight": "conv1d.weight",
    "convolution_bias": "conv1d.bias",
    "step_bias": "dt_bias",
    "log_decay_rate": "A_log",
    "skip_weight": "D",
    "gate_norm.weight": "norm.weight",
    "output_projection.weight": "out_proj.weight",
    "output_projection.bias": "out_proj.bias",
}

_MAMBA3: Final = {
    "input_projection.weight": "in_proj.weight",
    "step_bias": "dt_bias",
    "input_matrix_norm.weight": "B_norm.weight",
    "output_matrix_norm.weight": "C_norm.weight",
    "input_matrix_bias": "B_bias",
    "output_matrix_bias": "C_bias",
    "rank_inputs": "mimo_x",
    "rank_gates": "mimo_z",
    "rank_outputs": "mimo_o",
    "skip_weight": "D",
    "output_norm_weight": "norm.weight",
    "output_projection.weight": "out_proj.weight",
}


def _tensors(mixer: dict[str, str], embedding: str) -> dict[str, str]:
    return {
        EMBEDDING: f"backbone.{embedding}.weight",
        "stack.blocks.{}.norm.weight": "backbone.layers.{}.norm.weight",
        **{f"stack.blocks.{{}}.mixer.{ours}": f"backbone.layers.{{}}.mixer.{theirs}" for ours, theirs in mixer.items()},
        "stack.final_norm.weight": "backbone.norm_f.weight",
        HEAD: "lm_head.weight",
    }


DUAL_TENSORS: Final = {
    "transformers_mamba2": _tensors(_MAMBA2, "embeddings"),
    "mamba_ssm_mamba2": _tensors(_MAMBA2, "embedding"),
    "mamba_ssm_mamba3": _tensors(_MAMBA3, "embedding"),
}

_TRANSFORMERS_MAMBA2: Final = Family(
    title="transformers Mamba-2",
    keys={
        "vocabulary_size": Key("vocab_size", "whole"),
        "model_width": Key("hidden_size", "whole"),
        "layers": Key("num_hidden_layers", "whole"),
        "state_size": Key("state_size", "whole", 128),
        "head_width": Key("head_dim", "whole", 64),
        "heads": Key("num_heads", "whole", 128),
        "groups": Key("n_groups", "whole", 8),
        "kernel_width": Key("conv_kernel", "whole", 4),
        "expansion": Key("expand", "whole", 2),
        "linear_bias": Key("use_bias", "flag", False),
        "convolution_bias": Key("use_conv_bias", "flag", True),
        "step_limits": Key("time_step_limit", "limits", None),
        "residual_in_float32": Key("residual_in_fp32", "flag", True),
        "tied_head": Key("tie_word_embeddings", "flag", False),
        "norm_epsilon": Key("layer_norm_epsilon", "number", 1e-5),
    },
    refused={"hidden_act": Refused(("silu", "swish"), "only SiLU is implemented here")},
    ignored=frozenset(),
    constants={"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_act": "silu"},
)

_MAMBA_SSM_KEYS: Final = {
    "vocabulary_size": Key("vocab_size", "whole"),
    "model_width": Key("d_model", "whole"),
    "layers": Key("n_layer", "whole"),
    "state_size": Key("ssm_cfg.d_state", "whole", 128),
    "head_width": Key("ssm_cfg.headdim", "whole", 64),
    "groups": Key("ssm_cfg.ngroups", "whole", 1),
    "expansion": Key("ssm_cfg.expand", "whole", 2),
    "residual_in_float32": Key("residual_in_fp32", "flag", True),
    "tied_head": Key("tie_embeddings", "flag", True),
    "vocabulary_multiple": Key("pad_vocab_size_multiple", "whole", 8),
}
_MAMBA_SSM_REFUSED: Final = {
    "rms_norm": Refused((True,), "layer norm is not implemented here, only root-mean-square norm"),
    "attn_layer_idx": Refused(([], None), "attention between the Mamba layers cannot be loaded"),
    "d_intermediate": Refused((0, None), "perceptrons between the Mamba layers cannot be loaded"),
}
_HOW_TRAINING_BEGAN: Final = ("dt_min", "dt_max", "dt_init_floor", "chunk_size")


def _nested(*names: str) -> frozenset[str]:
    return frozenset(f"ssm_cfg.{name}" for name in names)


_MAMBA_SSM_MAMBA2: Final = Family(
    title="mamba_ssm Mamba-2",
    keys={
        **_MAMBA_SSM_KEYS,
        "kernel_width": Key("ssm_cfg.d_conv", "whole", 4),
        "linear_bias": Key("ssm_cfg.bias", "flag", False),
        "convolution_bias": Key("ssm_cfg.conv_bias", "flag", True),
        "step_limits": Key("ssm_cfg.dt_limit", "limits", None),
    },
    refused={
        **_MAMBA_SSM_REFUSED,
        "ssm_cfg.d_ssm": Refused((None,), "a perceptron beside the scan is not implemented here"),
        "ssm_cfg.D_has_hdim": Refused((False,), "only one skip weight per head is implemented here"),
        "ssm_cfg.rmsnorm": Refused((True,), "a mixer without its norm is not implemented here"),
        "ssm_cfg.norm_before_gate": Refused((False,), "a norm before the gate is not implemented here"),
    },
    ignored=_nested(
        "layer",
        "d_ssm",
        "D_has_hdim",
        "rmsnorm",
        "norm_before_gate",
        "A_init_range",
        "conv_init",
        "use_mem_eff_path",
        "sequence_parallel",
        *_HOW_TRAINING_BEGAN,
    ),
    constants={"ssm_cfg": {"layer": "Mamba2"}, "rms_norm": True, "fused_add_norm": True},
)

_MAMBA_SSM_MAMBA3: Final = Family(
    title="mamba_ssm Mamba-3",
    keys={
        **_MAMBA_SSM_KEYS,
        "rotated_share": Key("ssm_cfg.rope_fraction", "number", 0.5),
        "output_norm": Key("ssm_cfg.is_outproj_norm", "flag", False),
        "several": Key("ssm_cfg.is_mimo", "flag", False),
        "rank": Key("ssm_cfg.mimo_rank", "whole", 4),
    },
    refused={
        **_MAMBA_SSM_REFUSED,
        "ssm_cfg.A_floor": Refused((1e-4,), "the slowest decay is 0.0001 here"),
    },
    ignored=_nested("layer", "A_floor", "fuse_pregate_headwise_norm", "dropout", *_HOW_TRAINING_BEGAN),
    constants={"ssm_cfg": {"layer": "Mamba3"}, "rms_norm": True, "fused_add_norm": True},
)

DUAL_FAMILIES: Final = {
    "transformers_mamba2": _TRANSFORMERS_MAMBA2,
    "mamba_ssm_mamba2": _MAMBA_SSM_MAMBA2,
    "mamba_ssm_mamba3": _MAMBA_SSM_MAMBA3,
}

LAYER_KEY: Final = ("ssm_cfg", "layer")
"""Key of the kind of layers in mamba_ssm, and below the families by its value."""
LAYERS: Final = {"Mamba2": "mamba_ssm_mamba2", "Mamba3": "mamba_ssm_mamba3"}

MAMBA3_SHARES: Final = (0.5, 1.0)
"""Shares of rotated states supported by mamba_ssm."""
