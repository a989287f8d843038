"""Language models built from the layers."""

from mambacore.models.causal import CausalLanguageModel, CausalLanguageModelConfig
from mambacore.models.generation import Generated
from mambacore.models.masked import MaskedLanguageModel, MaskedLanguageModelConfig
from mambacore.models.sampling import sample_tokens, sampling_probabilities, token_log_likelihoods

__all__ = [
    "CausalLanguageModel",
    "CausalLanguageModelConfig",
    "Generated",
    "MaskedLanguageModel",
    "MaskedLanguageModelConfig",
    "sample_tokens",
    "sampling_probabilities",
    "token_log_likelihoods",
]
