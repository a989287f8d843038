"""Language models of DNA as `transformers` models.

They wrap the models of `mambacore.models`, which keep their own folders: `from_pretrained` reads those, never a pickle.
"""

import os
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel

from genomamba.huggingface.configuration import GenomambaConfig
from genomamba.models.language_model import build_language_model, load_language_model
from mambacore.errors import InputError
from mambacore.models import CausalLanguageModel

IGNORED_LABEL = -100
# What the auto classes and pipelines pass on and what says nothing about the model.
_IGNORED = {
    "adapter_kwargs",
    "cache_dir",
    "force_download",
    "local_files_only",
    "subfolder",
    "token",
    "trust_remote_code",
}


class GenomambaPreTrainedModel(PreTrainedModel):
    """What the classes below share: `network`, a model of `mambacore.models`."""

    config_class = GenomambaConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"

    def __init__(self, config: GenomambaConfig, network: torch.nn.Module | None = None) -> None:
        super().__init__(config)
        fresh = network is None
        self.network: Any = build_language_model(config.objective, config.model) if fresh else network

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *_: Any, config: Any = None, **settings: Any) -> Self:  # type: ignore[override]
        """Load a folder that `genomamba pretrain` wrote.

        Args:
            name: the folder, or `owner/name` on the Hugging Face Hub.
            config: read from the folder when it is None.
            settings: `dtype` and `revision`; whatever else would change the model is refused.

        Raises:
            InputError: the folder is damaged or of another kind, or a setting is not known.
        """
        revision = settings.pop("revision", None)
        dtype = settings.pop("dtype", settings.pop("torch_dtype", None))
        unknown = sorted(key for key, value in settings.items() if key[0] != "_" and key not in _IGNORED and value)
        if unknown:
            raise InputError(f"a model of genomamba does not take {unknown[0]}: leave it out.")
        at_home = os.path.isdir(name)
        loaded = load_language_model(os.fspath(name) if at_home else f"hf://{name}@{revision or 'main'}")
        if config is None:
            config = cls.config_class.from_pretrained(name, revision=revision or "main")
        model = cls(config, loaded.model)
        if isinstance(dtype, torch.dtype):
            model.network.to(dtype)
        return model

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The input of the head; padding is a record of its own."""
        starts = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask.bool()
            starts = F.pad(mask[:, 1:] != mask[:, :-1], (1, 0), value=False)
        if not isinstance(self.network, CausalLanguageModel):
            return self.network.hidden(input_ids, starts)
        # Padding on the right comes after all that counts, and a model with contexts takes no starts.
        if starts is not None and bool(attention_mask[:, 0].all()):  # type: ignore[index]
            starts = None
        return self.network.hidden(input_ids, None, starts)[0]

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Keep the weights as the network made them."""


class GenomambaModel(GenomambaPreTrainedModel):
    """Without the head: what each position is made of."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """`last_hidden_state` is (batch, length, channels)."""
        return BaseModelOutput(last_hidden_state=self.hidden(input_ids, attention_mask))


class GenomambaForCausalLM(GenomambaPreTrainedModel, GenerationMixin):
    """A causal model: logits of the next base, and `generate`, which reads everything again for each token.

    `genomamba.load(folder).generate` keeps the state instead, and is faster by orders of magnitude.
    """

    def __init__(self, config: GenomambaConfig, network: torch.nn.Module | None = None) -> None:
        super().__init__(config, network)
        if config.objective != "causal":
            raise InputError("a masked model of genomamba does not generate: use AutoModelForMaskedLM.")
        self.generation_config.use_cache = False
        self.generation_config.pad_token_id = 4

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """`logits` are (batch, length, vocabulary); with `labels`, token ids or -100, the mean loss in nats."""
        logits = self.network.logits(self.hidden(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Everything so far."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class GenomambaForMaskedLM(GenomambaPreTrainedModel):
    """A masked model: logits of hidden bases."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> MaskedLMOutput:
        """`logits` are (batch, length, vocabulary); with `labels`, token ids or -100, the mean loss in nats."""
        logits = self.network.logits(self.hidden(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        return MaskedLMOutput(loss=loss, logits=logits)


def register() -> None:
    """Make the auto classes of `transformers` know the models."""
    from transformers.models.auto import modeling_auto  # noqa: PLC0415 - it is being imported

    modeling_auto.AutoModel.register(GenomambaConfig, GenomambaModel, exist_ok=True)
    modeling_auto.AutoModelForCausalLM.register(GenomambaConfig, GenomambaForCausalLM, exist_ok=True)
    modeling_auto.AutoModelForMaskedLM.register(GenomambaConfig, GenomambaForMaskedLM, exist_ok=True)
