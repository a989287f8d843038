"""What `genomamba classify` writes beside the table, FASTQ, unlikely records, and work shared by processes."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genomamba.fastq import read_record_texts
from mambacore.errors import InputError
from mambapipelines.calibration import HeldOutEvidence
from mambapipelines.classification_batches import batches_by_length
from mambapipelines.classification_unknown import LikelihoodQuantiles
from mambapipelines.species_classification import ClassificationOptions, RecordClassifier, classify_files
from tiny_species import CLASS_NAMES, bases, fasta, tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.fa"
    lengths = [number * 37 % 90 for number in range(1100)] + [400, 5]
    path.write_bytes(fasta({f"bin{n % 3}_{n} words": bases(length, n) for n, length in enumerate(lengths)}))
    return path


def test_two_processes_write_the_bytes_of_one_and_groups_add_up(
    model_folder: Path, source: Path, tmp_path: Path
) -> None:
    outputs = []
    for processes in (1, 2):
        output, groups = tmp_path / f"{processes}.tsv", tmp_path / f"groups{processes}.tsv"
        classify_files(
            ClassificationOptions(
                model_folder,
                [str(source), str(source)],
                output=output,
                group_by="^(bin[0-9])_",
                groups_output=groups,
                piece_length=256,
                processes=processes,
            )
        )
        outputs.append((output.read_bytes(), groups.read_bytes()))
    assert outputs[0] == outputs[1]
    assert outputs[0][0].count(b"\n") == 2 * 1102 + 1
    rows = [line.split(b"\t") for line in outputs[0][1].splitlines()[1:]]
    assert [row[0] for row in rows] == [b"bin0", b"bin1", b"bin2"]
    assert sum(int(row[1]) for row in rows) == 2 * 1102


def test_a_failure_in_another_process_is_its_sentence_and_leaves_no_file(model_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.fa"
    bad.write_bytes(b">a\nACGT\n>b\nMKLV\n")
    with pytest.raises(InputError, match="record 'b'"):
        classify_files(ClassificationOptions(model_folder, [str(bad)], output=tmp_path / "out.tsv", processes=2))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.fa"]


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


def test_typicality_is_the_share_of_windows_that_are_as_unlikely() -> None:
    random = np.random.default_rng(0)
    scores = np.concatenate([random.normal(-1.3, 0.02, 999), random.normal(-1.3, 0.01, 999)])
    evidence = HeldOutEvidence(
        np.stack([scores, scores - 1], axis=1), np.repeat([1024, 4096], 999), np.zeros(1998, int), np.zeros(1998, int)
    )
    quantiles = LikelihoodQuantiles.of_windows(evidence)
    for length, deviation in ((1024, 0.02), (4096, 0.01), (256, 0.04)):
        fresh = random.normal(-1.3, deviation, 2000)
        share = np.mean([quantiles.typicality(score, length) < 0.05 for score in fresh])
        assert 0.02 < share < 0.08
        assert quantiles.typicality(-2.0, length) < 0.002


def test_unknown_rate_needs_a_calibrated_model_and_adds_a_column(
    model_folder: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="train it again with --holdout"):
        classify_files(ClassificationOptions(model_folder, [str(source)], output=Path("/dev/null"), unknown_rate=0.05))
    details = {
        "calibration": {
            "likelihood_quantiles": {
                "lengths_bp": [64],
                "windows": [100],
                "quantiles": [np.linspace(5.0, 6.0, 101).tolist()],
            }
        }
    }
    folder, output = write_tiny_model(tmp_path / "calibrated", details), tmp_path / "out.tsv"
    summary = classify_files(ClassificationOptions(folder, [str(source)], output=output, unknown_rate=0.05))
    assert set(summary.records) == {"unknown", "unclassified"}
    assert output.read_text().splitlines()[0].endswith("\ttypicality")
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
