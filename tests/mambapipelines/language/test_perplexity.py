"""Perplexity: the bases that are scored, the intervals, the Markov models beside it, and a model that beats order 0."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.baselines.interpolated_markov import fit_markov_models, log_probability_table
from genomamba.models.interpolation import PEAKS, join_counts
from genomamba.models.language_model import (
    LanguageModel,
    build_language_model,
    load_language_model,
    save_language_model,
)
from genomamba.scoring.likelihood import WindowScores, blocks_of, causal_losses, masked_losses
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError
from mambapipelines.cli.genomamba import main as genomamba_cli
from mambapipelines.language.evaluate import COLUMNS, PerplexityOptions, measure_perplexity
from mambapipelines.language.train import PretrainingOptions, pretrain
from tiny_dna import predictable_dna, write_genome, yeast_like
from tolerances import FLOAT32, relative_error

CAUSAL = {"model_width": 8, "mixers": [{"name": "selective", "state_size": 2}], "tied_head": False}
MASKED = {"model_width": 8, "layers": 1, "mixer": {"state_size": 2}}


def language_model(objective: str = "causal") -> LanguageModel:
    torch.manual_seed(1)
    model = build_language_model(objective, CAUSAL if objective == "causal" else MASKED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return LanguageModel(model.eval())


def run_command(*arguments: object) -> int:
    return genomamba_cli.main([str(argument) for argument in arguments])


def table_of(text: str) -> list[dict[str, str]]:
    lines = text.strip().splitlines()
    assert lines[0].split("\t") == list(COLUMNS)
    return [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines[1:]]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tiny model that has learned something, and its genome."""
    folder = tmp_path_factory.mktemp("pretrained")
    reference = yeast_like(folder, length=20_000)
    pretrain(
        PretrainingOptions(
            references=[reference],
            length=256,
            output=folder / "model",
            valid_chromosomes=["chr3"],
            test_chromosomes=["chr4"],
            steps=60,
            recipe="tiny",
            threads=1,
        )
    )
    return folder / "model", reference


def test_a_pretrained_model_beats_order_0_on_chromosomes_it_has_not_seen(
    pretrained: tuple[Path, str], capsys: pytest.CaptureFixture
) -> None:
    model, reference = pretrained
    arguments = ["perplexity", model, "--reference", reference, "--lengths", "256,1024", "--markov-order", 4]
    assert run_command(*arguments, "--threads", 1) == 0
    captured = capsys.readouterr()
    rows = table_of(captured.out)
    assert [row["length"] for row in rows] == ["256"] * 6 + ["1024"] * 6
    assert [row["scorer"] for row in rows[:6]] == ["model", *(f"markov-{order}" for order in range(5))]
    for length in ("256", "1024"):
        by_scorer = {row["scorer"]: row for row in rows if row["length"] == length}
        found, order_0 = by_scorer["model"], by_scorer["markov-0"]
        assert float(found["perplexity_high"]) < float(order_0["perplexity_low"])
        assert float(order_0["ratio_low"]) > 1
        assert float(order_0["ratio"]) == pytest.approx(
            float(order_0["perplexity"]) / float(found["perplexity"]), abs=1e-4
        )
        assert {row["bases"] for row in by_scorer.values()} == {found["bases"]}
        assert [row["best_on_valid"] for row in by_scorer.values()].count("yes") == 1
    assert int(rows[0]["bases"]) == 78 * 255  # every window of chr4 but the first base of each
    assert "the model's is" in captured.err


def test_the_table_goes_to_a_file_and_markov_models_can_be_left_out(
    pretrained: tuple[Path, str], tmp_path: Path
) -> None:
    model, reference = pretrained
    output = tmp_path / "table.tsv"
    arguments = ["perplexity", model, "--reference", reference, "--lengths", 512, "--no-markov", "--bases", 2000]
    assert run_command(*arguments, "--output", output, "--split", "valid", "--threads", 1) == 0
    (row,) = table_of(output.read_text())
    assert (row["scorer"], row["windows"], row["bases"]) == ("model", "3", str(3 * 511))


def test_causal_losses_are_those_of_each_base_after_the_first_in_any_pieces() -> None:
    tokens = torch.from_numpy(CharacterTokenizer().encode(predictable_dna(90))).unsqueeze(0).clone()
    tokens[0, 40] = 11  # N
    model = language_model()
    found = causal_losses(model, tokens, 17)
    log_probabilities, _ = model.next_base_log_probabilities(tokens)
    expected = [
        0.0 if tokens[0, place] == 11 else -float(log_probabilities[0, place - 1, int(tokens[0, place]) - 7])
        for place in range(1, 90)
    ]
    assert relative_error(found[0], torch.tensor(expected, dtype=torch.float64)) < FLOAT32
    assert found[0, 39] == 0


def test_masked_losses_hide_the_base_they_are_of() -> None:
    model = language_model("masked")
    tokens = torch.from_numpy(CharacterTokenizer().encode(predictable_dna(50))).unsqueeze(0)
    hidden = torch.zeros(1, 50, dtype=torch.bool)
    hidden[0, [3, 20]] = True
    found = masked_losses(model, tokens, hidden)
    log_probabilities = model.masked_base_log_probabilities(tokens, hidden)
    assert found[0, 20] == pytest.approx(-float(log_probabilities[0, 20, int(tokens[0, 20]) - 7]))
    assert (found[~hidden] == 0).all()


