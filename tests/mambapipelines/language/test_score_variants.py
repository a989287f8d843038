"""`genomamba score-variants`: a row for every allele, annotations in VCF, sentences for mistakes."""

import gzip
from pathlib import Path

import pysam
import pytest

from mambapipelines.cli.genomamba.main import main
from tiny_language_models import model_folder, random_letters, write_fasta

LETTERS = random_letters(300, 1)
HEADER = (
    "##fileformat=VCFv4.2\n##contig=<ID=chr1,length=300>\n##contig=<ID=chr9>\n"
    '##INFO=<ID=AC,Number=A,Type=Integer,Description="x">\n'
    '##INFO=<ID=GENOMAMBA_LLR,Number=1,Type=String,Description="of another run">\n'
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="x">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tone\ttwo\n"
)


def record(
    position: int, alternatives: str, reference: str | None = None, chromosome: str = "chr1", info: str = "."
) -> str:
    letters = reference or LETTERS[position - 1 : position].decode()
    return f"{chromosome}\t{position}\trs{position}\t{letters}\t{alternatives}\t9\tPASS\t{info}\tGT\t0|1\t./.\n"


def other(position: int) -> str:
    return "A" if LETTERS[position - 1 : position] != b"A" else "C"


def wrong(position: int) -> str:
    return other(position)


RECORDS = [
    record(200, other(200), info="AC=3;GENOMAMBA_LLR=5"),
    record(20, f"{other(20)},<DEL>,{LETTERS[19:20].decode()}GG"),
    record(30, "T", reference=wrong(30)),
    record(40, "."),
    record(5, "T", chromosome="chr9", reference="A"),
]
STATUSES = [
    ["scored"],
    ["scored", "symbolic_allele", "scored"],
    ["reference_mismatch"],
    ["no_alternative"],
    ["missing_contig"],
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_fasta(tmp_path / "ref.fa", {"chr1": LETTERS})
    (tmp_path / "variants.vcf").write_text(HEADER + "".join(RECORDS))
    model_folder(tmp_path / "causal", "causal")
    model_folder(tmp_path / "masked", "masked")
    return tmp_path


def run(folder: Path, *arguments: str, model: str = "causal", vcf: str = "variants.vcf") -> int:
    reference = ("--reference", str(folder / "ref.fa"), "--window", "64")
    return main(["score-variants", str(folder / model), str(folder / vcf), *reference, *arguments])


@pytest.mark.parametrize("model", ["causal", "masked"])
def test_the_table_has_a_row_for_every_allele_in_order(
    files: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, model=model) == 0
    captured = capsys.readouterr()
    header, *rows = [line.split("\t") for line in captured.out.splitlines()]
    named = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["status"] for row in named] == [status for some in STATUSES for status in some]
    assert [row["position"] for row in named] == ["200", "20", "20", "20", "30", "40", "5"]
    for row in named:
        scored = row["status"] == "scored"
        for column in ("log_likelihood_ratio", "embedding_distance", "scored_bases", "unknown_bases"):
            assert (row[column] != "NA") == scored
        if scored:
            strands = [float(row[f"log_likelihood_ratio_{strand}"]) for strand in ("forward", "reverse")]
            assert float(row["log_likelihood_ratio"]) == pytest.approx(sum(strands) / 2, abs=2e-5)
            assert float(row["log_likelihood_ratio"]) != 0
    assert "5 records, 7 alleles: 3 scored" in captured.err
    assert "1 reference_mismatch" in captured.err
    assert "do not have the reference's bases in REF" in captured.err
    assert "chr9" in captured.err


@pytest.mark.parametrize("name", ["out.vcf", "out.vcf.gz"])
def test_the_annotated_vcf_is_the_input_with_more_in_info(
    files: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files) == 0
    table = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert run(files, "--output", str(files / name)) == 0
    content = (files / name).read_bytes()
    text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    for line, before in zip(lines, RECORDS, strict=True):
        fields = before.rstrip("\n").split("\t")
        assert line[:7] == fields[:7]
        assert line[8:] == fields[8:]
    assert lines[0][7].startswith("AC=3;GENOMAMBA_LLR=")
    assert text.count("ID=GENOMAMBA_LLR") == 1
    with pysam.VariantFile(str(files / name)) as opened:
        found = list(opened)
        ratios = [value for one in found for value in one.info.get("GENOMAMBA_LLR", (None,))]
        statuses = [list(one.info["GENOMAMBA_STATUS"]) for one in found]
    assert statuses == STATUSES
    for ratio, row in zip(ratios, table, strict=True):
        assert (ratio is None) == (row[6] == "NA")
        if ratio is not None:
            assert ratio == pytest.approx(float(row[6]), rel=1e-5)


def test_names_of_another_style_need_a_map(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "other.vcf").write_text(HEADER + record(200, other(200), chromosome="1"))
    assert run(files, vcf="other.vcf") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "did you mean 'chr1'" in captured.err
    assert "--chromosome-map" in captured.err
    (files / "map.txt").write_text("1\tchr1\n")
    assert run(files, "--chromosome-map", str(files / "map.txt"), vcf="other.vcf") == 0
    assert capsys.readouterr().out.splitlines()[1].split("\t")[:6][5] == "scored"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "csv"), "--format is 'csv'"),
        (("--window", "3"), "the window is 3 bp"),
        (("--output", "/nowhere/x.tsv"), "there is no folder"),
    ],
)
def test_mistakes_are_one_sentence(
    files: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("genomamba: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_that_is_damaged_half_way_leaves_no_output(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "damaged.vcf").write_text(HEADER + "".join(RECORDS) + "chr1\tx\n")
    assert run(files, "--output", str(files / "out.tsv"), vcf="damaged.vcf") == 2
    assert "is damaged at record 6" in capsys.readouterr().err
    assert not [path for path in files.iterdir() if "out.tsv" in path.name]


@pytest.mark.parametrize("output_format", ["tsv", "vcf"])
def test_a_contig_of_another_length_is_of_another_assembly(
    files: Path, output_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """GATK refuses such files too: positions of one assembly are other bases in another."""
    text = (HEADER + record(200, other(200))).replace("length=300", "length=301").replace("chr9>", "chr9,length=7>")
    (files / "variants.vcf").write_text(text)
    assert run(files, "--format", output_format) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.count("\n") == 1
    assert "variants.vcf states 301 bp for 'chr1', which has 300 bp in" in said and "bcftools reheader" in said
    # Names are those of the reference.
    (files / "map.txt").write_text("1 chr1\n")
    (files / "variants.vcf").write_text(text.replace("chr1", "1"))
    assert run(files, "--chromosome-map", str(files / "map.txt")) == 2
    (files / "variants.vcf").write_text(text.replace("chr1", "1").replace("length=301", "length=300"))
    assert run(files, "--chromosome-map", str(files / "map.txt")) == 0  # that of chr9 has no variants
