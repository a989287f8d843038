"""What `genomamba classify` writes beside the table, FASTQ, and unlikely records."""

import gzip
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genomamba.classification.evidence import RecordEvidence, batches_by_length, evidence_of_records
from genomamba.classification.held_out import HeldOutEvidence
from genomamba.classification.novelty import (
    LikelihoodQuantiles,
    best_likelihood,
    count_scored_words,
    own_likelihood,
    pair_counts,
)
from genomamba.classification.records import Groups, Share
from genomamba.io.fastq import read_record_texts
from genomamba.tokenizer import COMPLEMENT_IDS, TOKEN_OF_BYTE
from mambacore.errors import InputError
from mambapipelines.species.classify import ClassificationOptions, RecordClassifier, classify_files
from mambapipelines.species.outputs import CallSinks, kraken_report
from tiny_species import CLASS_NAMES, bases, combined_model, fasta, tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.fa"
    lengths = [number * 37 % 90 for number in range(60)] + [400, 5]
    path.write_bytes(fasta({f"bin{n % 3}_{n} words": bases(length, n) for n, length in enumerate(lengths)}))
    return path


def test_groups_add_up_by_expression_separator_or_file(model_folder: Path, tmp_path: Path) -> None:
    source, mapping = tmp_path / "in.fa", tmp_path / "groups.tsv"
    records = {f"bin{n % 2}_{n}": bases(30 + n, n) for n in range(6)} | {"alone": bases(40, 9), "bin1_empty": b""}
    source.write_bytes(fasta(records))
    mapping.write_text("".join(f"{name}\t{name.split('_')[0]}\n" for name in records if "_" in name))
    tables = []
    for rule in ("^(bin[0-9])_", "_", str(mapping)):
        groups = tmp_path / "out.tsv"
        classify_files(
            ClassificationOptions(
                model_folder, [str(source)], output=Path("/dev/null"), group_by=rule, groups_output=groups
            )
        )
        tables.append(groups.read_text().splitlines())
    assert tables[0] == tables[1] == tables[2]
    assert tables[0][0].split("\t") == [
        "group",
        "records",
        "length",
        "call",
        "probability",
        "p_alba",
        "p_nigra",
        "p_rubra",
    ]
    rows = [line.split("\t") for line in tables[0][1:]]
    assert [row[:3] for row in rows] == [["bin0", "3", "96"], ["bin1", "4", "99"]]
    classifier = RecordClassifier(tiny_model())
    evidence = [record for _, record in classifier.evidence([io.BytesIO(fasta(records))], Share())]
    total = sum(record.evidence * record.length for record in evidence[0:6:2])  # type: ignore[operator,misc]
    joint = RecordEvidence("bin0", 96, 96, total / 96)  # type: ignore[operator]
    assert float(rows[0][4]) == pytest.approx(classifier.answer(joint).probability, abs=2e-6)


def test_a_group_is_as_typical_as_its_records_on_average() -> None:
    quantiles = LikelihoodQuantiles(np.array([64.0]), np.array([100.0]), np.linspace(-0.2, 0.2, 101)[None])
    classifier = RecordClassifier(tiny_model(), unknown_rate=0.3, quantiles=quantiles)
    records = [RecordEvidence(f"r{n}", 64, 64, np.array([value, -9.0, -9.0])) for n, value in enumerate([-0.18, 0.0])]
    rows = [classifier.answer(record) for record in records]
    assert [row.call for row in rows] == ["unknown", "alba"]
    for chosen, call, factor in (([0], "unknown", 1), ([0, 0], "unknown", 2), ([0, 1], "alba", 2)):
        groups = Groups(lambda name: "all")
        for place in chosen:
            groups.add(records[place], rows[place].p_value)
        answer = classifier.answer_group("all", groups.by_name["all"])
        mean = np.mean([rows[place].p_value for place in chosen])
        assert (answer.call, answer.p_value) == (call, pytest.approx(factor * mean))


