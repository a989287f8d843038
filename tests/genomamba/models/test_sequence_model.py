"""Models of whole sequences: pieces equal the whole, padding changes nothing, both strands, and folders."""

from pathlib import Path

import pytest
import torch

from genomamba.data.targets import TargetDescription
from genomamba.letter_policy import letter_policy
from genomamba.models.language_model import LanguageModel, build_language_model
from genomamba.models.sequence_model import SequenceModel, load_sequence_model, save_sequence_model, sequence_model_on
from mambacore.errors import InputError
from tolerances import FLOAT32, PIECES_FLOAT64, relative_error

TARGETS = TargetDescription("classes", ("label",), ("a", "b", "c"))
CAUSAL = {"model_width": 8, "mixers": ["selective", "selective"], "context_widths": [2]}
MASKED = {"model_width": 8, "layers": 2}


def build(objective: str = "causal", pooling: str = "mean", **settings: object) -> SequenceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        core = build_language_model(objective, {**(CAUSAL if objective == "causal" else MASKED), **settings})
        return sequence_model_on(LanguageModel(core, source="pretrained"), TARGETS, pooling, True).eval()


def random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(7, 11, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("piece", [1, 7, 63])
def test_a_causal_model_in_pieces_is_the_model(pooling: str, piece: int) -> None:
    model, tokens = build(pooling=pooling).double(), random_tokens(2, 64)
    whole, _ = model(tokens)
    state = None
    for begin in range(0, 64, piece):
        outputs, state = model(tokens[:, begin : begin + piece], state)
    assert relative_error(outputs, whole) < PIECES_FLOAT64


@pytest.mark.parametrize(
    ("objective", "pooling", "settings"),
    [
        ("causal", "mean", {}),
        ("causal", "last", {}),
        ("masked", "mean", {}),
        ("masked", "last", {}),
        ("masked", "mean", {"equivariant": True}),
    ],
)
def test_padding_changes_nothing(objective: str, pooling: str, settings: dict[str, object]) -> None:
    model = build(objective, pooling, **settings)
    lengths = torch.tensor([5, 40, 33])
    tokens = random_tokens(3, 40)
    padded = model.padded(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model(tokens[row : row + 1, :length])
        assert relative_error(padded[row], alone[0]) < FLOAT32
    changed = tokens.clone()
    changed[0, 5:] = 9
    assert relative_error(model.padded(changed, lengths)[0], padded[0]) < FLOAT32


def test_an_equivariant_stack_gives_both_strands_the_same_answer() -> None:
    model = build("masked", "mean", equivariant=True)
    lengths = torch.tensor([12, 30])
    tokens = random_tokens(2, 30)
    other = model.reverse_complement(tokens, lengths)
    assert not torch.equal(other, tokens)
    assert torch.equal(model.reverse_complement(other, lengths), tokens)
    assert relative_error(model.padded(other, lengths), model.padded(tokens, lengths)) < FLOAT32
    with pytest.raises(InputError, match="use the pooling mean"):
        build("masked", "last", equivariant=True)


def test_a_pretrained_models_stack_and_letters_are_taken_over() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        core = build_language_model("causal", {**CAUSAL, "tied_head": False, "output_context_widths": [2]})
    language_model = LanguageModel(core, letter_policy("caduceus"), source="pretrained")
    model = sequence_model_on(language_model, TARGETS, "last", False)
    tokens = torch.tensor([[7, 8, 11, 9]])
    as_padding = torch.tensor([[7, 8, 4, 9]])
    hidden, _ = core.hidden(as_padding)
    assert torch.equal(model(tokens)[0], model.head(hidden[:, -1]))
    assert model.head.in_features == core.config.hidden_width
    smaller = build_language_model("causal", {**CAUSAL, "model_width": 6})
    with pytest.raises(InputError, match=r"other does not fit its configuration.*embedding.weight"):
        model.start_from(LanguageModel(smaller, source="other"))


@pytest.mark.parametrize(("objective", "settings"), [("causal", {}), ("masked", {"equivariant": True})])
def test_a_folder_gives_the_same_model(objective: str, settings: dict[str, object], tmp_path: Path) -> None:
    model = build(objective, **settings)
    save_sequence_model(tmp_path / "model", model, {"steps": 3})
    again, details = load_sequence_model(tmp_path / "model")
    assert details == {"steps": 3}
    assert again.config.targets == TARGETS
    tokens = random_tokens(2, 30)
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert "genomamba predict" in (tmp_path / "model" / "README.md").read_text()
