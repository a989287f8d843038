"""`genomamba finetune` and `genomamba predict`: from a table to a model, its figures, and its answers."""

import csv
import io
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genomamba.models.language_model import build_language_model, save_language_model
from genomamba.models.sequence_model import load_sequence_model
from genomamba.prediction.predict import model_outputs
from mambacore.errors import InputError
from mambapipelines.cli.genomamba.main import main
from mambapipelines.finetuning.train import FinetuningOptions, finetune
from mambapipelines.training import recorder
from mambapipelines.training.progress import TrainingProgress
from tiny_species import bases, fasta
from tolerances import PIECES_FLOAT32, relative_error


def write_table(folder: Path, rows: int = 90, name: str = "table.tsv") -> Path:
    """Sequences whose share of G and C decides a class, a label and a number; every tenth number is missing."""
    random = np.random.default_rng(4)
    lines = ["name\tsequence\tclass\trich\tpoor\tshare\tsplit"]
    for row in range(rows):
        gc = float(random.choice([0.2, 0.5, 0.8]))
        letters = bases(int(random.integers(20, 60)), seed=row, gc=gc).decode()
        share = "NA" if row % 10 == 0 else f"{100 * gc:.1f}"
        split = "test" if row % 5 == 0 else "valid" if row % 5 == 1 else "train"
        label = {0.2: "low", 0.5: "mid", 0.8: "high"}[gc]
        lines.append(f"r{row}\t{letters}\t{label}\t{int(gc == 0.8)}\t{int(gc == 0.2)}\t{share}\t{split}")
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def options(tmp_path: Path) -> FinetuningOptions:
    return FinetuningOptions(
        table=str(write_table(tmp_path)), output=tmp_path / "run", labels=["class"], steps=40, recipe="tiny", threads=1
    )


def read_tsv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


@pytest.mark.parametrize(
    ("labels", "kind", "figure", "least"),
    [
        (["class"], "classes", "accuracy", 0.6),
        (["rich", "poor"], "labels", "auroc", 0.8),
        (["share"], "numbers", "pearson", 0.6),
    ],
)
def test_every_kind_of_label_is_learned_and_measured_beside_the_control(
    labels: list[str], kind: str, figure: str, least: float, options: FinetuningOptions
) -> None:
    result = finetune(replace(options, labels=labels, balanced=kind != "numbers"))
    model, details = load_sequence_model(options.output)
    assert model.config.targets.kind == kind
    by_predictor = {row.predictor: row for row in result.metrics if row.target == labels[0]}
    assert by_predictor["genomamba"].figures[figure] > least
    assert by_predictor["kmer"].figures[figure] > least
    assert by_predictor["genomamba"].rows == (18 if kind != "numbers" else 9)
    written = read_tsv((options.output / "metrics.tsv").read_text())
    assert [row["predictor"] for row in written] == [row.predictor for row in result.metrics]
    predictions = read_tsv((options.output / "test_predictions.tsv").read_text())
    assert [row["record"] for row in predictions[:2]] == (["r0", "r5"] if kind != "numbers" else ["r5", "r15"])
    assert details["best_step"] in range(1, 41)
    state = load_file(options.output / "training" / f"step-{details['best_step']:06d}" / "weights.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_stopped_run_resumes_to_the_same_model(
    options: FinetuningOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)
    whole = replace(options, output=tmp_path / "whole", steps=12)
    finetune(whole)
    report: Callable[..., None] = TrainingProgress.step

    def report_and_stop(self: TrainingProgress, step: int, *figures: float) -> None:
        report(self, step, *figures)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    parts = replace(options, steps=12)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", report_and_stop)
        with pytest.raises(SystemExit):
            finetune(parts)
    with pytest.raises(InputError, match=r"--balanced was False and is now True"):
        finetune(replace(parts, balanced=True, resume=True))
    finetune(replace(parts, resume=True))
    first, second = (load_file(run.output / "model.safetensors") for run in (whole, parts))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert finetune(replace(parts, resume=True)).already_finished


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_pretrained_model_is_where_training_starts(
    objective: str, options: FinetuningOptions, tmp_path: Path
) -> None:
    settings = {"model_width": 8, **({"mixers": ["selective"]} if objective == "causal" else {"layers": 1})}
    core = build_language_model(objective, settings)
    save_language_model(tmp_path / "pretrained", core, {})
    finetune(
        replace(options, start_from=str(tmp_path / "pretrained"), steps=1, changes=["optimizer.learning_rate=1e-6"])
    )
    model, details = load_sequence_model(options.output)
    assert details["start_from"] == str(tmp_path / "pretrained")
    assert relative_error(model.core.embedding.weight, core.embedding.weight) < 1e-3
    with pytest.raises(InputError, match=r"--set model.layers=3 is determined by the model given with --from"):
        finetune(replace(options, start_from="x", output=tmp_path / "other", changes=["model.layers=3"]))