def test_repeats_and_reverse_complements_have_the_own_likelihood_of_their_pairs() -> None:
    tokens = np.frombuffer(b"ACGT" * 50 + b"NNCAGGTTTACN", dtype=np.uint8)
    ids = np.array([TOKEN_OF_BYTE[byte] for byte in tokens], dtype=np.uint8)
    counts = pair_counts(ids)
    assert counts.sum() == 199 + 8
    pieces = pair_counts(ids[:77]) + pair_counts(ids[77:], int(ids[76]))
    assert np.array_equal(pieces, counts)
    other = pair_counts(COMPLEMENT_IDS[ids[::-1]])
    assert own_likelihood(other) == pytest.approx(own_likelihood(counts))
    # A fixed successor leaves nothing to predict; independent uniform letters leave log 4 nats.
    assert own_likelihood(pair_counts(ids[:200])) == pytest.approx(0.0, abs=2e-3)
    assert own_likelihood(np.ones((4, 4), dtype=int)) == pytest.approx(-np.log(4))
    assert own_likelihood(np.zeros((4, 4), dtype=int)) == pytest.approx(-np.log(4))


def test_no_file_appears_when_the_last_one_cannot_be_written(
    model_folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("the input has changed")

    monkeypatch.setattr(CallSinks, "_copy", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="has changed"):
        classify_files(
            ClassificationOptions(
                model_folder,
                [str(source)],
                output=tmp_path / "out.tsv",
                multiqc=tmp_path / "calls_mqc.tsv",
                group_by="_",
                groups_output=tmp_path / "groups.tsv",
                classified_output=str(tmp_path / "by"),
            )
        )
    assert sorted(tmp_path.iterdir()) == before


def test_sequences_go_to_a_file_for_each_call_unchanged(model_folder: Path, source: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.fa.gz"
    summary = classify_files(
        ClassificationOptions(
            model_folder,
            [str(source)],
            output=tmp_path / "out.tsv",
            minimum_length=20,
            classified_output=str(tmp_path / "by"),
            unclassified_output=others,
            multiqc=tmp_path / "calls_mqc.tsv",
        )
    )
    texts: dict[str, bytes] = {name: (tmp_path / "by" / f"{name}.fa").read_bytes() for name in CLASS_NAMES}
    texts["unclassified"] = gzip.decompress(others.read_bytes())
    assert {call: text.count(b">") for call, text in texts.items() if text} == summary.records
    assert (
        sorted(b"".join(texts.values()).split(b">"))
        == sorted(source.read_bytes().split(b">") + [b""] * 3)[-len(b"".join(texts.values()).split(b">")) :]
    )
    last = (tmp_path / "calls_mqc.tsv").read_text().splitlines()[-1].split("\t")
    assert last[0] == "in.fa"
    assert sum(map(int, last[1:])) == summary.record_count


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_fastq_gives_the_answers_of_the_same_fasta(line_end: bytes) -> None:
    records = {"a": bases(60), "empty": b"", "b": bases(90, 1)}
    lines = [[b"@" + name.encode(), text, b"+", b"@" * len(text)] for name, text in records.items()]
    fastq = line_end.join(line for record in lines for line in record) + line_end
    classifier = RecordClassifier(tiny_model())
    rows = list(classifier.classify(io.BytesIO(fastq)))
    expected = list(classifier.classify(io.BytesIO(fasta(records))))
    assert rows == expected
    assert np.array_equal(rows[2].probabilities, expected[2].probabilities)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([b">a\n", b"@a\n", b"+\n", b"ACGTN", b"\r\n", b"\r", b"\n", b"II", b"\x00", b" "])))
def test_any_bytes_give_rows_for_all_records_or_one_sentence(pieces: list[bytes]) -> None:
    text = b"".join(pieces)
    try:
        rows = list(RecordClassifier(tiny_model()).classify(io.BytesIO(text)))
    except InputError as error:
        assert "\n" not in str(error)
        return
    numbers = [number for number, _ in read_record_texts(io.BytesIO(text))]
    assert sorted(set(numbers)) == list(range(len(rows)))


def test_batches_hold_every_record_once_and_stay_small() -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 500).tolist()
    batches = batches_by_length(lengths)
    assert sorted(place for batch in batches for place in batch) == list(range(500))
    assert len(batches) < 60
    assert all(2 * len(batch) * max(lengths[place] for place in batch) <= 32_768 for batch in batches)


