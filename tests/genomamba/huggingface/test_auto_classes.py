"""`transformers` loads our folders through its auto classes, and computes what our own programs compute."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import genomamba
from mambacore.errors import InputError
from tiny_language_models import model_folder

transformers = pytest.importorskip("transformers")
LETTERS = "ACGTNACGTTGACA"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {kind: model_folder(place / kind, kind) for kind in ("causal", "contexts", "masked", "equivariant")}


@pytest.mark.parametrize("kind", ["causal", "contexts", "masked", "equivariant"])
def test_the_auto_classes_compute_what_our_model_computes(kind: str, folders: dict[str, Path]) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(folders[kind])(LETTERS, return_tensors="pt")
    ours = genomamba.load(folders[kind]).model.model
    causal = kind in ("causal", "contexts")
    head = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    with torch.no_grad():
        expected = ours(tokens["input_ids"])
        expected = expected[0] if causal else expected
        theirs = head.from_pretrained(folders[kind])(**tokens, labels=tokens["input_ids"])
        states = transformers.AutoModel.from_pretrained(folders[kind])(**tokens).last_hidden_state
    assert torch.equal(theirs.logits, expected)
    assert theirs.loss > 0
    assert torch.equal(ours.logits(states), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_padding_does_not_change_what_it_stands_beside(kind: str, side: str, folders: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind], padding_side=side)
    model = transformers.AutoModel.from_pretrained(folders[kind])
    both = tokenizer([LETTERS, "ACGTA"], padding=True, return_tensors="pt")
    alone = tokenizer("ACGTA", return_tensors="pt")
    with torch.no_grad():
        found = model(**both).last_hidden_state[1][both["attention_mask"][1].bool()]
        expected = model(**alone).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pipelines_run(folders: dict[str, Path]) -> None:
    vectors = transformers.pipeline("feature-extraction", model=str(folders["masked"]))("ACGT")
    assert len(vectors[0]) == 4
    made = transformers.pipeline("text-generation", model=str(folders["causal"]))(
        "ACGT", max_new_tokens=5, do_sample=False
    )
    text = made[0]["generated_text"]
    assert text.startswith("ACGT")
    loaded = genomamba.load(folders["causal"]).model.model
    expected = loaded.generate(torch.tensor([[7, 8, 9, 10]]), 5, temperature=0.0).tokens
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["causal"])
    assert text[4:] == "".join(tokenizer.convert_ids_to_tokens(expected[0].tolist()))


def test_wrong_uses_are_told(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="AutoModelForMaskedLM"):
        transformers.AutoModelForCausalLM.from_pretrained(folders["masked"])
    with pytest.raises(InputError, match="does not take quantization_config"):
        transformers.AutoModel.from_pretrained(folders["masked"], quantization_config={"bits": 4})


@pytest.mark.parametrize("order", ["import genomamba, transformers", "import transformers, genomamba"])
def test_importing_is_enough_in_either_order_and_imports_nothing_heavy(order: str, folders: dict[str, Path]) -> None:
    code = (
        "import sys, genomamba; assert 'transformers' not in sys.modules and 'torch' not in sys.modules; "
        if order.startswith("import genomamba")
        else "import transformers; transformers.AutoModel; "
    )
    code += f"{order}; print(type(transformers.AutoModel.from_pretrained(sys.argv[1])).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; " + code, str(folders["causal"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "GenomambaModel", done.stderr[-2000:]


def test_the_tensors_say_what_they_are(folders: dict[str, Path]) -> None:
    with safe_open(folders["causal"] / "model.safetensors", "pt") as opened:
        stated = opened.metadata()
    assert stated["format"] == "pt"
    assert "language model" in stated["kind"]
    assert stated["objective"] == "causal"