def test_predictions_keep_order_and_names_and_do_not_depend_on_company_or_strand(
    options: FinetuningOptions, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    finetune(replace(options, steps=5))
    complement = bytes.maketrans(b"ACGT", b"TGCA")
    long = bases(40_000, seed=1, gc=0.8)
    records = {"b": bases(70, seed=2), "empty": b"", "long": long, "other": long.translate(complement)[::-1], "a": b"A"}
    records |= {"masked": b"N" * 80, "ambiguous": b"RYKM" * 9}
    (tmp_path / "sequences.fa").write_bytes(fasta(records))
    assert main(["predict", str(options.output), str(tmp_path / "sequences.fa")]) == 0
    rows = read_tsv(capsysbinary.readouterr().out.decode())
    assert [(row["record"], row["length"]) for row in rows] == [
        (name, str(len(text))) for name, text in records.items()
    ]
    for row in (rows[1], *rows[5:]):
        assert [row[name] for name in ("call", "probability", "p_low")] == ["NA", "NA", "NA"]
    assert rows[4]["call"] != "NA"
    assert abs(float(rows[2]["p_high"]) - float(rows[3]["p_high"])) < 1e-5
    assert abs(sum(float(rows[0][f"p_{name}"]) for name in ("high", "low", "mid")) - 1) < 1e-5
    (tmp_path / "one.fa").write_bytes(fasta({"b": records["b"]}))
    assert main(["predict", str(options.output), str(tmp_path / "one.fa"), str(tmp_path / "table.tsv")]) == 0
    again = read_tsv(capsysbinary.readouterr().out.decode())
    assert abs(float(again[0]["p_high"]) - float(rows[0]["p_high"])) < 1e-5
    assert len(again) == 91


def test_a_long_sequence_in_pieces_gets_the_answer_of_the_whole(options: FinetuningOptions) -> None:
    finetune(replace(options, steps=3))
    model, _ = load_sequence_model(options.output)
    sequence = np.random.default_rng(3).integers(7, 11, 20_000).astype(np.uint8)
    both = torch.from_numpy(np.stack([sequence, (17 - sequence)[::-1].copy()]))
    with torch.no_grad():
        whole = model(both)[0].double().mean(dim=0)
    assert relative_error(model_outputs(model, [sequence])[0], whole) < PIECES_FLOAT32


def test_a_long_training_row_goes_in_pieces_and_counts_the_same(tmp_path: Path) -> None:
    lines = ["sequence\tvalue\tsplit"]
    lines += [f"{bases(900, seed=row).decode()}\t{row}\t{'valid' if row > 3 else 'train'}" for row in range(6)]
    (tmp_path / "long.tsv").write_text("\n".join(lines) + "\n")
    models = []
    for number, micro_batch in enumerate((256, 1 << 14)):
        options = FinetuningOptions(
            table=str(tmp_path / "long.tsv"), output=tmp_path / str(number), kind="numbers", steps=2, recipe="tiny",
            changes=[f"batch.bases_per_micro_batch={micro_batch}"], threads=1,
        )  # fmt: skip
        finetune(options)
        models.append(load_sequence_model(options.output)[0].head.weight)
    assert relative_error(models[0], models[1]) < 1e-3


def test_mistakes_end_in_one_line_and_leave_nothing(
    options: FinetuningOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--output", str(tmp_path / "model"), "--recipe", "tiny", "--steps", "2"]
    (tmp_path / "bad.tsv").write_text("sequence\tlabel\nAC\tx\nAQ\ty\n")
    for arguments, sentence in (
        (["--table", str(tmp_path / "absent.tsv")], "there is no file"),
        (["--table", str(tmp_path / "bad.tsv")], "bad.tsv line 3: the sequence has 'Q' at position 2"),
        (["--table", options.table, "--label", "colour"], "has no column 'colour'"),
        (["--table", options.table, "--label", "class", "--kind", "things"], "no target kind 'things'"),
        (["--table", options.table, "--label", "class", "--pooling", "max"], "the pooling is 'max'"),
        (["--table", options.table, "--label", "class", "--epochs", "1"], "--epochs is given along with"),
        (["--table", options.table, "--label", "class", "--set", "model.width=3"], "unknown key 'width'"),
    ):
        assert main([*command, *arguments]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "model").exists()
    assert main(["predict", str(tmp_path / "absent"), options.table]) == 2
