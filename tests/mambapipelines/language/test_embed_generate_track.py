"""`genomamba embed`, `generate` and `track`: every format, the order of rows, sentences for mistakes."""

import math
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet
import pyBigWig
import pytest

from genomamba.io.fasta import read_records
from genomamba.models.language_model import load_language_model
from genomamba.scoring.embeddings import Embedder
from mambapipelines.cli.genomamba.main import main
from tiny_language_models import model_folder, random_letters, write_fasta

CONTIGS = {"one": random_letters(120, 1), "two": b"ACGTNN" + random_letters(50, 2)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_fasta(folder / "genome.fa", CONTIGS)
    for kind in ("causal", "masked"):
        model_folder(folder / kind, kind)
    return folder


def embedded(path: Path) -> tuple[list[tuple[str, int, int]], np.ndarray]:
    if path.suffix == ".npz":
        table = np.load(path)
        return list(zip(table["name"].tolist(), table["start"].tolist(), table["end"].tolist(), strict=True)), table[
            "embedding"
        ]
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [(row["name"], row["start"], row["end"]) for row in rows], np.array([row["embedding"] for row in rows])
    data = anndata.read_h5ad(path)
    return list(data.obs[["name", "start", "end"]].itertuples(index=False, name=None)), data.X


@pytest.mark.parametrize("ending", [".npz", ".parquet", ".h5ad"])
def test_embeddings_are_written_in_every_format(files: Path, tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"vectors{ending}"
    assert main(["embed", str(files / "causal"), str(files / "genome.fa"), "--output", str(output)]) == 0
    rows, vectors = embedded(output)
    assert rows == [("one", 0, 120), ("two", 0, 56)]
    expected = Embedder(load_language_model(files / "causal")).embed(
        [one.tokens for one in read_records(files / "genome.fa")]
    )
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    assert list(tmp_path.iterdir()) == [output]


def test_regions_are_embedded_on_their_strand_in_windows(files: Path, tmp_path: Path) -> None:
    (tmp_path / "regions.bed").write_text("two\t6\t40\tx\t0\t-\none\t3\t53\n")
    output = tmp_path / "vectors.npz"
    where = ["--bed", str(tmp_path / "regions.bed"), "--reference", str(files / "genome.fa")]
    windows = ["--window", "20", "--stride", "10"]
    assert main(["embed", str(files / "masked"), *where, *windows, "--output", str(output)]) == 0
    rows, vectors = embedded(output)
    assert rows == [("two", 6, 26), ("two", 16, 36), ("two", 26, 40)] + [
        ("one", start, start + 20) for start in (3, 13, 23, 33)
    ]
    model = load_language_model(files / "masked")
    turned = CONTIGS["two"][16:36][::-1].translate(bytes.maketrans(b"ACGT", b"TGCA"))
    np.testing.assert_allclose(vectors[1], Embedder(model).embed([model.tokens(turned)])[0], rtol=1e-5)


@pytest.mark.parametrize("ending", [".npz", ".parquet", ".h5ad"])
def test_vectors_of_regions_keep_the_names_and_strands_of_the_bed_file(
    files: Path, tmp_path: Path, ending: str
) -> None:
    (tmp_path / "regions.bed").write_text("two\t6\t40\tgene A\t0\t-\none\t3\t53\n")
    output = tmp_path / f"out{ending}"
    where = ["--bed", str(tmp_path / "regions.bed"), "--reference", str(files / "genome.fa")]
    assert main(["embed", str(files / "causal"), *where, "--output", str(output)]) == 0
    if ending == ".npz":
        table = np.load(output)
    else:
        table = (
            pyarrow.parquet.read_table(output).to_pydict() if ending == ".parquet" else anndata.read_h5ad(output).obs
        )
    assert list(table["name"]) == ["two", "one"] and list(table["start"]) == [6, 3]
    assert list(table["region"]) == ["gene A", "."]
    assert list(table["strand"]) == ["-", "."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "x.csv"), "has no known ending"),
        (("--output", "x.npz", "--bed", "r.bed"), "belong together"),
        (("--output", "x.npz"), "give FASTA files, or --bed"),
        (("genome.fa", "--output", "x.npz", "--pooling", "sum"), "no pooling 'sum'"),
        (("genome.fa", "--output", "x.npz", "--stride", "5"), "give --window too"),
        (("genome.fa", "--output", "x.npz", "--layer", "9"), "no layer 9"),
    ],
)
def test_mistakes_of_embed_are_one_sentence(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    assert main(["embed", "causal", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("x.npz").exists()


def test_generated_records_are_fasta_with_their_likelihood(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.fa").write_text(">first\nACGT\n>second\nGG\n")
    arguments = ["generate", str(files / "causal"), "--length", "70", "--records", "2", "--seed", "3"]
    assert main([*arguments, "--prompt", str(tmp_path / "prompts.fa"), "--output", str(tmp_path / "new.fa")]) == 0
    assert "bases per second" in capsys.readouterr().err
    records = list(read_records(tmp_path / "new.fa"))
    assert [one.name for one in records] == [f"generated_{number}" for number in (1, 2, 3, 4)]
    assert [one.description.split("prompt=")[1] for one in records] == ["first", "first", "second", "second"]
    assert all(len(one.tokens) == 70 for one in records)
    values = dict(word.split("=") for word in records[0].description.split())
    assert float(values["log_likelihood"]) / 70 == pytest.approx(float(values["per_base"]), abs=1e-4)
    for prompt in ([], ["--prompt", "acgTN"]):
        outputs = []
        for _ in range(2):
            assert main([*arguments, *prompt]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1]
        assert outputs[0].count(">") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("causal", "--records", "0"), "--records is 0"),
        (("causal", "--records", "1" + "0" * 15), "use 1,000,000 at most"),
        (("causal", "--prompt", "HELLO"), "neither an existing file nor a DNA sequence"),
        (("causal", "--top-k", "5"), "top_k is 5"),
        (("causal", "--temperature", "-1"), "temperature"),
        (("masked",), "generation needs a causal one"),
    ],
)
def test_mistakes_of_generate_are_one_sentence(
    files: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *others = arguments
    assert main(["generate", str(files / model), "--length", "5", *others]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("model", ["causal", "masked"])
def test_bedgraph_and_bigwig_say_the_same(
    files: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["track", str(files / model), "--reference", str(files / "genome.fa"), "--window", "64"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    rows = [line.split("\t") for line in captured.out.splitlines()]
    assert [(row[0], int(row[1])) for row in rows] == [
        (name, place) for name, letters in CONTIGS.items() for place in range(len(letters)) if letters[place] in b"ACGT"
    ]
    header, *summary = [line.split("\t") for line in captured.err.splitlines()]
    assert [row[0] for row in summary] == ["one", "two", "all"]
    assert [row[1:3] for row in summary] == [["120", "120"], ["56", "54"], ["176", "174"]]
    mean = sum(float(row[3]) for row in rows) / len(rows)
    total = dict(zip(header, summary[-1], strict=True))
    assert float(total["perplexity"]) == pytest.approx(math.exp(-mean), rel=1e-3)
    assert main([*arguments, "--output", str(tmp_path / "track.bw")]) == 0
    with pyBigWig.open(str(tmp_path / "track.bw")) as opened:
        assert opened.chroms() == {name: len(letters) for name, letters in CONTIGS.items()}
        for name, start, end, value in rows:
            assert opened.values(name, int(start), int(end))[0] == pytest.approx(float(value), rel=1e-4)
        assert all(math.isnan(value) for value in opened.values("two", 4, 6))


def test_regions_of_a_track_are_read_once_and_in_order(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["track", str(files / "causal"), "--reference", str(files / "genome.fa"), "--one-strand"]
    (tmp_path / "regions.bed").write_text("two\t10\t12\none\t30\t40\none\t35\t45\n")
    assert main([*arguments, "--bed", str(tmp_path / "regions.bed")]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], int(row[1])) for row in rows] == [("one", place) for place in range(30, 45)] + [
        ("two", 10),
        ("two", 11),
    ]
    assert main([*arguments, "--region", "one:31-45"]) == 0
    again = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert again == rows[:15]
    for wrong in (["--region", "1:2-3"], ["--region", "one", "--bed", "x"], ["--output", "/nowhere/x.bw"]):
        assert main([*arguments, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
