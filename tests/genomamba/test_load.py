"""`genomamba.load`: three lines for each method, the same numbers as the functions below, one sentence for the rest."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import genomamba
from genomamba.data.targets import TargetDescription
from genomamba.models.sequence_model import save_sequence_model, sequence_model_on
from mambacore.errors import InputError
from tiny_language_models import language_model, model_folder, random_letters, write_fasta
from tiny_species import CLASS_NAMES, bases, fasta, write_tiny_model

GENOME = random_letters(600, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("load")
    write_tiny_model(place / "yeasts")
    model_folder(place / "pretrained", "causal")
    model_folder(place / "masked", "masked")
    targets = TargetDescription("classes", ("kind",), ("a", "b"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sequences = sequence_model_on(language_model("causal"), targets, "mean", True).float()
    save_sequence_model(place / "promoters", sequences, {})
    (place / "contigs.fa").write_bytes(fasta({"first": bases(300), "second": b"N" * 40}))
    (place / "reads.fq").write_text(f"@r1\n{bases(30).decode()}\n+\n{'I' * 30}\n")
    write_fasta(place / "genome.fa", {"chr1": GENOME})
    other = b"C" if GENOME[299:300] == b"A" else b"A"
    (place / "variants.vcf").write_bytes(
        b"##fileformat=VCFv4.2\n##contig=<ID=chr1,length=600>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        b"chr1\t300\t.\t" + GENOME[299:300] + b"\t" + other + b"\t.\t.\t.\n"
    )
    return place


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_classify_in_three_lines() -> None:
    model = genomamba.load("yeasts")
    table = model.classify("contigs.fa")
    assert [row["call"] for row in table][1] == "unclassified"

    assert table.columns == ("record", "length", "call", "probability", *(f"p_{name}" for name in CLASS_NAMES))
    by_name = model.classify({"first": bases(300).decode(), "second": "N" * 40})
    assert by_name.rows == table.rows
    assert model.classify(bases(300).decode()).rows[0][1:] == table.rows[0][1:]
    assert str(table).splitlines()[2].endswith("unclassified\tNA\tNA\tNA\tNA")
    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns)
    assert frame["probability"].isna().tolist() == [False, True]


def test_embed_in_three_lines() -> None:
    model = genomamba.load("pretrained")
    vectors = model.embed("contigs.fa").vectors
    assert vectors.shape == (2, 8)

    windows = model.embed("contigs.fa", window=100)
    assert [tuple(row.values()) for row in windows][:3] == [("first", 0, 100), ("first", 100, 200), ("first", 200, 300)]
    assert windows.to_pandas().shape == (4, 3 + 8)
    assert model.embed("reads.fq")["name"] == ["r1"]


def test_a_precision_is_that_of_the_same_methods_under_autocast() -> None:
    exact, rounded = (genomamba.load("pretrained", precision=name) for name in ("float32", "bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = exact.embed("contigs.fa").vectors
    found = rounded.embed("contigs.fa").vectors
    assert np.array_equal(found, expected) and not np.array_equal(found, exact.embed("contigs.fa").vectors)
    with pytest.raises(InputError, match="precision is 'float16': use float32 or bfloat16"):
        genomamba.load("pretrained", precision="float16")  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["pretrained", "masked"])
def test_log_likelihood_in_three_lines(folder: str) -> None:
    model = genomamba.load(folder)
    table = model.log_likelihood({"a": "ACGTNACGT", "one": "A", "none": ""})
    assert table["bases"] == [7, 0, 0]

    assert table[0]["per_base"] == pytest.approx(table[0]["log_likelihood"] / 7)
    assert table[0]["perplexity"] == pytest.approx(np.exp(-table[0]["per_base"]))
    other_strand = model.log_likelihood("ACGTNACGT"[::-1].translate(str.maketrans("ACGT", "TGCA")))
    both = model.log_likelihood("ACGTNACGT", both_strands=True)
    expected = (table[0]["log_likelihood"] + other_strand[0]["log_likelihood"]) / 2
    assert both[0]["log_likelihood"] == pytest.approx(expected)


def test_the_log_likelihood_is_that_of_each_base_given_those_before_it() -> None:
    model = genomamba.load("pretrained")
    tokens = model.model.tokens("ACGTTGCA")
    found = model.model.next_base_log_probabilities(torch.from_numpy(tokens)[None])[0][0]
    expected = sum(float(found[place - 1, tokens[place] - 7]) for place in range(1, 8))
    assert model.log_likelihood("ACGTTGCA")[0]["log_likelihood"] == pytest.approx(expected)


def test_score_variants_in_three_lines() -> None:
    model = genomamba.load("pretrained")
    table = model.score_variants("variants.vcf", "genome.fa", window=128)
    assert table["status"] == ["scored"]

    row = table[0]
    of_strands = (row["log_likelihood_ratio_forward"], row["log_likelihood_ratio_reverse"])
    assert row["log_likelihood_ratio"] == pytest.approx(np.mean(of_strands))
    one_strand = model.score_variants("variants.vcf", "genome.fa", window=128, both_strands=False)[0]
    assert one_strand["log_likelihood_ratio_reverse"] is None
    assert one_strand["log_likelihood_ratio"] == pytest.approx(of_strands[0])


def test_generate_in_three_lines() -> None:
    model = genomamba.load("pretrained")
    table = model.generate(20, records=3, prompt="ACGT", seed=1)
    assert [len(sequence) for sequence in table["sequence"]] == [20] * 3

    assert model.generate(20, records=2, prompt="ACGT", seed=1)["sequence"] == table["sequence"][:2]
    likelihoods = model.log_likelihood({str(n): "ACGT" + row["sequence"] for n, row in enumerate(table)})
    prompt = model.log_likelihood("ACGT")[0]["log_likelihood"]
    assert table["log_likelihood"] == pytest.approx(
        [value - prompt for value in likelihoods["log_likelihood"]], abs=1e-3
    )


def test_predict_in_three_lines() -> None:
    model = genomamba.load("promoters")
    table = model.predict({"a": bases(50).decode(), "empty": ""})
    assert table.columns == ("record", "length", "call", "probability", "p_a", "p_b")

    assert table[0]["call"] in ("a", "b")
    assert table[0]["p_a"] + table[0]["p_b"] == pytest.approx(1)
    assert table.rows[1] == ("empty", 0, None, None, None, None)


@pytest.mark.parametrize(
    ("folder", "method", "arguments"),
    [
        ("yeasts", "embed", ("contigs.fa",)),
        ("yeasts", "generate", (10,)),
        ("pretrained", "classify", ("contigs.fa",)),
        ("pretrained", "predict", ("contigs.fa",)),
        ("promoters", "score_variants", ("variants.vcf", "genome.fa")),
        ("masked", "generate", (10,)),
        ("promoters", "log_likelihood", ("contigs.fa",)),
    ],
)
def test_what_a_kind_of_model_cannot_do_is_one_sentence(
    folder: str, method: str, arguments: tuple[object, ...]
) -> None:
    with pytest.raises(InputError, match=folder) as caught:
        getattr(genomamba.load(folder), method)(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: genomamba.load("nowhere"), "nowhere"),
        (lambda: genomamba.load("yeasts", device="abacus"), "device 'abacus'"),
        (lambda: genomamba.load("yeasts").classify("no_such_file.fa"), "no_such_file.fa"),
        (lambda: genomamba.load("yeasts").classify("hello world"), "neither an existing file nor a DNA sequence"),
        (lambda: genomamba.load("yeasts").classify({"a": "ACGZ"}), "'Z'"),
        (lambda: genomamba.load("yeasts").classify("contigs.fa", unknown_rate=0.05), "--holdout"),
    ],
)
def test_mistakes_are_one_sentence(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys; import genomamba; "
        "print(*[name for name in ('torch', 'lightning', 'numpy', 'pandas') if name in sys.modules])"
    )
    heavy = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert not heavy.stdout.split()
