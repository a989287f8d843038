"""Classifying records: laws that the answers obey, and what happens to odd records and broken input."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest

from genomamba.alphabet import reverse_complement
from mambacore.errors import InputError
from mambapipelines.species.classify import (
    MOST_LISTED_RECORDS,
    Classification,
    ClassificationOptions,
    ClassificationSummary,
    RecordClassifier,
    classify_files,
)
from tiny_species import CLASS_NAMES, bases, fasta, tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model")


def answers(records: dict[str, bytes], **options: float) -> list[Classification]:
    classifier = RecordClassifier(tiny_model(), **options)  # type: ignore[arg-type]
    return list(classifier.classify(io.BytesIO(fasta(records))))


def probabilities_of(rows: list[Classification]) -> np.ndarray:
    return np.stack([row.probabilities for row in rows if row.probabilities is not None])


@pytest.mark.parametrize("piece_length", [64, 16_384])
def test_a_record_and_its_reverse_complement_get_the_same_answer(piece_length: int) -> None:
    sequences = {"short": bases(3), "odd": bases(257, 1), "gapped": bases(50, 2) + b"NNNNRYKM" + bases(30, 3)}
    forward = answers(sequences, piece_length=piece_length)
    reverse = answers({name: reverse_complement(text) for name, text in sequences.items()}, piece_length=piece_length)
    np.testing.assert_allclose(probabilities_of(forward), probabilities_of(reverse), atol=1e-6)
    assert [row.call for row in forward] == [row.call for row in reverse]


def test_the_answer_does_not_depend_on_the_length_of_the_pieces() -> None:
    sequences = {"a": bases(4099), "b": bases(1000, 1), "c": bases(1, 2)}
    whole = probabilities_of(answers(sequences))
    assert 0.001 < whole.min() < whole.max() < 0.999
    for piece_length in (1000, 999, 257):
        np.testing.assert_allclose(probabilities_of(answers(sequences, piece_length=piece_length)), whole, atol=1e-5)


def test_the_answer_does_not_depend_on_the_records_around() -> None:
    sequences = {f"r{number}": bases(100 + number % 3, number) for number in range(12)}
    together = answers(sequences)
    alone = [answers({name: sequence})[0] for name, sequence in sequences.items()]
    np.testing.assert_allclose(probabilities_of(together), probabilities_of(alone), atol=1e-6)


def test_probabilities_are_a_distribution_and_the_call_is_its_maximum() -> None:
    for row in answers({f"r{number}": bases(200, number) for number in range(20)}):
        assert row.probabilities is not None
        assert row.probabilities.sum() == pytest.approx(1)
        assert row.call == CLASS_NAMES[int(row.probabilities.argmax())]
        assert row.probability == row.probabilities.max()


def test_every_record_gets_one_row_in_the_order_of_the_input() -> None:
    # More records than wait for each other, with long ones and empty ones in between.
    lengths = [number % 7 * 50 for number in range(300)] + [3000, 0, 10]
    records = {f"r{number}": bases(length, number) for number, length in enumerate(lengths)}
    rows = answers(records, piece_length=1024)
    assert [row.name for row in rows] == list(records)
    assert [row.length for row in rows] == lengths


def test_empty_and_short_records_are_unclassified_with_na_for_probabilities(model_folder: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "contigs.fa", tmp_path / "calls.tsv"
    source.write_bytes(fasta({"empty": b"", "one": b"A", "short": bases(9), "enough": bases(10)}))
    classify_files(ClassificationOptions(model_folder, [str(source)], output=output, minimum_length=10))
    rows = [line.split("\t") for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["record", "length", "call", "probability", *(f"p_{name}" for name in CLASS_NAMES)]
    assert [row[:2] for row in rows[1:]] == [["empty", "0"], ["one", "1"], ["short", "9"], ["enough", "10"]]
    assert all(row[2:] == ["unclassified", *["NA"] * 4] for row in rows[1:4])
    assert rows[4][2] in CLASS_NAMES
    assert float(rows[4][3]) == max(map(float, rows[4][4:]))


def test_one_base_is_classified_when_no_minimum_is_given() -> None:
    (row,) = answers({"one": b"G"})
    assert row.call in CLASS_NAMES


def test_records_without_a_probable_class_are_unknown_and_keep_their_probabilities() -> None:
    records = {f"r{number}": bases(200, number) for number in range(20)}
    plain = answers(records)
    threshold = float(np.median([row.probability for row in plain]))
    for before, after in zip(plain, answers(records, unknown_below=threshold), strict=True):
        assert after.call == ("unknown" if before.probability < threshold else before.call)
        assert np.array_equal(after.probabilities, before.probabilities)  # type: ignore[arg-type]


def test_several_files_and_gzip_under_any_name_are_read_in_order(
    model_folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    plain, zipped = tmp_path / "one.fa", tmp_path / "two.txt"
    plain.write_bytes(fasta({"a": bases(20)}))
    zipped.write_bytes(gzip.compress(fasta({"b": bases(20)})))
    classify_files(ClassificationOptions(model_folder, [str(zipped), str(plain)]))
    lines = capfdbinary.readouterr().out.splitlines()
    assert [line.split(b"\t")[0] for line in lines] == [b"record", b"b", b"a"]


def test_the_summary_counts_everything_and_keeps_a_bounded_part() -> None:
    summary = ClassificationSummary(("a", "b"))
    count = MOST_LISTED_RECORDS + 50
    for number in range(count):
        summary.add(Classification(f"r{number}", 10, "a", np.array([0.9, 0.1])))
    summary.add(Classification("short", 3, "unclassified", None))
    assert (summary.record_count, summary.base_count) == (count + 1, 10 * count + 3)
    assert summary.records == {"a": count, "unclassified": 1}
    assert summary.histogram.sum() == summary.histogram[18] == count
    assert len(summary.listed) == MOST_LISTED_RECORDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"ACGT\n", "header"),
        (b"@read\nACGT\n+\nIII\n", "FASTQ"),
        (fasta({"good": b"ACGT", "protein": b"MKLVEEFP"}), "protein"),
        (b"\x00\x01\x02", "binary"),
        (gzip.compress(fasta({"a": bases(5000)}), mtime=0)[:-200], "truncated"),
    ],
)
def test_broken_input_is_one_sentence_and_leaves_no_file(
    content: bytes, message: str, model_folder: Path, tmp_path: Path
) -> None:
    source, output, report = tmp_path / "in.fa", tmp_path / "out.tsv", tmp_path / "out.html"
    source.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        classify_files(ClassificationOptions(model_folder, [str(source)], output=output, report=report))
    assert str(source) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fa"]


def test_outputs_never_overwrite_inputs_or_each_other(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.fa"
    content = fasta({"a": bases(20)})
    source.write_bytes(content)
    with pytest.raises(InputError, match="also an input"):
        classify_files(ClassificationOptions(model_folder, [str(source)], output=source))
    with pytest.raises(InputError, match="both"):
        both = tmp_path / "out"
        classify_files(ClassificationOptions(model_folder, [str(source)], output=both, report=both))
    assert source.read_bytes() == content


def test_an_earlier_table_survives_a_failure(model_folder: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.fa", tmp_path / "out.tsv"
    source.write_bytes(b">a\nACGT\n>b\nMKLV\n")
    output.write_text("earlier", encoding="utf-8")
    with pytest.raises(InputError):
        classify_files(ClassificationOptions(model_folder, [str(source)], output=output))
    assert output.read_text(encoding="utf-8") == "earlier"


def test_a_table_can_go_to_a_device_without_replacing_it(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.fa"
    source.write_bytes(fasta({"a": bases(20)}))
    classify_files(ClassificationOptions(model_folder, [str(source)], output=Path("/dev/null")))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"minimum_length": -1}, "min-length"), ({"unknown_below": 1.5}, "unknown-below"), ({"piece_length": 0}, "piece")],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecordClassifier(tiny_model(), **options)  # type: ignore[arg-type]


def test_a_class_named_unknown_forbids_calling_records_unknown() -> None:
    with pytest.raises(InputError, match="unknown"):
        RecordClassifier(tiny_model(("a", "unknown")), unknown_below=0.5)
