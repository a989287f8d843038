"""Language models of DNA: folders keep them whole, foreign checkpoints load, probabilities are of bases and exact."""

import json

import pytest
import torch

from caduceus_equations import caduceus_config, caduceus_tensors, write_checkpoint
from genomamba.letter_policy import letter_policy
from genomamba.models.language_model import (
    FIRST_BASE_TOKEN,
    MASK_TOKEN,
    LanguageModel,
    base_log_probabilities,
    build_language_model,
    load_language_model,
    save_language_model,
)
from mambacore.checkpoints import save_mamba_ssm, save_transformers
from mambacore.errors import InputError
from tolerances import FLOAT32, PIECES_FLOAT32, relative_error

MIXER = {"name": "selective", "state_size": 3}
CAUSAL = {"model_width": 8, "mixers": [MIXER, MIXER]}
CONTEXTS = CAUSAL | {"tied_head": False, "context_widths": [2, 3], "output_context_widths": [1, 4]}
MASKED = {"model_width": 8, "layers": 2, "mixer": {"state_size": 3}}


def shaken(objective, settings):
    """A model none of whose parameters is zero."""
    torch.manual_seed(3)
    model = build_language_model(objective, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def dna(length=50, rows=2):
    tokens = torch.randint(7, 12, (rows, length), generator=torch.Generator().manual_seed(1))
    return tokens.to(torch.uint8)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("causal", CAUSAL),
        ("causal", CONTEXTS),
        ("masked", MASKED),
        ("masked", MASKED | {"equivariant": True, "exchange_strands": True}),
    ],
    ids=["causal", "contexts", "plain", "equivariant"],
)
def test_a_folder_gives_back_the_model_its_objective_policy_and_details(tmp_path, objective, settings):
    model = shaken(objective, settings)
    save_language_model(tmp_path / "model", model, {"length": 1024}, letter_policy("hyenadna"))
    loaded = load_language_model(tmp_path / "model")
    assert loaded.objective == objective
    assert loaded.details == {"length": 1024}
    assert loaded.policy == letter_policy("hyenadna")
    assert loaded.model.config == model.config
    assert not loaded.model.training
    read = dna().long()
    outputs = [found[0] if objective == "causal" else found for found in (model(read), loaded.model(read))]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("settings", [CAUSAL, CONTEXTS], ids=["plain", "contexts"])
def test_next_base_probabilities_in_pieces_are_those_of_the_whole(settings):
    language_model = LanguageModel(shaken("causal", settings))
    whole, _ = language_model.next_base_log_probabilities(dna())
    assert whole.shape == (2, 50, 4)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(2, 50))
    state, found = None, []
    for piece in dna().split([1, 2, 17, 1, 29], dim=1):
        log_probabilities, state = language_model.next_base_log_probabilities(piece, state)
        found.append(log_probabilities)
    assert relative_error(torch.cat(found, dim=1), whole) < PIECES_FLOAT32


@pytest.mark.parametrize("settings", [CAUSAL, CONTEXTS], ids=["plain", "contexts"])
def test_the_next_base_depends_on_all_before_it_and_on_nothing_after(settings):
    language_model = LanguageModel(shaken("causal", settings))
    read, changed = dna(), dna()
    changed[:, 20] = torch.where(read[:, 20] == FIRST_BASE_TOKEN, FIRST_BASE_TOKEN + 1, FIRST_BASE_TOKEN)
    first, second = (language_model.next_base_log_probabilities(tokens)[0] for tokens in (read, changed))
    assert torch.equal(first[:, :20], second[:, :20])
    assert (first[:, 20:] != second[:, 20:]).any(-1).float().mean() > 0.9