def test_words_that_markov_models_score_are_those_of_known_bases() -> None:
    tokens = np.array([TOKEN_OF_BYTE[byte] for byte in b"ACGTTNGGNNACAGTT"], dtype=np.uint8)
    runs = (5, 2, 6)
    for order in (1, 3, 10):
        expected = sum(max(run - before, 0) for run in runs for before in range(1, order + 1))
        assert count_scored_words(tokens, order) == expected
        for cut in range(1, len(tokens)):
            pieces = count_scored_words(tokens[:cut], order) + count_scored_words(tokens[cut:], order, tokens[:cut])
            assert pieces == expected
    assert count_scored_words(tokens[:1], 3) == 0
    # A record without a word is as likely as bases at random, however short it is.
    assert best_likelihood(np.array([0.0, 0.0]), 0.0) == pytest.approx(-np.log(4))


def test_p_values_of_a_model_with_markov_models_rest_on_those_and_do_not_depend_on_pieces() -> None:
    model = combined_model()
    random = np.random.default_rng(3)
    windows = [(7 + random.integers(0, 4, 300)).astype(np.uint8) for _ in range(40)]
    order = model.parts.order  # type: ignore[union-attr]
    evidence = evidence_of_records(model, windows)
    held_out = HeldOutEvidence(
        mean_evidence=evidence[:, 0],
        counted=evidence[:, 1:],
        lengths_bp=np.full(40, 300),
        labels=np.zeros(40, int),
        folds=np.zeros(40, int),
        own_likelihood=np.array([own_likelihood(pair_counts(window)) for window in windows]),
        scored_share=np.array([count_scored_words(window, order) for window in windows]) / 300,
    )
    quantiles = LikelihoodQuantiles.of_windows(held_out, order)
    assert quantiles.basis == "markov"
    details = {"calibration": {"p_value_quantiles": quantiles.to_dict()}}
    assert LikelihoodQuantiles.from_details(details, 0.1).basis == "markov"
    letters = [bytes(b"ACGT"[token - 7] for token in window) for window in windows]
    # Scattered unknown bases, which leave few words, do not make a record more likely.
    gaps = bytes(ord("N") if place % 9 == 0 else base for place, base in enumerate(letters[0]))
    text = fasta({f"r{number}": letter for number, letter in enumerate([*letters, gaps])})

    def p_values(quantiles: LikelihoodQuantiles, piece_length: int) -> list[float]:
        classifier = RecordClassifier(model, unknown_rate=0.1, quantiles=quantiles, piece_length=piece_length)
        records = [record for _, record in classifier.evidence([io.BytesIO(text)], Share())]
        return [classifier.answer(record).p_value for record in records]  # type: ignore[misc]

    whole = p_values(quantiles, 16_384)
    assert sorted(whole[:40]) == pytest.approx(np.linspace(1, 41, 40) / 41, abs=0.03)
    assert whole[40] < 0.95
    for piece_length in (37, 300):
        assert p_values(quantiles, piece_length) == pytest.approx(whole, abs=1e-6)
    likely = replace(quantiles, basis="stack", quantiles=quantiles.quantiles - 99)
    assert set(p_values(likely, 300)) == {1.0}


def test_the_p_value_is_the_share_of_windows_that_are_as_unlikely() -> None:
    random = np.random.default_rng(0)
    scores = np.concatenate([random.normal(-1.3, 0.02, 999), random.normal(-1.3, 0.01, 999)])
    evidence = HeldOutEvidence(
        np.stack([scores, scores - 1], axis=1), np.repeat([1024, 4096], 999), np.zeros(1998, int), np.zeros(1998, int)
    )
    quantiles = LikelihoodQuantiles.of_windows(evidence)
    for length, deviation in ((1024, 0.02), (4096, 0.01), (256, 0.04)):
        fresh = random.normal(-1.3, deviation, 2000)
        share = np.mean([quantiles.p_value(score, length) < 0.05 for score in fresh])
        assert 0.02 < share < 0.08
        assert quantiles.p_value(-2.0, length) < 0.002


def test_lengths_with_too_few_windows_for_the_rate_do_not_make_everything_likely() -> None:
    levels = np.linspace(-0.1, 0.1, 101)
    every = LikelihoodQuantiles(np.array([1024.0, 65_536.0]), np.array([400.0, 12.0]), np.stack([levels, levels / 8]))
    details = {"calibration": {"p_value_quantiles": every.to_dict()}}
    assert every.p_value(-9.0, 65_536) > 0.05
    for rate, lengths in ((0.05, [1024]), (0.1, [1024, 65_536])):
        quantiles = LikelihoodQuantiles.from_details(details, rate)
        assert quantiles.lengths_bp.tolist() == lengths
        assert quantiles.p_value(-9.0, 65_536) < rate and quantiles.p_value(-9.0, 10**7) < rate
        assert quantiles.p_value(0.0, 65_536) > 0.3