def test_a_masked_model_is_scored_on_every_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_language_model(tmp_path / "model", language_model("masked").model, {})
    reference = yeast_like(tmp_path, length=2000)
    arguments = ["perplexity", tmp_path / "model", "--reference", reference, "--test-chromosomes", "chr2"]
    assert run_command(*arguments, "--lengths", 500, "--no-markov", "--threads", 1) == 0
    (row,) = table_of(capsys.readouterr().out)
    assert row["bases"] == str(4 * 499)


def test_n_never_counts(tmp_path: Path) -> None:
    save_language_model(tmp_path / "model", language_model().model, {})
    letters = predictable_dna(300) + b"N" * 500 + predictable_dna(200, 1)
    reference = write_genome(tmp_path / "gap.fa", {"chr1": letters, "chr2": letters})
    (row,) = measure_perplexity(
        PerplexityOptions(str(tmp_path / "model"), [reference], [100], test_chromosomes=["chr2"], markov_order=None)
    )
    assert row.windows == 5  # those of N are left out
    assert row.bases == 5 * 99


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shared = random.normal(0, 0.05, 12).repeat(5)  # five windows of a block are alike
        bases = random.integers(50, 100, 60)
        nats = bases * (1.3 + shared + random.normal(0, 0.02, 60))
        low, high = WindowScores(nats, bases, [("chr1", number // 5) for number in range(60)]).interval()
        covered += low < 1.3 < high
    assert 0.90 < covered / 400 < 0.99


def test_blocks_are_large_where_there_are_enough_and_never_shorter_than_a_window() -> None:
    many = [("chr1", 8192 * number) for number in range(800)]
    assert len(set(blocks_of(many, 8192))) == 100
    few = [("chr1", 1024 * number) for number in range(20)]
    assert len(set(blocks_of(few, 1024))) == 20
    assert len(set(blocks_of(few[:8], 4096))) == 2


def test_a_single_block_has_no_interval() -> None:
    scores = WindowScores(np.array([1.0, 2.0]), np.array([1, 1]), [("chr1", 0)] * 2)
    assert all(math.isnan(end) for end in scores.interval())


def test_a_model_joined_with_counts_has_the_logits_of_both(tmp_path: Path) -> None:
    model = language_model().model
    training = [CharacterTokenizer().encode(predictable_dna(3000, seed)) for seed in range(3)]
    validation = [CharacterTokenizer().encode(predictable_dna(500, 9))]
    joined, fit = join_counts(model, 3, training, validation)
    assert fit.nats_after < fit.nats_before - 0.1
    table = log_probability_table(fit_markov_models(training, validation, 3).models[-1])
    tokens = torch.from_numpy(CharacterTokenizer().encode(b"ACGTTNACGA")).long().unsqueeze(0)
    alone, both = (one(tokens)[0][0, :, 7:11] for one in (model, joined))
    for position, context in ((2, "ACG"), (4, "GTT"), (9, "CGA")):
        log_probabilities = table[sum("ACGT".index(base) * 4 ** (2 - place) for place, base in enumerate(context))]
        weight = fit.weights_of_counts[int(np.searchsorted(np.float32(PEAKS), np.exp(log_probabilities).max()))]
        expected = fit.weight_of_layers * alone[position] + weight * (torch.tensor(log_probabilities) + math.log(4))
        assert relative_error(both[position], expected) < FLOAT32
    for position in (0, 5, 7):  # no whole context of bases
        assert relative_error(both[position], fit.weight_of_layers * alone[position]) < FLOAT32
    save_language_model(tmp_path / "model", joined, {})
    assert torch.equal(load_language_model(tmp_path / "model").model(tokens)[0], joined(tokens)[0])


def test_pretraining_joins_when_the_recipe_says_so(tmp_path: Path) -> None:
    result = pretrain(
        PretrainingOptions(
            references=[yeast_like(tmp_path)],
            length=256,
            output=tmp_path / "model",
            valid_chromosomes=["chr3"],
            steps=3,
            recipe="tiny",
            changes=["pretraining.counted_order=3"],
            threads=1,
        )
    )
    loaded = load_language_model(tmp_path / "model")
    assert loaded.model.config.output_context_widths == (3,)
    joined = loaded.details["joined_with_counts"]
    assert joined["nats_after"] < joined["nats_before"]
    assert result.perplexity < math.exp(joined["nats_before"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lengths", "1"], "windows of 2 bases or more"),
        (["--lengths", "64,many"], "'many'"),
        (["--bases", "0"], "--bases is 0"),
        (["--split", "dev"], "--split is 'dev'"),
        (["--lengths", "64", "--markov-order", "13"], "order from 0 to 12"),
        (["--test-chromosomes", "chr9"], "no chromosome 'chr9'"),
        (["--lengths", "64", "--test-chromosomes", "chr4"], "Markov models need valid bases"),
        (["--lengths", "30000"], "no test row for windows of 30000 bp"),
    ],
)
def test_mistakes_are_one_line(
    pretrained: tuple[Path, str], capfd: pytest.CaptureFixture, arguments: list[str], expected: str
) -> None:
    model, reference = pretrained
    assert run_command("perplexity", model, "--reference", reference, "--threads", 1, *arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert expected in error


def test_a_model_that_does_not_know_its_splits_needs_them(tmp_path: Path) -> None:
    save_language_model(tmp_path / "model", language_model().model, {})
    with pytest.raises(InputError, match="does not say what was held out for test"):
        measure_perplexity(PerplexityOptions(str(tmp_path / "model"), [yeast_like(tmp_path)], [64]))
