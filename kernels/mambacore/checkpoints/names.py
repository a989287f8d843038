"""Names used by other projects: all foreign names are in these tables, or in those of `names_dual` for Mamba-2 and
Mamba-3.

Tensors: our name to theirs, with `{}` for the number of a layer. Settings: ours to a `Key` of their `config.json`; dots
in its name separate nested levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

CONFIG_NAME: Final = "config.json"
TENSORS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
INDEX_KEY: Final = "weight_map"
PICKLE_NAME: Final = "pytorch_model.bin"
PICKLE_INDEX_NAME: Final = "pytorch_model.bin.index.json"
SAFE_FILES: Final = (CONFIG_NAME, "*.safetensors", INDEX_NAME)
PICKLED_FILES: Final = ("pytorch_model*.bin", PICKLE_INDEX_NAME)
"""Patterns of the files of a checkpoint on the Hub; the latter are requested only if there are no others."""

REQUIRED: Final = object()
"""Marks a setting without a default."""


class Key(NamedTuple):
    """A setting of a foreign configuration.

    Attributes:
        name: its key, with dots if nested.
        kind: `whole`, `number`, `flag`, `rank` (an integer, or "auto" for ours to be None), `strategy`
            (a word of COMBINATIONS), `map` (token to token) or `limits` (two increasing numbers, or None).
        default: value if absent.
    """

    name: str
    kind: str
    default: Any = REQUIRED


class Refused(NamedTuple):
    """A foreign setting of which only some values are supported here, and why."""

    accepted: tuple[Any, ...]
    reason: str


class Family(NamedTuple):
    """One kind of foreign checkpoint.

    Attributes:
        title: its name in messages.
        keys: our setting to theirs.
        refused: their key to its accepted values; absent keys are accepted.
        ignored: keys below the first dot of `keys` that describe the initialisation or choose a kernel.
        constants: additional entries of their configuration.
    """

    title: str
    keys: Mapping[str, Key]
    refused: Mapping[str, Refused]
    ignored: frozenset[str]
    constants: Mapping[str, Any]


COMBINATIONS: Final = {"add": "add", "ew_multiply": "multiply"}

_MIXER: Final = {
    "input_projection.weight": "in_proj.weight",
    "input_projection.bias": "in_proj.bias",
    "convolution_weight": "conv1d.weight",
    "convolution_bias": "conv1d.bias",
    "selection_projection.weight": "x_proj.weight",
    "step_projection.weight": "dt_proj.weight",
    "step_bias": "dt_proj.bias",
    "log_decay_rate": "A_log",
    "skip_weight": "D",
    "output_projection.weight": "out_proj.weight",
    "output_projection.bias": "out_proj.bias",
}

CONVOLUTION_WEIGHT: Final = "convolution_weight"
"""Tensor whose shape is (channels, taps) here but (channels, 1, taps) in every foreign checkpoint."""


def _mixer(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{foreign}" for name, foreign in _MIXER.items()}


def _causal(embedding: str) -> dict[str, str]:
    return {
        "embedding.weight": f"backbone.{embedding}.weight",
        "stack.blocks.{}.norm.weight": "backbone.layers.{}.norm.weight",
        **_mixer("stack.blocks.{}.mixer", "backbone.layers.{}.mixer"),
        "stack.final_norm.weight": "backbone.norm_f.weight",
        HEAD: "lm_head.weight",
    }


HEAD: Final = "head.weight"
EMBEDDING: Final = "embedding.weight"

TRANSFORMERS_TENSORS: Final = _causal("embeddings")
MAMBA_SSM_TENSORS: Final = _causal("embedding")

CADUCEUS_COMPLEMENTS: Final = (
    "caduceus.backbone.embeddings.word_embeddings.complement_map",
    "lm_head.complement_map",
)
"""Tensors of an equivariant checkpoint that hold the complement of every token."""


def caduceus_tensors(equivariant: bool, exchange_strands: bool) -> dict[str, str]:
    """Return the tensor names of Caduceus, which depend on its wrappers.

    Both strands have one around the mixer, and, if the strands are not exchanged (its norms are then not fused), around
    the norms.
    """
    backbone, layer = "caduceus.backbone", "caduceus.backbone.layers.{}"
    mixer = f"{layer}.mixer.submodule" if equivariant else f"{layer}.mixer"
    norm = "submodule.weight" if equivariant and not exchange_strands else "weight"
    inner = "embedding.weight" if equivariant else "weight"
    return {
        EMBEDDING: f"{backbone}.embeddings.word_embeddings.{inner}",
        "stack.blocks.{}.norm.weight": f"{layer}.norm.{norm}",
        **_mixer("stack.blocks.{}.mixer.forward_mixer", f"{mixer}.mamba_fwd"),
        **_mixer("stack.blocks.{}.mixer.reverse_mixer", f"{mixer}.mamba_rev"),
        "stack.final_norm.weight": f"{backbone}.norm_f.{norm}",
        HEAD: "lm_head.lm_head.weight" if equivariant else "lm_head.weight",
    }


_ONLY_ROOT_MEAN_SQUARE: Final = Refused((True,), "layer norm is not implemented here, only root-mean-square norm")
_ONLY_MAMBA: Final = Refused(("Mamba1", None), "only Mamba, and of mamba_ssm Mamba2 and Mamba3, can be loaded")

_SSM_KEYS: Final = {
    "state_size": Key("ssm_cfg.d_state", "whole", 16),
    "kernel_width": Key("ssm_cfg.d_conv", "whole", 4),
    "expansion": Key("ssm_cfg.expand", "whole", 2),
    "step_rank": Key("ssm_cfg.dt_rank", "rank", "auto"),
    "linear_bias": Key("ssm_cfg.bias", "flag", False),
    "convolution_bias": Key("ssm_cfg.conv_bias", "flag", True),
}
_SSM_IGNORED: Final = frozenset(
    f"ssm_cfg.{name}" for name in ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "layer")
)

TRANSFORMERS: Final = Family(
    title="transformers Mamba",
    keys={
        "vocabulary_size": Key("vocab_size", "whole"),
        "model_width": Key("hidden_size", "whole"),
        "layers": Key("num_hidden_layers", "whole"),
        "state_size": Key("state_size", "whole", 16),
        "kernel_width": Key("conv_kernel", "whole", 4),
        "expansion": Key("expand", "whole", 2),
        "step_rank": Key("time_step_rank", "rank", "auto"),
        "linear_bias": Key("use_bias", "flag", False),
        "convolution_bias": Key("use_conv_bias", "flag", True),
        "residual_in_float32": Key("residual_in_fp32", "flag", True),
        "tied_head": Key("tie_word_embeddings", "flag", True),
        "norm_epsilon": Key("layer_norm_epsilon", "number", 1e-5),
    },
    refused={"hidden_act": Refused(("silu", "swish"), "only SiLU is implemented here")},
    ignored=frozenset(),
    constants={"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_act": "silu"},
)

MAMBA_SSM: Final = Family(
    title="mamba_ssm",
    keys={
        "vocabulary_size": Key("vocab_size", "whole"),
        "model_width": Key("d_model", "whole"),
        "layers": Key("n_layer", "whole"),
        **_SSM_KEYS,
        "residual_in_float32": Key("residual_in_fp32", "flag", True),
        "tied_head": Key("tie_embeddings", "flag", True),
        "vocabulary_multiple": Key("pad_vocab_size_multiple", "whole", 8),
    },
    refused={
        "ssm_cfg.layer": _ONLY_MAMBA,
        "rms_norm": _ONLY_ROOT_MEAN_SQUARE,
        "attn_layer_idx": Refused(([], None), "attention between the Mamba layers cannot be loaded"),
        "d_intermediate": Refused((0, None), "perceptrons between the Mamba layers are not implemented here"),
    },
    ignored=_SSM_IGNORED,
    constants={"rms_norm": True, "fused_add_norm": True},
)
MAMBA_SSM_NORM_EPSILON: Final = 1e-5
"""The configuration of mamba_ssm has no key for it."""

CADUCEUS: Final = Family(
    title="Caduceus",
    keys={
        "vocabulary_size": Key("vocab_size", "whole"),
        "model_width": Key("d_model", "whole"),
        "layers": Key("n_layer", "whole"),
        **_SSM_KEYS,
        "norm_epsilon": Key("norm_epsilon", "number", 1e-5),
        "residual_in_float32": Key("residual_in_fp32", "flag", True),
        "tied_head": Key("tie_word_embeddings", "flag", True),
        "vocabulary_multiple": Key("pad_vocab_size_multiple", "whole", 8),
        "combination": Key("bidirectional_strategy", "strategy", "add"),
        "tied_projections": Key("bidirectional_weight_tie", "flag", True),
        "equivariant": Key("rcps", "flag", False),
        "exchange_strands": Key("fused_add_norm", "flag", True),
        "complement": Key("complement_map", "map", None),
    },
    refused={
        "ssm_cfg.layer": _ONLY_MAMBA,
        "rms_norm": _ONLY_ROOT_MEAN_SQUARE,
        "bidirectional": Refused((True,), "a unidirectional masked language model is not implemented here"),
    },
    ignored=_SSM_IGNORED,
    constants={
        "model_type": "caduceus",
        "architectures": ["CaduceusForMaskedLM"],
        "rms_norm": True,
        "bidirectional": True,
    },
)

FAMILIES: Final = {"transformers": TRANSFORMERS, "mamba_ssm": MAMBA_SSM, "caduceus": CADUCEUS}

MODEL_TYPE_KEY: Final = "model_type"
MODEL_TYPES: Final = {"mamba": "transformers", "mamba2": "transformers_mamba2", "caduceus": "caduceus"}
"""`model_type` of a configuration, to a name of FAMILIES or DUAL_FAMILIES."""

UNTYPED: Final = ((("d_model", "n_layer", "rcps"), "caduceus"), (("d_model", "n_layer"), "mamba_ssm"))
"""Keys that identify a configuration without a type, to a name of FAMILIES; the first complete match is used."""

DTYPE_KEY: Final = "torch_dtype"
"""Key of the dtype in transformers; version 5 also reads this name of version 4, but not vice versa."""
