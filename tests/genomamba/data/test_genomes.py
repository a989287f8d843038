"""Genomes: the option, the files, random access that equals reading, hold-outs, and sentences for mistakes."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from genomamba.data.genome_lists import parse_genome_option
from genomamba.data.genomes import (
    GenomeCollection,
    GenomeSpecification,
    IndexedStore,
    MemoryStore,
    load_genomes,
    require_training_classes,
)
from genomamba.io import reference_index
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

TOKENIZER = CharacterTokenizer()
RANDOM = np.random.default_rng(1)
LETTERS = {
    name: RANDOM.choice(list("ACGTacgtNR"), size=length).astype("S1").tobytes()
    for name, length in (("chrI", 1000), ("chrII", 61), ("chrIII", 60), ("short", 7))
}


def fasta_text(width: int = 60, line_end: bytes = b"\n") -> bytes:
    lines = []
    for name, letters in LETTERS.items():
        lines.append(b">" + name.encode() + b" described")
        lines += [letters[start : start + width] for start in range(0, len(letters), width)]
    return line_end.join(lines) + line_end


def load_one(path: Path | str) -> GenomeCollection:
    return load_genomes([GenomeSpecification("yeast", (str(path),))])


def assert_same_as_letters(collection: GenomeCollection) -> None:
    assert {sequence.name: sequence.length for sequence in collection.sequences} == {
        name: len(letters) for name, letters in LETTERS.items()
    }
    for sequence in collection.sequences:
        expected = TOKENIZER.encode(LETTERS[sequence.name])
        for start, end in [(0, sequence.length), (0, 0), (3, 7), (sequence.length - 1, sequence.length), (5, 5)]:
            np.testing.assert_array_equal(sequence.tokens(start, end), expected[start:end])
        for start in range(0, sequence.length, 37):
            np.testing.assert_array_equal(sequence.tokens(start, sequence.length), expected[start:])


def in_memory(**lengths_by_class: dict[str, int]) -> GenomeCollection:
    return GenomeCollection.from_tokens(
        {
            class_name: {name: np.full(length, 7, dtype=np.uint8) for name, length in lengths.items()}
            for class_name, lengths in lengths_by_class.items()
        }
    )


def test_an_option_is_a_name_and_its_paths() -> None:
    assert parse_genome_option("S.cer-1_x=a.fa,b=c.fa,-") == GenomeSpecification("S.cer-1_x", ("a.fa", "b=c.fa", "-"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("yeast.fa", "has no '='"),
        ("=a.fa", "class name ''"),
        ("my  yeast=a.fa", "class name 'my  yeast'"),
        ("a/b=a.fa", "class name 'a/b'"),
        ("yeast=", "empty path"),
        ("yeast=a.fa,,b.fa", "empty path"),
        ("yeast=a.fa,", "empty path"),
        ("unclassified=a.fa", "choose another"),
    ],
)
def test_a_malformed_option_is_refused(option: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_genome_option(option)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("width", [1, 60, 5000])
def test_random_access_to_a_plain_file_equals_reading_it(width: int, line_end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text(width, line_end))
    collection = load_one(path)
    assert isinstance(collection.sequences[0].store, IndexedStore)
    assert_same_as_letters(collection)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["genome.fa", "genome.fa.fai"]


UNEVEN = {
    "uneven lines": b">a\nACGT\nAC\nACGTACGT\n",
    "blanks in lines": b">a\nAC GT\nAC GT\nAC\n",
    "blank line inside": b">a\nACGT\n\nACGT\nAC\n",
    "old Mac line ends": b">a\rACGT\rACGTAC\r",
    "no name": b">\nACGTACGTAC\n",
}


@pytest.mark.parametrize("content", UNEVEN.values(), ids=UNEVEN.keys())
def test_files_that_no_index_describes_are_read_all_the_same(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(content)
    (sequence,) = load_one(path).sequences
    expected = TOKENIZER.encode(content.replace(b">a", b"").translate(None, b"> \r\n"))
    np.testing.assert_array_equal(sequence.tokens(0, sequence.length), expected)
    np.testing.assert_array_equal(sequence.tokens(3, 6), expected[3:6])


def test_a_plain_file_with_the_name_of_a_gzip_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(fasta_text())
    assert_same_as_letters(load_one(path))


def test_gzip_and_standard_input_are_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(gzip.compress(fasta_text()))
    assert_same_as_letters(load_one(path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(fasta_text())))
    collection = load_one("-")
    assert isinstance(collection.sequences[0].store, MemoryStore)
    assert_same_as_letters(collection)


def test_a_folder_that_is_not_writable_gets_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data" / "genome.fa"
    path.parent.mkdir()
    path.write_bytes(fasta_text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    can_write_in = reference_index._can_write_in
    monkeypatch.setattr(reference_index, "_can_write_in", lambda at: at != path.parent and can_write_in(at))
    collection = load_one(path)
    assert isinstance(collection.sequences[0].store, IndexedStore)
    assert_same_as_letters(collection)
    assert [entry.name for entry in path.parent.iterdir()] == ["genome.fa"]


def test_a_genome_that_can_be_indexed_nowhere_is_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text())
    monkeypatch.setattr(reference_index, "_can_write_in", lambda at: False)
    collection = load_one(path)
    assert isinstance(collection.sequences[0].store, MemoryStore)
    assert_same_as_letters(collection)


def test_a_stale_or_broken_index_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text())
    shifted = "".join(f"{name}\t{len(letters)}\t3\t60\t61\n" for name, letters in LETTERS.items())
    for wrong in ("chrI\t5\t6\t60\t61\n", "rubbish", "", shifted):
        index = Path(f"{path}.fai")
        index.write_text(wrong)
        os.utime(index, (2e9, 2e9))
        assert_same_as_letters(load_one(path))
        assert index.read_text().startswith("chrI\t1000\t")


def _tokens_in_worker(collection: GenomeCollection) -> list[list[int]]:
    return [sequence.tokens(0, sequence.length).tolist() for sequence in collection.sequences]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_processes_read_at_the_same_time_without_disturbing_each_other(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text(width=10))
    collection = load_one(path)
    expected = _tokens_in_worker(collection)  # opens the parent's handle before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(_tokens_in_worker, [collection] * 20)
    assert all(result == expected for result in results)


def _load_at_once(arguments: tuple[str, float]) -> bool:
    path, start_time = arguments
    time.sleep(max(0.0, start_time - time.time()))
    assert_same_as_letters(load_one(Path(path)))
    return True


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_eight_processes_that_use_a_genome_first_at_the_same_time_all_get_it_right(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text(width=10))
    with multiprocessing.get_context("fork").Pool(8) as pool:
        assert all(pool.map(_load_at_once, [(str(path), time.time() + 0.3)] * 8, chunksize=1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["genome.fa", "genome.fa.fai"]


def test_a_forked_store_does_not_use_the_handle_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text())
    store = load_one(path).sequences[0].store
    assert isinstance(store, IndexedStore)
    store.fetch("chrI", 0, 5)
    handle = store.reference._handle
    store.fetch("chrI", 0, 5)
    assert store.reference._handle is handle
    monkeypatch.setattr(os, "getpid", lambda: 1)
    store.fetch("chrI", 0, 5)
    assert store.reference._handle is not handle


def test_a_collection_survives_pickling(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text())
    collection = load_one(path)
    collection.sequences[0].tokens(0, 3)
    assert_same_as_letters(pickle.loads(pickle.dumps(collection)))


def test_tokens_are_a_copy() -> None:
    (sequence,) = in_memory(a={"one": 5}).sequences
    sequence.tokens(0, 5)[:] = 0
    assert sequence.tokens(0, 5).tolist() == [7] * 5


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 6), (4, 3)])
def test_intervals_outside_the_sequence_are_errors(start: int, end: int) -> None:
    (sequence,) = in_memory(a={"one": 5}).sequences
    with pytest.raises(ValueError, match="does not lie within"):
        sequence.tokens(start, end)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b">p\nMKVLA\n", "protein"),
        (b"", "is empty"),
        (b"ACGT\n", "put a header line"),
    ],
)
def test_bad_files_are_refused(pack: type, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(pack(content))
    with pytest.raises(InputError, match=message) as caught:
        load_one(path)
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["genome.fa"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_records_of_one_name_are_numbered_and_that_is_said(pack: type, tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(pack(b">a\nAA\n>a.2\nC\n>a again\nGGG\n>b\nT\n>a\nTT\n"))
    collection = load_one(path)
    names = {sequence.name: sequence.tokens(0, sequence.length).tolist() for sequence in collection.sequences}
    assert names == {"a": [7, 7], "a.2": [8], "a.3": [9, 9, 9], "b": [10], "a.4": [10, 10]}
    assert len(collection.notes) == 1 and str(path) in collection.notes[0] and "numbered" in collection.notes[0]


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_one(tmp_path / "none.fa")
    with pytest.raises(InputError, match="is a directory"):
        load_one(tmp_path)


def test_the_same_record_name_in_two_files_of_a_class_is_fine(tmp_path: Path) -> None:
    for strain in ("a", "b"):
        (tmp_path / f"{strain}.fa").write_bytes(fasta_text())
    collection = load_genomes([GenomeSpecification("y", (str(tmp_path / "a.fa"), str(tmp_path / "b.fa")))])
    assert len(collection.sequences_of("y")) == 2 * len(LETTERS)


def test_a_class_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(fasta_text())
    specification = GenomeSpecification("y", (str(tmp_path / "a.fa"),))
    with pytest.raises(InputError, match="names the class 'y' twice"):
        load_genomes([specification, specification])


def test_one_class_loads_but_does_not_train() -> None:
    with pytest.raises(InputError, match="at least two classes, only 'a'"):
        require_training_classes(in_memory(a={"one": 5}))
    with pytest.raises(InputError, match="none is given"):
        require_training_classes(in_memory())
    require_training_classes(in_memory(a={"one": 5}, b={"one": 5}))


def test_a_split_holds_out_whole_records_of_every_class_by_exact_name() -> None:
    collection = in_memory(z={"chrI": 1, "chrII": 2, "chrIII": 3}, a={"chrI": 4, "chrII": 5})
    training, held_out = collection.split(["chrI"])
    assert training.class_names == held_out.class_names == ("z", "a")
    assert [(s.class_name, s.name) for s in training.sequences] == [("z", "chrII"), ("z", "chrIII"), ("a", "chrII")]
    assert [(s.class_name, s.name) for s in held_out.sequences] == [("z", "chrI"), ("a", "chrI")]
    everything, nothing = collection.split([])
    assert everything == collection
    assert nothing.class_names == ("z", "a")
    assert nothing.sequences == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["chrVIl"], "named 'chrVIl' .*did you mean .*'chrVII'"),
        (["chrVII", "zzz"], "named 'zzz' .*the names are chrI, chrVII"),
        (["chrVII", "chrI"], "class 'a' has no sequences left"),
        (["extra"], "class 'a' has no sequence named 'extra' to hold out"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(names: list[str], message: str) -> None:
    collection = in_memory(a={"chrI": 1, "chrVII": 1}, b={"chrI": 1, "chrVII": 1, "extra": 1})
    with pytest.raises(InputError, match=message):
        collection.split(names)


def test_the_manifest_is_json_and_lists_every_sequence(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text())
    manifest = load_one(path).manifest()
    assert json.loads(json.dumps(manifest)) == [
        {
            "class": "yeast",
            "path": str(path),
            "sequences": [{"name": name, "length": len(letters)} for name, letters in LETTERS.items()],
        }
    ]