@pytest.mark.parametrize("key", ["p_value_quantiles", "typicality_quantiles"])
def test_unknown_rate_needs_a_calibrated_model_and_adds_a_column(
    key: str, model_folder: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="train it again with --holdout"):
        classify_files(ClassificationOptions(model_folder, [str(source)], output=Path("/dev/null"), unknown_rate=0.05))
    details = {
        "calibration": {
            key: {
                "lengths_bp": [64],
                "windows": [100],
                "quantiles": [np.linspace(5.0, 6.0, 101).tolist()],
            }
        }
    }
    folder, output = write_tiny_model(tmp_path / "calibrated", details), tmp_path / "out.tsv"
    summary = classify_files(ClassificationOptions(folder, [str(source)], output=output, unknown_rate=0.05))
    assert set(summary.records) == {"unknown", "unclassified"}
    assert output.read_text().splitlines()[0].endswith("\tp_value")
    with pytest.raises(InputError, match="too small"):
        classify_files(ClassificationOptions(folder, [str(source)], output=output, unknown_rate=0.001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by": "_"}, "belong together"),
        ({"group_by": "(a)(b)", "groups_output": Path("/dev/null")}, "exactly one"),
        ({"multiqc": Path("calls.tsv")}, "_mqc.tsv"),
        ({"processes": 0}, "processes"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: dict[str, object], message: str, model_folder: Path, source: Path
) -> None:
    with pytest.raises(InputError, match=message):
        classify_files(ClassificationOptions(model_folder, [str(source)], **options))  # type: ignore[arg-type]


def test_names_cannot_forge_rows_columns_markup_or_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = b"a\x1b[31m\xe2\x80\xae<script>\x0bb"
    (tmp_path / "escape.fa").write_bytes(b">" + name + b"\n" + bases(90) + b"\n")
    summary = classify_files(
        ClassificationOptions(
            write_tiny_model(tmp_path / "model"),
            [str(tmp_path / "escape.fa")],
            output=tmp_path / "calls.tsv",
            report=tmp_path / "calls.html",
            multiqc=tmp_path / "calls_mqc.tsv",
        )
    )
    assert summary.record_count == 1
    for path in ("calls.tsv", "calls.html", "calls_mqc.tsv"):
        text = (tmp_path / path).read_text(encoding="utf-8")
        assert all(line.replace("\t", "").isprintable() for line in text.split("\n"))
        assert "<script>" not in text or path == "calls.tsv"
    assert len((tmp_path / "calls.tsv").read_text().splitlines()) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_kraken_report_adds_up() -> None:
    text = kraken_report({"nigra": 3, "alba": 4, "unknown": 1, "unclassified": 2}, CLASS_NAMES)
    assert text == (
        " 30.00\t3\t3\tU\t0\tunclassified\n"
        " 70.00\t7\t0\tR\t1\troot\n"
        " 40.00\t4\t4\tS\t2\t  alba\n"
        " 30.00\t3\t3\tS\t3\t  nigra\n"
    )
    assert kraken_report({}, CLASS_NAMES) == ""
    assert kraken_report({"unknown": 2}, ("unknown", "b")).splitlines()[0].split("\t")[3] == "R"


def test_classify_writes_a_kraken_report(tmp_path: Path) -> None:
    (tmp_path / "in.fa").write_bytes(fasta({"one": bases(90), "gap": b"NNN"}))
    classify_files(
        ClassificationOptions(
            write_tiny_model(tmp_path / "model"),
            [str(tmp_path / "in.fa")],
            output=tmp_path / "calls.tsv",
            kraken_report=tmp_path / "kraken.txt",
        )
    )
    rows = [line.split("\t") for line in (tmp_path / "kraken.txt").read_text().splitlines()]
    assert [row[3] for row in rows] == ["U", "R", "S"]
    assert [float(row[0]) for row in rows] == [50, 50, 50]
