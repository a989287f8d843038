"""What other programs read of ours: BIOM, AnnData, VCF in bcftools, bigWig and IGV's sessions, MultiQC."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from mambapipelines.cli.genomamba.main import main
from tiny_language_models import model_folder, random_letters, write_fasta
from tiny_species import CLASS_NAMES, bases, fasta, write_tiny_model

GENOME = {"chr1": random_letters(900, 1), "chr2": random_letters(400, 2)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interchange")
    write_tiny_model(place / "species")
    model_folder(place / "language", "causal")
    for name, seed in (("a.fa", 0), ("b.fa", 5)):
        (place / name).write_bytes(fasta({f"r{k}": bases(200, seed + k) for k in range(4)} | {"n": b"NNNN"}))
    write_fasta(place / "genome.fa", GENOME)
    return place


@pytest.fixture(scope="module")
def classified(place: Path) -> Path:
    inputs = [str(place / name) for name in ("a.fa", "b.fa")]
    names = {"-o": "calls.tsv", "--biom": "calls.biom", "--multiqc": "calls_mqc.tsv"}
    outputs = [word for option, name in names.items() for word in (option, str(place / name))]
    assert main(["classify", str(place / "species"), *inputs, "-q", *outputs]) == 0
    return place


def counts_of_table(place: Path) -> dict[str, int]:
    calls = [line.split("\t")[2] for line in (place / "calls.tsv").read_text().splitlines()[1:]]
    return {call: calls.count(call) for call in [*CLASS_NAMES, "unknown", "unclassified"]}


def test_the_biom_table_has_the_counts_of_the_calls(classified: Path) -> None:
    document = json.loads((classified / "calls.biom").read_text())
    assert [column["id"] for column in document["columns"]] == ["a.fa", "b.fa"]
    dense = np.zeros(document["shape"], dtype=int)
    for row, column, value in document["data"]:
        dense[row, column] = value
    rows = [row["id"] for row in document["rows"]]
    assert dict(zip(rows, dense.sum(1).tolist(), strict=True)) == counts_of_table(classified)


def test_biom_format_reads_it(classified: Path) -> None:
    biom = pytest.importorskip("biom", reason="biom-format is not installed")
    table = biom.load_table(str(classified / "calls.biom"))
    sums = dict(zip(table.ids("observation"), table.sum("observation").astype(int).tolist(), strict=True))
    assert sums == counts_of_table(classified)


@pytest.mark.slow
def test_multiqc_reads_the_summary(classified: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("multiqc") is None:
        pytest.skip("multiqc is not installed: pip install 'genomamba[workflow]'")
    subprocess.run(
        [sys.executable, "-m", "multiqc", "--quiet", "--outdir", str(tmp_path), str(classified / "calls_mqc.tsv")],
        check=True,
    )
    assert "genomamba classify" in (tmp_path / "multiqc_report.html").read_text(encoding="utf-8")


def test_anndata_has_the_vectors_and_how_they_were_made(place: Path) -> None:
    anndata = pytest.importorskip("anndata")
    output = place / "windows.h5ad"
    arguments = ["embed", str(place / "language"), str(place / "genome.fa"), "-w", "300", "--both-strands", "-q"]
    assert main([*arguments, "-o", str(output)]) == 0
    data = anndata.read_h5ad(output)
    assert data.X.shape == (5, 8)
    assert data.obs["start"].tolist() == [0, 300, 600, 0, 300]
    stated = data.uns["genomamba"]
    assert (stated["pooling"], stated["strands"], stated["window_bp"]) == ("mean", "both", 300)
    assert stated["model"] == str(place / "language")


@pytest.mark.skipif(shutil.which("bcftools") is None, reason="bcftools is not installed")
def test_bcftools_reads_the_annotations(place: Path) -> None:
    pytest.importorskip("pysam")
    rows = ["##fileformat=VCFv4.2", f"##contig=<ID=chr1,length={len(GENOME['chr1'])}>"]
    rows.append("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO")
    for position in (300, 500):
        reference = chr(GENOME["chr1"][position - 1])
        others = [base for base in "ACGT" if base != reference]
        rows.append(f"chr1\t{position}\t.\t{reference}\t{others[0]},{others[1]}\t.\t.\t.")
    (place / "in.vcf").write_text("\n".join(rows) + "\n")
    output = place / "scored.vcf.gz"
    arguments = ["score-variants", str(place / "language"), str(place / "in.vcf"), "-r", str(place / "genome.fa"), "-q"]
    assert main([*arguments, "-w", "128", "-o", str(output)]) == 0
    assert main([*arguments, "-w", "128", "-o", str(place / "scores.tsv")]) == 0
    subprocess.run(["bcftools", "index", str(output)], check=True)
    template = "%POS\\t%INFO/GENOMAMBA_LLR\\t%INFO/GENOMAMBA_STATUS\\n"
    asked = subprocess.run(
        ["bcftools", "query", "-r", "chr1:400-600", "-f", template, str(output)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stderr == ""
    position, ratios, status = asked.stdout.split()
    assert (position, status) == ("500", "scored,scored")
    table = [line.split("\t") for line in (place / "scores.tsv").read_text().splitlines()]
    column = table[0].index("log_likelihood_ratio")
    expected = [float(row[column]) for row in table[1:] if row[1] == "500"]
    np.testing.assert_allclose([float(ratio) for ratio in ratios.split(",")], expected, rtol=1e-3, atol=1e-4)


def test_pybigwig_reads_the_track_and_the_session_leads_to_it(place: Path) -> None:
    big_wig = pytest.importorskip("pyBigWig")
    output, session = place / "tracks" / "genome.bw", place / "session.xml"
    output.parent.mkdir()
    arguments = ["track", str(place / "language"), "-r", str(place / "genome.fa"), "-q", "--region", "chr1:101-300"]
    assert main([*arguments, "-o", str(output), "--igv-session", str(session)]) == 0
    with big_wig.open(str(output)) as opened:
        assert opened.chroms() == {name: len(letters) for name, letters in GENOME.items()}
        values = np.array(opened.values("chr1", 100, 300))
        assert np.isfinite(values).all() and (values < 0).all()
        assert opened.intervals("chr1", 0, 100) is None
    root = ElementTree.parse(session).getroot()
    assert root.get("locus") == "chr1:101-300"
    resource = root.find("Resources/Resource")
    assert resource is not None and resource.get("type") == "bigwig"
    assert (place / str(resource.get("path"))).resolve() == output.resolve()
    assert (place / str(root.get("genome"))).resolve() == (place / "genome.fa").resolve()
    assert root.find("Panel/Track").get("id") == resource.get("path")


def test_a_session_needs_a_track_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["track", str(place / "language"), "-r", str(place / "genome.fa")]
    assert main([*arguments, "--igv-session", str(place / "s.xml")]) == 2
    assert "--igv-session opens the file of --output" in capsys.readouterr().err
