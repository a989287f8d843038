"""Genomes named by options, lists and folders."""

from pathlib import Path

import pytest

from genomamba.data.genome_lists import parse_genome_option, read_genome_list, refuse_shared_files
from genomamba.data.genomes import GenomeSpecification
from mambacore.errors import InputError
from mambapipelines.cli.options import required_genomes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with genomes of several names, and the working directory."""
    for name in ("a/x.fna", "a/y.fa.gz", "a/.hidden.fa", "a/notes.txt", "b/z.fasta", "one,two.fa", "c.fa.zst"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b">r\nACGT\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "paths"),
    [
        ("k=a/x.fna", ("a/x.fna",)),
        ("k=a/*.fna", ("a/x.fna",)),
        ("k=a", ("a/x.fna", "a/y.fa.gz")),
        ("k=one,two.fa", ("one,two.fa",)),
        ("k=a/x.fna,one,two.fa,b/*", ("a/x.fna", "one,two.fa", "b/z.fasta")),
        ("k=-", ("-",)),
        ("k=missing.fa,other.fa", ("missing.fa", "other.fa")),
        ("k=a/x.fna,a/x.fna", ("a/x.fna",)),
        ("s__Escherichia coli=a/x.fna", ("a/x.fna",)),
    ],
)
def test_an_option_names_files_folders_and_patterns(place: Path, option: str, paths: tuple[str, ...]) -> None:
    assert parse_genome_option(option).paths == paths


@pytest.mark.parametrize(("option", "message"), [("k=a/*.zip", "no file matches"), ("k=.", "no sequence files")])
def test_a_name_without_files_is_refused(place: Path, option: str, message: str) -> None:
    (place / "one,two.fa").unlink()
    (place / "c.fa.zst").unlink()
    with pytest.raises(InputError, match=message):
        parse_genome_option(option)


@pytest.mark.parametrize("header", ["", "name\tpath\n", "\ufeffname\tpath\n", "# a comment\n\n"])
def test_a_list_is_relative_to_itself(place: Path, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    (place / "list.tsv").write_text(header + "s__Homo sapiens\ta/x.fna\nb\tb\ns__Homo sapiens\tone,two.fa\t\n")
    monkeypatch.chdir("/")
    assert read_genome_list(str(place / "list.tsv")) == [
        GenomeSpecification("s__Homo sapiens", (f"{place}/a/x.fna", f"{place}/one,two.fa")),
        GenomeSpecification("b", (f"{place}/b/z.fasta",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no genomes"),
        ("name\tpath\n", "has no genomes"),
        ("a\tb\tc\n", "line 1 is not a class name, a tab and a path"),
        ("a b\tx.fa\n../e\tx.fa\n", "line 2 has the class name"),
        ("a\n", "line 1 is not a class name, a tab and a path"),
        ("a\tx.fa,,y.fa\n", "empty path"),
    ],
)
def test_mistakes_in_a_list_are_named(place: Path, text: str, message: str) -> None:
    (place / "list.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_genome_list("list.tsv")


def test_a_folder_has_a_class_for_each_subfolder_or_file(place: Path) -> None:
    assert [(one.name, len(one.paths)) for one in read_genome_list(".")] == [("a", 2), ("b", 1)]
    assert [one.name for one in read_genome_list("a")] == ["x", "y"]


def test_one_file_is_not_two_classes(place: Path) -> None:
    (place / "link.fa").symlink_to(place / "a" / "x.fna")
    with pytest.raises(InputError, match="two classes, 'one' and 'two'"):
        required_genomes(["one=a", "two=link.fa"], None)
    refuse_shared_files([parse_genome_option("one=a"), parse_genome_option("two=b")])


def test_no_genome_is_said() -> None:
    with pytest.raises(InputError, match="--genomes LIST"):
        required_genomes(None, None)
