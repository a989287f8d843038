"""The configuration of a language model's folder, as `transformers` reads it."""

from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "genomamba"


class GenomambaConfig(PreTrainedConfig):
    """What `config.json` says, key by key: `objective`, `model`, `tokenizer`, `letter_policy` and `details`."""

    model_type = MODEL_TYPE


def register() -> None:
    """Make `transformers.AutoConfig` know the model type."""
    from transformers.models.auto.configuration_auto import AutoConfig  # noqa: PLC0415 - it is being imported

    AutoConfig.register(MODEL_TYPE, GenomambaConfig, exist_ok=True)