def test_tables_of_contexts_are_logits_of_the_last_bases():
    model = build_language_model("causal", CONTEXTS | {"output_context_widths": [2], "context_widths": []})
    with torch.no_grad():
        model.head.weight[:, :8] = 0
        model.output_contexts.tables[0].weight[1 * 4 + 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # after CG
    read = torch.tensor([[7, 8, 9, 11, 9]])  # A C G N G
    found, _ = LanguageModel(model).next_base_log_probabilities(read)
    expected = torch.log_softmax(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0)
    assert relative_error(found[0, 2], expected) < FLOAT32
    assert relative_error(found[0, [0, 1, 3, 4]].exp(), torch.full((4, 4), 0.25)) < FLOAT32


def test_only_bases_share_the_probability():
    logits = torch.zeros(1, 16)
    logits[0, MASK_TOKEN] = 50.0
    assert relative_error(base_log_probabilities(logits).exp(), torch.full((1, 4), 0.25)) < FLOAT32


def test_a_masked_base_is_not_seen_and_an_unmasked_one_is():
    language_model = LanguageModel(shaken("masked", MASKED))
    read, changed = dna(), dna()
    changed[:, 20] = torch.where(read[:, 20] == FIRST_BASE_TOKEN, FIRST_BASE_TOKEN + 1, FIRST_BASE_TOKEN)
    masked = torch.zeros(2, 50, dtype=torch.bool)
    masked[:, 20] = True
    seen = [language_model.masked_base_log_probabilities(tokens) for tokens in (read, changed)]
    hidden = [language_model.masked_base_log_probabilities(tokens, masked) for tokens in (read, changed)]
    assert not torch.equal(*seen)
    assert torch.equal(*hidden)


@pytest.mark.parametrize("equivariant", [True, False])
def test_masked_probabilities_of_the_other_strand_are_those_of_the_complement(equivariant):
    language_model = LanguageModel(shaken("masked", MASKED | {"equivariant": equivariant}))
    other = language_model.model.reverse_complement(dna().long())
    found = language_model.masked_base_log_probabilities(other)
    expected = language_model.masked_base_log_probabilities(dna()).flip(1, 2)  # A C G T reversed is T G C A
    assert relative_error(found, expected) < FLOAT32
    if not equivariant:
        alone = language_model.masked_base_log_probabilities(dna(), both_strands=False)
        assert relative_error(alone, expected.flip(1, 2)) > FLOAT32


@pytest.mark.parametrize("save", [save_transformers, save_mamba_ssm])
def test_foreign_mamba_checkpoints_load_as_causal_models(tmp_path, save):
    model = shaken("causal", CAUSAL | {"vocabulary_multiple": 8})
    save(model, tmp_path / "foreign")
    loaded = load_language_model(tmp_path / "foreign")
    assert loaded.objective == "causal"
    expected, _ = LanguageModel(model).next_base_log_probabilities(dna())
    assert relative_error(loaded.next_base_log_probabilities(dna())[0], expected) < FLOAT32


@pytest.mark.parametrize("equivariant", [True, False])
def test_caduceus_checkpoints_load_as_masked_models_with_their_letters(tmp_path, equivariant):
    complement = {str(token): 17 - token if 7 <= token <= 10 else token for token in range(16)}
    config = caduceus_config(rcps=equivariant, vocab_size=16, complement_map=complement)
    loaded = load_language_model(write_checkpoint(tmp_path / "foreign", config, caduceus_tensors(config)))
    assert loaded.objective == "masked"
    assert loaded.policy == letter_policy("caduceus")
    assert torch.isfinite(loaded.masked_base_log_probabilities(dna())).all()


def test_letters_are_read_as_the_policy_says():
    model = shaken("causal", CAUSAL)
    assert LanguageModel(model).tokens("ACgtN").tolist() == [7, 8, 9, 10, 11]
    assert LanguageModel(model, letter_policy("caduceus")).tokens(b"ACgtN").tolist() == [7, 8, 9, 10, 4]


def test_what_does_not_fit_is_named(tmp_path):
    causal, masked = LanguageModel(shaken("causal", CAUSAL), source="here"), LanguageModel(shaken("masked", MASKED))
    with pytest.raises(InputError, match=r"here is a causal language model.*needs a masked one"):
        causal.masked_base_log_probabilities(dna())
    with pytest.raises(InputError, match=r"masked language model.*needs a causal one"):
        masked.next_base_log_probabilities(dna())
    with pytest.raises(InputError, match="no model folder"):
        load_language_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no setting 'layer'.*layers"):
        build_language_model("masked", {"layer": 2})
    with pytest.raises(InputError, match="use causal or masked"):
        build_language_model("both", {})
    save_transformers(shaken("causal", CAUSAL | {"vocabulary_size": 40}), tmp_path / "words")
    with pytest.raises(InputError, match="vocabulary of 40 tokens"):
        load_language_model(tmp_path / "words")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kind": "species classifier"}, "holds a species classifier, not a DNA language model"),
        ({"objective": "sideways"}, "objective is 'sideways'"),
        ({"model": {"model_width": 8}}, "damaged"),
        ({"letter_policy": {"any_base": "eaten"}}, "any_base 'eaten'"),
        ({"tokenizer": {"name": "words"}}, "tokenizer 'words'"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, change, expected):
    save_language_model(tmp_path / "model", shaken("causal", CAUSAL), {})
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=expected):
        load_language_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"output_context_widths": [4]}, "tied_head to false"),
        ({"context_widths": [14]}, "cannot be tabulated"),
        ({"context_widths": [0]}, "cannot be tabulated"),
        ({"context_widths": [2], "context_symbols": [14, 4]}, "not two or more tokens among 16"),
    ],
)
def test_contexts_that_cannot_be_are_named(settings, expected):
    with pytest.raises(InputError, match=expected):
        build_language_model("causal", CAUSAL | settings)


def test_contexts_do_not_reach_into_another_record():
    with pytest.raises(ValueError, match="one record per row"):
        shaken("causal", CONTEXTS)(dna().long(), sequence_starts=torch.ones(2, 50, dtype=torch.bool))


@pytest.mark.parametrize("save", [save_transformers, save_mamba_ssm])
def test_contexts_are_not_lost_in_a_foreign_format(tmp_path, save):
    with pytest.raises(InputError, match="no context tables"):
        save(shaken("causal", CONTEXTS), tmp_path / "foreign")
