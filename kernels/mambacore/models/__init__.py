"""Language models built from the layers."""

from mambacore.models.causal import CausalLanguageModel, CausalLanguageModelConfig
from mambacore.models.masked import MaskedLanguageModel, MaskedLanguageModelConfig
from mambacore.models.sampling import sample_tokens

__all__ = [
    "CausalLanguageModel",
    "CausalLanguageModelConfig",
    "MaskedLanguageModel",
    "MaskedLanguageModelConfig",
    "sample_tokens",
]
