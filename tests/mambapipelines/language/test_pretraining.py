"""Pretraining: what a step learns from, what never counts, and runs that end the same however they get there."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.data.intervals import Interval, window_rule
from genomamba.data.pretraining_windows import PretrainingWindows
from genomamba.data.reference_set import ReferenceSet, rows_by_chromosome
from genomamba.letter_policy import LETTER_POLICIES, letter_policy
from genomamba.models.language_model import FIRST_BASE_TOKEN, MASK_TOKEN, load_language_model
from mambacore.errors import InputError
from mambacore.layers.mixer import Mixer, name_of
from mambacore.longsequence import backward_in_pieces
from mambapipelines.cli.genomamba import main as genomamba_cli
from mambapipelines.language.recipe import MaskingRecipe, PretrainingRecipe
from mambapipelines.language.task import IGNORED, CausalTask, MaskedTask, masked_example, next_token_targets
from mambapipelines.language.train import PretrainingOptions, pretrain
from mambapipelines.training import recorder
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.recipe import load_task_recipe, recipe_names
from tiny_dna import predictable_dna, write_genome, yeast_like
from tolerances import PIECES_FLOAT32, relative_error

MASKED = ["objective=masked", "model.context_widths=[]", "model.tied_head=true"]


def recipe_of(*changes: str) -> PretrainingRecipe:
    recipe = load_task_recipe(PretrainingRecipe, "tiny", changes)
    recipe.check()
    return recipe


def task_of(tmp_path: Path, letters: bytes, *changes: str, length: int = 64, policy: str = "bases", seed: int = 0):
    """A task on one contig, trained on all of it."""
    recipe = recipe_of(*changes)
    reference = ReferenceSet([write_genome(tmp_path / f"seed{seed}.fa", {"chr1": letters})])
    rows = [Interval("chr1", 0, len(letters), "train")]
    windows = PretrainingWindows(reference, rows, "train", window_rule("mamba"), length, seed, letter_policy(policy), 0)
    torch.manual_seed(0)
    kind = CausalTask if recipe.objective == "causal" else MaskedTask
    return kind(recipe.build_model(), recipe, windows, [])


def options_of(tmp_path: Path, output: str, **changes) -> PretrainingOptions:
    values = {
        "references": [yeast_like(tmp_path)],
        "length": 256,
        "output": tmp_path / output,
        "valid_chromosomes": ["chr3"],
        "test_chromosomes": ["chr4"],
        "steps": 8,
        "recipe": "tiny",
        "threads": 1,
    }
    return PretrainingOptions(**(values | changes))


def run_command(*arguments: object) -> int:
    return genomamba_cli.main([str(argument) for argument in arguments])


# What a step learns from


def test_a_target_is_the_next_token_if_that_is_scored() -> None:
    tokens = np.array([[7, 8, 11, 9, 6, 10]], dtype=np.uint8)
    scored = np.array([[True, True, False, True, False, True]])
    assert next_token_targets(tokens, scored).tolist() == [[8, IGNORED, 9, IGNORED, 10, IGNORED]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [  # targets of aCNRGT, from the second letter on
        ("bases", [8, IGNORED, IGNORED, 9, 10]),
        ("hyenadna", [8, 11, 6, 9, 10]),
        ("caduceus", [8, IGNORED, 6, 9, 10]),
    ],
)
def test_each_letter_policy_decides_what_is_predicted(tmp_path: Path, policy: str, expected: list[int]) -> None:
    task = task_of(tmp_path, b"aCNRGT" * 2, length=12, policy=policy)
    _, targets = task.batch(0)
    assert targets[0, :5].tolist() == expected


@pytest.mark.parametrize("policy", LETTER_POLICIES)
def test_lower_case_is_a_base_or_unknown_as_the_policy_says(tmp_path: Path, policy: str) -> None:
    inputs, _ = task_of(tmp_path, b"acgtACGT", length=8, policy=policy).batch(0)
    lower = [6, 6, 6, 6] if policy == "hyenadna" else [7, 8, 9, 10]
    assert inputs[0].tolist() == [*lower, 7, 8, 9, 10]


def test_masking_has_the_stated_shares_and_asks_for_scored_positions_only() -> None:
    count = 200_000
    random = np.random.default_rng(0)
    tokens = random.integers(7, 11, count).astype(np.uint8)
    scored = random.random(count) < 0.7
    inputs, targets = masked_example(tokens, scored, MaskingRecipe(), np.random.default_rng(1))
    asked = targets != IGNORED
    assert not asked[~scored].any()
    assert (targets[asked] == tokens[asked]).all()
    assert (inputs[~asked] == tokens[~asked]).all()
    share = 4 / math.sqrt(asked.sum())  # four standard deviations, and more
    assert asked.sum() / scored.sum() == pytest.approx(0.15, abs=0.005)
    assert (inputs[asked] == MASK_TOKEN).mean() == pytest.approx(0.8, abs=share)
    replaced = (inputs[asked] != MASK_TOKEN) & (inputs[asked] != tokens[asked])
    assert replaced.mean() == pytest.approx(0.1 * 3 / 4, abs=share)  # one in four draws the base that was there
    drawn = np.bincount(inputs[asked][replaced] - FIRST_BASE_TOKEN, minlength=4) / replaced.sum()
    assert drawn == pytest.approx(np.full(4, 0.25), abs=0.05)


@pytest.mark.parametrize("changes", [(), MASKED], ids=["causal", "masked"])
def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path, changes: tuple[str, ...]) -> None:
    letters = predictable_dna(4000)
    (tmp_path / "again").mkdir()
    first, other = (task_of(tmp_path, letters, *changes, seed=seed) for seed in (3, 4))
    again = task_of(tmp_path / "again", letters, *changes, seed=3)
    first.batch(0)
    for one, two in zip(first.batch(5), again.batch(5), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.batch(5)[0], first.batch(6)[0])
    assert not torch.equal(first.batch(5)[0], other.batch(5)[0])


@pytest.mark.parametrize("changes", [(), MASKED], ids=["causal", "masked"])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    letters = predictable_dna(1500) + b"N" * 700 + predictable_dna(1500, 1)
    task = task_of(tmp_path, letters, *changes, "batch.bases_per_step=2048")
    batch = task.batch(0)
    parameters = list(task.model.parameters())

    def gradients(parts):
        task.model.zero_grad()
        total = sum(task.weight(part) for part in parts)
        for part in parts:
            (task.loss(task.model, part)["loss"] * task.weight(part) / total).backward()
        return [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in parameters]

    whole = gradients([batch])
    in_parts = gradients(list(zip(*(tensor.split(3) for tensor in batch), strict=True)))
    assert len({task.weight(part) for part in zip(*(tensor.split(3) for tensor in batch), strict=True)}) > 1
    for expected, found in zip(whole, in_parts, strict=True):
        assert relative_error(found, expected) < PIECES_FLOAT32


def test_a_long_window_in_pieces_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    task = task_of(tmp_path, predictable_dna(4000), "pretraining.piece_length=100", length=512)
    batch = tuple(tensor[:2] for tensor in task.batch(0))
    pieces = task.pieces(batch)
    assert pieces is not None and pieces.piece_length == 100
    assert task.pieces(tuple(tensor[:, :100] for tensor in batch)) is None
    whole = task.loss(task.model, batch)["loss"]
    whole.backward()
    expected = [parameter.grad.clone() for parameter in task.model.parameters()]
    task.model.zero_grad()
    result = backward_in_pieces(task.model, pieces.sequence, pieces.loss, piece_length=pieces.piece_length)
    assert float(result.loss) == pytest.approx(float(whole.detach()), rel=PIECES_FLOAT32)
    for parameter, gradient in zip(task.model.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, gradient) < 10 * PIECES_FLOAT32


@pytest.mark.parametrize("changes", [(), MASKED], ids=["causal", "masked"])
def test_a_batch_of_n_has_the_loss_zero_and_no_gradient(tmp_path: Path, changes: tuple[str, ...]) -> None:
    task = task_of(tmp_path, predictable_dna(200), *changes)
    tokens = np.full((2, 64), 11, dtype=np.uint8)
    batch = task._examples(tokens, np.zeros((2, 64), dtype=bool), 0)
    assert task.weight(batch) == 0
    loss = task.loss(task.model, batch)["loss"]
    loss.backward()
    assert float(loss) == 0
    assert all(one.grad is None or not one.grad.any() for one in task.model.parameters())


def test_windows_of_n_only_are_never_drawn_and_no_loss_is_a_nan(tmp_path: Path) -> None:
    records = {"chr1": b"N" * 5000 + predictable_dna(600), "chr2": b"N" * 900 + predictable_dna(300)}
    reference = write_genome(tmp_path / "gaps.fa", records)
    options = options_of(
        tmp_path, "gaps", references=[reference], valid_chromosomes=["chr2"], test_chromosomes=[], steps=4
    )
    result = pretrain(options)
    assert result.perplexity is not None and math.isfinite(result.perplexity)
    assert all(math.isfinite(float(row["loss"])) for row in read_metrics(result.metrics_path))


def test_windows_get_longer_during_the_warm_up(tmp_path: Path) -> None:
    changes = ("length.warmup_first_length=64", "length.warmup_steps_per_stage=2", "batch.bases_per_step=512")
    task = task_of(tmp_path, predictable_dna(4000), *changes, length=256)
    assert [tuple(task.batch(step)[0].shape) for step in range(6)] == [(8, 64)] * 2 + [(4, 128)] * 2 + [(2, 256)] * 2
    assert task.bases_seen(6) == 6 * 512


# Splits


def test_chromosomes_are_held_out_of_every_reference(tmp_path: Path) -> None:
    references = ReferenceSet([yeast_like(tmp_path, "alba"), yeast_like(tmp_path, "nigra", 1, 5000)])
    rows, short = rows_by_chromosome(references, 5500, ["chr1"], ["chr2"], ["chr3"])
    assert [(row.chromosome, row.split) for row in rows] == [
        ("alba|chr1", "valid"),
        ("alba|chr2", "test"),
        ("alba|chr4", "train"),
    ]
    assert short == ["nigra|chr1", "nigra|chr2", "nigra|chr4"]
    direct = predictable_dna(5000, 12)
    assert references.letters("nigra|chr2", 100, 200) == direct[100:200]


def test_one_reference_keeps_its_names_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    path = yeast_like(tmp_path)
    assert list(ReferenceSet([path]).lengths) == ["chr1", "chr2", "chr3", "chr4"]
    with pytest.raises(InputError, match="two references are called 'alba'"):
        ReferenceSet([path, path])


# Whole runs


@pytest.fixture
def saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)


class StoppedError(Exception):
    """A run that ends in the middle."""


@pytest.mark.parametrize("changes", [(), MASKED], ids=["causal", "masked"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    tmp_path: Path, changes: tuple[str, ...], saved_at_every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(options_of(tmp_path, "whole", changes=changes))
    kind = MaskedTask if changes else CausalTask
    batch = kind.batch

    def stop(task, step):
        if step == 5:
            raise StoppedError
        return batch(task, step)

    monkeypatch.setattr(kind, "batch", stop)
    with pytest.raises(StoppedError):
        pretrain(options_of(tmp_path, "stopped", changes=changes))
    monkeypatch.setattr(kind, "batch", batch)
    result = pretrain(options_of(tmp_path, "stopped", changes=changes, resume=True))
    expected, found = (load_language_model(tmp_path / name).model.state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    whole_losses, losses = (
        [row["loss"] for row in read_metrics(tmp_path / name / "training" / "metrics.csv")]
        for name in ("whole", "stopped")
    )
    assert whole_losses == losses and len(losses) == 8
    assert pretrain(options_of(tmp_path, "stopped", changes=changes, resume=True)).perplexity == result.perplexity


@pytest.mark.parametrize("rule", ["hyenadna", "mamba", "caduceus"])
def test_each_window_rule_pretrains_through_the_command(tmp_path: Path, rule: str) -> None:
    reference = yeast_like(tmp_path)
    rows = ["chr1\t0\t2000\ttrain", "chr2\t500\t2500\ttrain", "chr3\t0\t2000\tvalid", "chr4\t0\t2000\ttest"]
    (tmp_path / "rows.bed").write_text("\n".join(rows) + "\n")
    output = tmp_path / "model"
    arguments = ["pretrain", "--reference", reference, "--intervals", tmp_path / "rows.bed", "--rule", rule]
    arguments += ["--length", 256, "--output", output, "--steps", 3, "--recipe", "tiny", "--threads", 1]
    assert run_command(*arguments) == 0
    details = load_language_model(output).details
    assert details["recipe"]["pretraining"]["rule"] == rule
    assert math.isfinite(details["valid_perplexity"])
    assert details["bases_seen"] == 3 * 4096


def test_a_masked_model_with_its_letters_comes_out_of_the_command(tmp_path: Path) -> None:
    arguments = ["pretrain", "--reference", yeast_like(tmp_path), "--valid-chromosomes", "chr3", "--length", 128]
    arguments += ["--objective", "masked", "--letters", "caduceus", "--recipe", "tiny", "--steps", 2, "--threads", 1]
    arguments += ["--set", "model.context_widths=[]", "--set", "model.equivariant=true"]
    arguments += ["--set", "pretraining.reverse_complement_probability=0", "--output", tmp_path / "model"]
    assert run_command(*arguments) == 0
    loaded = load_language_model(tmp_path / "model")
    assert loaded.objective == "masked" and loaded.model.config.equivariant
    assert loaded.policy == letter_policy("caduceus")


# Recipes


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Per layer of width d, inner width 2 d, state 16, rank d / 16; Caduceus as published, both directions tied.
    [("mamba-1.4m", 1_401_472), ("hyenadna-split", 1_401_472), ("mamba-7m", 7_012_608), ("caduceus-ps", 7_725_312),
     ("caduceus-ph", 7_725_312)],
)  # fmt: skip
def test_published_recipes_have_the_published_shapes(name: str, parameters: int) -> None:
    recipe = load_task_recipe(PretrainingRecipe, name)
    recipe.check()
    assert sum(one.numel() for one in recipe.build_model().parameters()) == parameters


def test_the_package_brings_the_promised_recipes_and_each_can_be_stored() -> None:
    names = ["caduceus-ph", "caduceus-ps", "hyenadna-split", "mamba-1.4m", "mamba-7m", "small", "tiny"]
    assert recipe_names("pretraining") == names
    for name in names:
        recipe = load_task_recipe(PretrainingRecipe, name)
        recipe.check()
        assert PretrainingRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3"])
@pytest.mark.parametrize("equivariant", [False, True])
def test_the_mixer_is_one_word_of_a_recipe(mixer: str, equivariant: bool) -> None:
    strands = [f"model.equivariant={str(equivariant).lower()}", "pretraining.reverse_complement_probability=0"]
    for changes in ([], [*MASKED, *strands]):
        model = recipe_of(*changes, f"model.mixer={mixer}").build_model()
        assert {name_of(part) for part in model.modules() if isinstance(part, Mixer)} == {mixer}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["masking.fraction=1.5"], "masking.fraction .*from 0 to 1"),
        (["masking.mask_share=0.9", "masking.random_share=0.2"], "mask_share .*random_share .*is 1.1"),
        (["pretraining.rule=basenji"], "rule of pretraining .*one of hyenadna, mamba, caduceus"),
        (["pretraining.letters=all"], "letters of pretraining .*one of bases, hyenadna, caduceus"),
        (["objective=sideways"], "objective .*one of causal, masked"),
        (["model.equivariant=true"], "model.equivariant .*is for the objective masked"),
        (["objective=masked"], "model.context_widths .*is for the objective causal"),
        ([*MASKED, "model.equivariant=true"], "reverse_complement_probability to 0"),
        (["pretraining.counted_order=4", "model.tied_head=true"], "counted_order .*tied_head false"),
        (["pretraining.counted_order=20"], "counted_order .*up to 12"),
    ],
)
def test_mistakes_in_a_recipe_are_named(changes: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        recipe_of(*changes)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"valid_chromosomes": ["chrX"]}, r"no chromosome 'chrX' \(--valid-chromosomes\)"),
        ({"test_chromosomes": ["chr3"]}, "'chr3' is given to --valid-chromosomes and to --test-chromosomes"),
        ({"length": 7000}, "no chromosome of 7000 bp or more is left for train"),
        ({"test_chromosomes": ["chr1", "chr2", "chr4"]}, "left for train"),
        ({"intervals": "rows.bed"}, "--intervals and splits by chromosome"),
        ({"references": []}, "no reference"),
        ({"length": 0}, "--length is 0"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_written(tmp_path: Path, changes: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        pretrain(options_of(tmp_path, "model", **changes))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("rows", "arguments", "expected"),
    [
        ("chr9\t0\t500\ttrain", [], "chromosome 'chr9'"),
        ("chr1\t0\t7000\ttrain", [], "line 1"),
        ("chr1\t0\t500\tdev", [], "split 'dev'"),
        ("chr1\t0\t500\tvalid", [], "no rows for train"),
        ("chr1\t0\t500\ttrain", ["--rule", "caduceus", "--length", "100"], "which 100 bp does not divide"),
        ("chr1\t0\t500\ttrain", ["--rule", "basenji"], "one of hyenadna, mamba, caduceus"),
        ("chr1\t0\t500\ttrain", ["--length", "64", "--steps", "1", "--minutes", "1"], "--minutes and --steps"),
        (None, ["--rule", "mamba"], "--rule mamba needs --intervals"),
        (None, ["--valid-chromosomes", "chr1,,chr2"], "empty entry"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture, rows: str | None, arguments: list[str], expected: str
) -> None:
    given = ["pretrain", "--reference", yeast_like(tmp_path), "--output", tmp_path / "model", "--recipe", "tiny"]
    if rows is not None:
        (tmp_path / "rows.bed").write_text(rows + "\n")
        given += ["--intervals", tmp_path / "rows.bed"]
    if "--length" not in arguments:
        given += ["--length", "64"]
    assert run_command(*given, *arguments) == 2
    error = capfd.readouterr().err.strip()
    assert expected in error and len(error.splitlines()) == 1


def test_a_recipe_is_printed_with_the_options_in_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--reference", "x", "--length", 1, "--output", tmp_path / "m", "--recipe", "mamba-7m"]
    assert run_command("pretrain", *arguments, "--letters", "caduceus", "--print-recipe") == 0
    assert "letters: caduceus" in capsys.readouterr().out


# Training a model further


def test_a_run_that_starts_from_a_model_begins_with_its_weights(tmp_path: Path) -> None:
    first = pretrain(options_of(tmp_path, "first", steps=4))
    before = load_language_model(first.folder)
    still = ["optimizer.learning_rate=1e-12", "optimizer.weight_decay=0"]
    options = options_of(tmp_path, "second", steps=2, length=512, start_from=str(first.folder), changes=still)
    after = load_language_model(pretrain(options).folder)
    for (name, old), new in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-9, rtol=0, msg=name)
    assert after.details["start_from"] == str(first.folder)


def test_a_run_starts_only_from_a_model_that_can_be_trained_further(tmp_path: Path) -> None:
    first = str(pretrain(options_of(tmp_path, "first", steps=2)).folder)
    with pytest.raises(InputError, match=r"--set model.layers=3 is determined by the model given with --from"):
        pretrain(options_of(tmp_path, "other", start_from=first, changes=["model.layers=3"]))
    masked = str(pretrain(options_of(tmp_path, "masked", steps=2, changes=MASKED)).folder)
    with pytest.raises(InputError, match="is a masked model but the run is causal: use --objective masked"):
        pretrain(options_of(tmp_path, "other", start_from=masked))
    counted = ["model.tied_head=false", "pretraining.counted_order=3"]
    joined = str(pretrain(options_of(tmp_path, "joined", steps=2, changes=counted)).folder)
    with pytest.raises(InputError, match="interpolated with an n-gram model, which cannot be trained further"):
        pretrain(options_of(tmp_path, "other", start_from=joined))
