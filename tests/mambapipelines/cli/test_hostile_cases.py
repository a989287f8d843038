"""Inputs that are damaged, unusual or written to do harm: read as they are meant, or refused in one sentence.

Everything is generated here. A kind of input is tried in several spellings, because others of the same kind will come.
"""

import bz2
import gzip
import io
import json
import logging
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pytest
import torch
from safetensors.torch import load_file, save_file

from genomamba.data.genomes import GenomeSpecification, load_genomes
from genomamba.data.targets import TargetDescription, describe_targets, guess_kind
from genomamba.io.tables import assign_splits, read_class_folders, read_sequence_table
from genomamba.models.sequence_model import save_sequence_model, sequence_model_on
from mambacore.errors import InputError
from mambapipelines.cli.genomamba.main import main
from tiny_language_models import language_model, model_folder, write_fasta
from tiny_species import bases, write_tiny_model

DNA = bases(600).decode()
REFERENCE = b"ACGT" * 250 + b"R" + b"ACGT" * 250
VCF_HEADER = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "species")
    model_folder(folder / "causal", "causal")
    targets = TargetDescription("classes", ("kind",), ("a", "b"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sequences = sequence_model_on(language_model("causal"), targets, "mean", True).float()
    save_sequence_model(folder / "sequences", sequences, {})
    write_fasta(folder / "ref.fa", {"chr1": REFERENCE})
    return folder


class Run:
    """Runs a command in this process and keeps what it printed."""

    def __init__(self, capfdbinary: Any, caplog: pytest.LogCaptureFixture) -> None:
        self._capture, self._log = capfdbinary, caplog
        self.lines: list[str] = []
        self.said = ""

    def __call__(self, *arguments: object) -> int:
        self._capture.readouterr()
        self._log.clear()
        status = main([str(argument) for argument in arguments])
        printed, error = self._capture.readouterr()
        self.lines = printed.decode().splitlines()
        self.said = error.decode() + "\n".join(record.getMessage() for record in self._log.records)
        assert "Traceback" not in self.said
        return status


@pytest.fixture
def run(capfdbinary: Any, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    caplog.set_level(logging.WARNING)
    yield Run(capfdbinary, caplog)


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


RECORD = f">c1\n{DNA}\n".encode()
READABLE: dict[str, tuple[bytes, int, str]] = {
    # what, rows, what is said
    "stop": (f">c1\n{DNA}*\n>c2\n{DNA[:80]}\n".encode(), 2, "1 letter "),
    "x": (f">c1\n{DNA[:300]}XXxx{DNA[304:]}\n".encode(), 1, "4 letters"),
    "gaps": (f">c1\n{DNA[:300]}----{DNA[300:]}\n".encode(), 1, "4 letters"),
    "question marks": (f">c1\n??{DNA}\n".encode(), 1, "2 letters"),
    "dot in reads": (f"@r1\n{DNA[:50]}.{DNA[51:100]}\n+\n{'I' * 100}\n".encode(), 1, "1 letter "),
    "after gzip": (gzip.compress(RECORD) + b"left over by an upload", 1, "other bytes after"),
    "byte-order mark": (b"\xef\xbb\xbf" + RECORD, 1, ""),
    "blank before": (b"\n\n  " + RECORD, 1, ""),
    "bzip2": (bz2.compress(RECORD), 1, ""),
    "xz": (lzma.compress(RECORD), 1, ""),
    "mark in gzip": (gzip.compress(b"\xef\xbb\xbf" + RECORD), 1, ""),
    "old line ends": (RECORD.replace(b"\n", b"\r"), 1, ""),
}


@pytest.mark.parametrize(("content", "rows", "said"), READABLE.values(), ids=READABLE.keys())
def test_good_data_is_classified(content: bytes, rows: int, said: str, models: Path, tmp_path: Path, run: Run) -> None:
    assert run("classify", models / "species", put(tmp_path / "in", content)) == 0
    assert len(run.lines) == 1 + rows
    assert said in run.said


PROTEINS = (
    "MKVLAAGIVGLPQWERTYIPASDFGHKLCVNMEEQLLDRSTPWW",
    "MKVAAGXVGTDDHKSWRXX",
    "MAWKDSYRHVKW*",
    "mkvaagxvgtddhkswrxx",
)


@pytest.mark.parametrize("letters", PROTEINS)
def test_a_protein_is_refused_in_one_sentence(letters: str, models: Path, tmp_path: Path, run: Run) -> None:
    assert run("classify", models / "species", put(tmp_path / "p.fa", f">p\n{letters}\n")) == 2
    assert "protein" in run.said


@pytest.mark.parametrize("letters", ["N" * 500, "RYKM" * 50, "-" * 40, "n" * 20_000])
def test_a_record_without_a_known_base_has_no_class(letters: str, models: Path, tmp_path: Path, run: Run) -> None:
    path = put(tmp_path / "in.fa", f">masked\n{letters}\n>real\n{DNA}\n")
    assert (
        run("classify", models / "species", path, "--classified-out", tmp_path / "calls", "-o", tmp_path / "t.tsv") == 0
    )
    rows = [line.split("\t") for line in (tmp_path / "t.tsv").read_text().splitlines()]
    assert rows[1][2:] == ["unclassified"] + ["NA"] * (len(rows[0]) - 3)
    assert rows[2][2] not in ("unclassified", "NA")
    assert "1 unclassified" in run.said
    assert b"masked" not in b"".join(path.read_bytes() for path in (tmp_path / "calls").iterdir())


def rows_of(values: list[str], head: str = "sequence\ty", separator: str = "\t") -> str:
    random = np.random.default_rng(7)
    lines = [head.replace("\t", separator)]
    lines += [f"{''.join(random.choice(list('ACGT'), 60))}{separator}{value}" for value in values]
    return "\n".join(lines) + "\n"


NUMBERS = [f"{value:.3f}" for value in np.random.default_rng(1).normal(size=40)]
OUT_OF_PLACE = {
    "below detection": ([*NUMBERS[:39], "<0.01"], "'<0.01' in the column 'y' of line 41"),
    "infinite": ([*NUMBERS[:20], "inf", *NUMBERS[21:]], "'inf' in the column 'y' of line 22"),
    "minus infinite": (["-Infinity", *NUMBERS[1:]], "'-Infinity' in the column 'y' of line 2"),
    "decimal commas": ([value.replace(".", ",") for value in NUMBERS], "decimal comma"),
    "units": ([*NUMBERS[:39], "3 nM"], "'3 nM' in the column 'y' of line 41"),
    "names": ([f"sample {number}" for number in range(40)], "nearly all of its values are distinct"),
}


@pytest.mark.parametrize(("values", "message"), OUT_OF_PLACE.values(), ids=OUT_OF_PLACE.keys())
def test_a_value_out_of_place_never_makes_classes(values: list[str], message: str, tmp_path: Path) -> None:
    table = read_sequence_table(str(put(tmp_path / "t.tsv", rows_of(values))))
    with pytest.raises(InputError) as caught:
        guess_kind(table)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1.0", "0.0"] * 20, "classes"),
        (["-1", "1"] * 20, "classes"),
        (["-1.0", "1.0"] * 20, "classes"),
        (["3.0", "1.0", "2.0", "1"] * 10, "classes"),
        (["20.0", "50.0", "80.0"] * 13, "numbers"),
        (["0", "1", "2", "NA"] * 10, "classes"),
        (["a", "b"] * 20, "classes"),
        ([str(number * 13) for number in range(40)], "numbers"),
        (NUMBERS, "numbers"),
        ([*NUMBERS[:38], "nan", "NULL"], "numbers"),
    ],
)
def test_the_kind_of_labels_follows_from_all_values(values: list[str], kind: str, tmp_path: Path) -> None:
    assert guess_kind(read_sequence_table(str(put(tmp_path / "t.tsv", rows_of(values))))) == kind


def test_missing_values_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = read_sequence_table(str(put(tmp_path / "t.tsv", rows_of(["NA", "EU"] * 20))))
    assert "20 of 40 values of 'y' read as missing" in caplog.text
    with pytest.raises(InputError, match="20 values were read as missing"):
        describe_targets(table, ["train"] * 40, "classes")


def test_one_number_in_two_spellings_is_not_two_classes(tmp_path: Path) -> None:
    table = read_sequence_table(str(put(tmp_path / "t.tsv", rows_of(["1", "1.0", "0"] * 10))))
    with pytest.raises(InputError, match=r"'1' and '1\.0', which are the same number"):
        describe_targets(table, ["train"] * 30, "classes")


TABLES: dict[str, Callable[[str], str]] = {
    "pandas index": lambda text: "\n".join(
        line if not line else f"{number - 1 if number else ''}\t{line}" for number, line in enumerate(text.split("\n"))
    ),
    "names of rows by R": lambda text: "\n".join(
        line if not number or not line else f"r{number}\t{line}" for number, line in enumerate(text.split("\n"))
    ),
    "trailing tabs": lambda text: text.replace("\n", "\t\n"),
    "trailing tabs of rows": lambda text: text.replace("\n", "\t\n").replace("\t\n", "\n", 1),
    "trailing tab of the header": lambda text: text.replace("\n", "\t\n", 1),
    "semicolons": lambda text: text.replace("\t", ";"),
    "commas and a mark": lambda text: "\ufeff" + text.replace("\t", ","),
    "Sequence": lambda text: text.replace("sequence", "Sequence"),
    "SEQ": lambda text: text.replace("sequence", "SEQ"),
    "old line ends": lambda text: text.replace("\n", "\r"),
    "blank lines": lambda text: "\n\n" + text.replace("\n", "\n\n"),
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_tables_as_programs_write_them(
    change: Callable[[str], str], compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    text = rows_of(["a", "b"] * 4)
    plain = read_sequence_table(str(put(tmp_path / "plain.tsv", text)))
    table = read_sequence_table(str(put(tmp_path / "t", compress(change(text).encode()))))
    assert table.labels == plain.labels
    assert [tokens.tolist() for tokens in table.tokens] == [tokens.tolist() for tokens in plain.tokens]


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
def test_every_split_of_class_folders_is_read(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", name, "test", "extra"):
        for label in "ab":
            for number in range(3):
                put(tmp_path / part / label / f"{number}.txt", bases(30, number).decode())
    table = read_class_folders(tmp_path)
    splits = assign_splits(table, table.labels["class"], 0)
    assert {split: splits.count(split) for split in splits} == {"train": 6, "valid": 6, "test": 6}
    assert "extra" in caplog.text


def test_one_file_for_two_classes_is_noted(tmp_path: Path) -> None:
    one, copy, other = tmp_path / "a.fa", tmp_path / "copy.fa.gz", tmp_path / "b.fa"
    write_fasta(one, {"chr1": bases(900)})
    put(copy, gzip.compress(one.read_bytes()))
    write_fasta(other, {"chr1": bases(900, 1)})

    def notes(first: tuple[Path, ...], second: Path) -> str:
        classes = [GenomeSpecification("a", tuple(map(str, first))), GenomeSpecification("b", (str(second),))]
        return " ".join(load_genomes(classes).notes)

    assert "hold the same sequences" not in notes((one, one), other)
    for path in (one, copy):
        assert "hold the same sequences" in notes((one,), path)
    strain = tmp_path / "strain.fa"
    write_fasta(strain, {"chr1": bases(300, 2) + bases(900)[300:]})
    assert "hold the same sequences" not in notes((one,), strain)


@pytest.mark.parametrize("name", ["a\tb\nFAKE\t5\tu\t0.9", "a\rb", "\x1b[31mred", "a\u2028b\u200b"])
def test_a_name_forges_no_row(name: str, models: Path, tmp_path: Path, run: Run) -> None:
    path = put(tmp_path / "t.csv", f'name,sequence\n"{name}",{DNA[:60]}\nplain,{DNA[:60]}\n')
    assert run("predict", models / "sequences", path) == 0
    assert len(run.lines) == 3
    assert len({line.count("\t") for line in run.lines}) == 1
    assert all(line.isprintable() for line in "\n".join(run.lines).replace("\t", "\n").split("\n"))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_damaged_table_is_one_sentence(
    compress: Callable[[bytes], bytes], models: Path, tmp_path: Path, run: Run
) -> None:
    whole = compress(rows_of(["a", "b"] * 200).encode())
    for content in (whole[:-9], whole[: len(whole) // 2], whole[:40] + b"\0" * 30 + whole[70:]):
        assert run("predict", models / "sequences", put(tmp_path / "t.tsv", content)) == 2
        assert run.said.count("\n") == 1


@pytest.mark.parametrize("base", ["A", "G"])
def test_a_base_beside_its_ambiguity_code_is_scored(base: str, models: Path, tmp_path: Path, run: Run) -> None:
    vcf = put(tmp_path / "v.vcf", f"{VCF_HEADER}chr1\t1001\t.\t{base}\tT\t.\t.\t.\nchr1\t1001\t.\tC\tT\t.\t.\t.\n")
    assert run("score-variants", models / "causal", vcf, "--reference", models / "ref.fa", "--window", "64") == 0
    assert [line.split("\t")[5] for line in run.lines[1:]] == ["scored", "reference_mismatch"]


@pytest.mark.parametrize(
    "content", [b"", b"garbage\n", b"\0\1\2", b"\x1f\x8b", gzip.compress(b"", mtime=0), b"BCF\2\2oops"]
)
def test_standard_input_that_is_not_vcf_is_one_sentence(
    content: bytes, models: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert run("score-variants", models / "causal", "-", "--reference", models / "ref.fa", "--window", "64") == 2
    assert "standard input" in run.said
    assert run.said.count("\n") == 1


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_vcf_in_any_compression_and_with_a_mark(
    compress: Callable[[bytes], bytes], models: Path, tmp_path: Path, run: Run
) -> None:
    text = f"\ufeff{VCF_HEADER}chr1\t101\t.\tA\tC\t.\t.\t.\n".encode()
    vcf = put(tmp_path / "v", compress(text))
    assert run("score-variants", models / "causal", vcf, "--reference", models / "ref.fa", "--window", "64") == 0
    assert run.lines[1].split("\t")[5] == "scored"


BED = "chr1\t100\t200\nchr1\t300\t400\n"


@pytest.mark.parametrize(
    "content",
    [
        BED,
        "\ufeff" + BED,
        BED.replace("\n", "\r"),
        BED.replace("\n", "\r\n"),
        "chrom\tstart\tend\n" + BED,
        "#chrom\tchromStart\tchromEnd\n" + BED,
        "Chromosome Start End\n" + BED.replace("\t", " "),
    ],
)
def test_regions_however_they_are_written(content: str, models: Path, tmp_path: Path, run: Run) -> None:
    bed, output = put(tmp_path / "r.bed", content), tmp_path / "vectors.npz"
    assert run("embed", models / "causal", "--reference", models / "ref.fa", "--bed", bed, "--output", output) == 0
    assert np.load(output)["start"].tolist() == [100, 300]


def test_an_index_that_is_not_text_is_made_again(models: Path, tmp_path: Path, run: Run) -> None:
    reference = put(tmp_path / "ref.fa", (models / "ref.fa").read_bytes())
    put(tmp_path / "ref.fa.fai", b"\xff\xfe\xfd\n")
    bed, output = put(tmp_path / "r.bed", BED), tmp_path / "vectors.npz"
    assert run("embed", models / "causal", "--reference", reference, "--bed", bed, "--output", output) == 0


def damaged(source: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a species model with other settings in its configuration."""
    config = json.loads((source / "config.json").read_text())
    config["classifier"] |= settings
    put(folder / "config.json", json.dumps(config))
    put(folder / "model.safetensors", (source / "model.safetensors").read_bytes())
    return folder


SETTINGS: list[dict[str, Any]] = [
    {name: size}
    for name in ("layers", "model_width", "feature_width", "kernel_width", "step_rank", "state_size", "expansion")
    for size in (10**9, 10**30, -1, 1.5, "many", None, [1])
    if (name, size) != ("step_rank", None)
]
SETTINGS += [{"class_names": value} for value in (5, [], [[1]], ["../../victim", "b", "c"], ["a\tb", "b", "c"], {})]
SETTINGS += [{"mixer": value} for value in (7, ["selective"] * 5000, {"name": []}, "abacus")]
SETTINGS += [{"pooling": []}, {"context_widths": 3}, {"likelihood_weight": "x"}, {"likelihood_weight": float("nan")}]


def test_a_configuration_of_wrong_types_or_sizes_is_one_sentence(models: Path, tmp_path: Path, run: Run) -> None:
    reads = put(tmp_path / "r.fa", RECORD)
    for number, settings in enumerate(SETTINGS):
        folder = damaged(models / "species", tmp_path / f"m{number}", **settings)
        assert run("classify", folder, reads, "--classified-out", tmp_path / "calls") == 2, settings
        assert run.said.count("\n") == 1, settings
        assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"format_version": 1, "kind": ' + "[" * 200_000, "\ud800", "[]", "1e999"]
)
@pytest.mark.parametrize("command", ["classify", "embed", "predict"])
def test_a_configuration_that_is_no_configuration_is_one_sentence(
    text: str, command: str, models: Path, tmp_path: Path, run: Run
) -> None:
    folder = damaged(models / "species", tmp_path / "model")
    put(folder / "config.json", text.encode("utf-8", "surrogatepass"))
    output = ["--output", tmp_path / "v.npz"] if command == "embed" else []
    assert run(command, folder, put(tmp_path / "r.fa", RECORD), *output) == 2
    assert run.said.count("\n") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["species", "causal", "sequences"])
def test_weights_that_are_not_finite_are_refused(
    value: float, kind: str, models: Path, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "model"
    tensors = load_file(models / kind / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = value
    put(folder / "config.json", (models / kind / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    command = {"species": "classify", "causal": "embed", "sequences": "predict"}[kind]
    output = ["--output", tmp_path / "v.npz"] if command == "embed" else []
    assert run(command, folder, put(tmp_path / "r.fa", RECORD), *output) == 2
    assert "not finite" in run.said
    assert not (tmp_path / "v.npz").exists()


def test_reads_in_fastq_are_embedded_and_predicted(models: Path, tmp_path: Path, run: Run) -> None:
    reads = put(tmp_path / "r.fq", f"@r1/1\n{DNA[:40]}\n+\n{'I' * 40}\n@r1/2\n{DNA[40:90]}\n+\n{'I' * 50}\n")
    assert run("embed", models / "causal", reads, "--output", tmp_path / "v.npz") == 0
    assert np.load(tmp_path / "v.npz")["name"].tolist() == ["r1/1", "r1/2"]
    assert run("predict", models / "sequences", reads) == 0
    assert [line.split("\t")[0] for line in run.lines[1:]] == ["r1/1", "r1/2"]


@pytest.mark.parametrize("command", ["embed", "predict", "track", "score-variants", "generate"])
def test_a_model_that_computes_no_numbers_gives_no_results(
    command: str, models: Path, tmp_path: Path, run: Run
) -> None:
    """Its weights are finite, but what it computes overflows: vectors of NaN would look like vectors."""
    kind, folder, output = "sequences" if command == "predict" else "causal", tmp_path / "model", tmp_path / "out.npz"
    tensors = load_file(models / kind / "model.safetensors")
    loud = {name: 3e38 * tensor.sign() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    put(folder / "config.json", (models / kind / "config.json").read_bytes())
    save_file(loud, folder / "model.safetensors")
    reads, vcf = put(tmp_path / "r.fa", RECORD), put(tmp_path / "v.vcf", f"{VCF_HEADER}chr1\t101\t.\tA\tC\t.\t.\t.\n")
    reference = ("--reference", models / "ref.fa")
    arguments: dict[str, tuple[object, ...]] = {
        "embed": (reads, "--output", output),
        "predict": (reads, "--output", output),
        "track": (*reference, "--region", "chr1:1-50", "--output", output),
        "score-variants": (vcf, *reference, "--window", "64", "--output", output),
        "generate": ("--length", "20", "--output", output),
    }
    assert run(command, folder, *arguments[command]) == 2
    assert "that are not numbers (NaN)" in run.said and run.said.count("error") == 1
    assert not output.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_git_has_not_fetched_is_told(name: str, models: Path, tmp_path: Path, run: Run) -> None:
    folder = damaged(models / "species", tmp_path / "model")
    put(folder / name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert run("classify", folder, put(tmp_path / "r.fa", RECORD)) == 2
    assert f"{name} stands for a file that Git LFS has not fetched yet: run `git lfs pull`" in run.said


def test_a_compressed_vcf_without_its_last_block_is_cut_off(models: Path, tmp_path: Path, run: Run) -> None:
    with pysam.BGZFile(str(tmp_path / "v.vcf.gz"), "wb") as stream:
        stream.write(f"{VCF_HEADER}chr1\t101\t.\tA\tC\t.\t.\t.\n".encode())
    whole = (tmp_path / "v.vcf.gz").read_bytes()
    vcf = put(tmp_path / "v.vcf.gz", whole[:-28])  # the length of the empty block at the end
    assert run("score-variants", models / "causal", vcf, "--reference", models / "ref.fa", "--window", "64") == 2
    assert "is cut off" in run.said
