"""The character tokenizer as `transformers` wants one."""

from typing import Any

from transformers.tokenization_python import PreTrainedTokenizer

from genomamba.huggingface.configuration import GenomambaConfig
from genomamba.tokenizer import VOCABULARY, CharacterTokenizer

_NAMES = {number: name for name, number in VOCABULARY.items()}


class GenomambaTokenizer(PreTrainedTokenizer):
    """One base, one token; nothing is added at either end.

    Letters are read as `genomamba.tokenizer.CharacterTokenizer.encode` does. Right padding is the default.
    """

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012 - as the base class declares it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        defaults = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
        super().__init__(**(defaults | settings))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(VOCABULARY)

    def get_vocab(self) -> dict[str, int]:
        """Token -> number."""
        return dict(VOCABULARY)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [_NAMES[int(token)] for token in CharacterTokenizer().encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return VOCABULARY.get(token, VOCABULARY["[UNK]"])

    def _convert_id_to_token(self, index: int) -> str:
        return _NAMES.get(index, "[UNK]")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Letters without spaces."""
        return "".join(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to save: the vocabulary is fixed."""
        return ()


def register() -> None:
    """Make `transformers.AutoTokenizer` know the tokenizer."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer  # noqa: PLC0415 - it is being imported

    AutoTokenizer.register(GenomambaConfig, GenomambaTokenizer, exist_ok=True)
