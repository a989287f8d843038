"""`genomamba fetch` and `audiomamba fetch` bring whole, checked data sets, or say in one line why not."""

import base64
import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from archive_server import Archive, archive_server
from audiomamba.data.clips import DIGITS, speech_commands_files
from genomamba.data.assemblies import SPECIES_PROTOCOLS
from mambapipelines.cli.audiomamba import main as audiomamba_cli
from mambapipelines.cli.genomamba import main as genomamba_cli
from mambapipelines.datasets import downloads, genomes, recordings
from mambapipelines.datasets.downloads import RemoteFile
from mambapipelines.datasets.fetch import DataSet, SetFile
from tiny_species import bases, fasta

GENOME = fasta({"chr1": bases(50_000)})


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)


@pytest.fixture
def archive():
    with archive_server() as server:
        yield server


@pytest.fixture
def small_set(archive: Archive, monkeypatch) -> Archive:
    """A set of two parts, of which one is decompressed."""
    content = gzip.compress(GENOME)
    archive.files |= {"/genome.fa.gz": content, "/rows.bed": b"chr1\t0\t100\ttrain\n"}
    checksum = f"md5:{hashlib.md5(content).hexdigest()}"
    remote = RemoteFile("genome.fa.gz", (archive.url("/genome.fa.gz"),), len(content), checksum)
    parts = {
        "genome": (SetFile(remote, ready="genome.fa", prepare=genomes.decompress),),
        "rows": (SetFile(RemoteFile("rows.bed", (archive.url("/rows.bed"),)), folder="intervals"),),
    }
    monkeypatch.setitem(genomes.DNA_SETS, "small", DataSet("small", "a small set", parts))
    return archive


def speech_archive(words: tuple[str, ...] = (*DIGITS, "bed"), lists: bool = True) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for word in words:
            for number in range(3):
                add(f"./{word}/{number}_nohash_0.wav", b"sound")
        add("../outside.wav", b"no")
        if lists:
            add("./validation_list.txt", b"one/1_nohash_0.wav\n")
            add("./testing_list.txt", b"one/2_nohash_0.wav\n")
    return stream.getvalue()


def serve_speech(archive: Archive, monkeypatch, content: bytes) -> None:
    archive.files["/speech.tar.gz"] = content
    remote = RemoteFile(
        "speech.tar.gz", (archive.url("/speech.tar.gz"),), checksum=f"sha256:{hashlib.sha256(content).hexdigest()}"
    )
    digits = (SetFile(remote, ready="sc09", prepare=recordings.extract_digits),)
    monkeypatch.setitem(recordings.AUDIO_SETS, "sc09", DataSet("sc09", "digits", {"digits": digits}))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_fetched_through_cuts_and_redirects_and_unpacked(small_set, tmp_path, capsys):
    small_set.cuts = [5000]
    small_set.files["/moved.bed"] = small_set.files.pop("/rows.bed")
    small_set.redirects["/rows.bed"] = small_set.url("/moved.bed")
    assert genomamba_cli.main(["fetch", "small", "--output", str(tmp_path / "data")]) == 0
    assert (tmp_path / "data" / "genome.fa").read_bytes() == GENOME
    assert names(tmp_path / "data") == {"genome.fa", "intervals/rows.bed"}
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["path", "bytes", "checksum"]
    assert rows[1][1:] == [str(len(GENOME)), f"md5:{hashlib.md5(GENOME).hexdigest()}"]
    assert [Path(row[0]).name for row in rows[1:]] == ["genome.fa", "rows.bed"]


def test_what_is_there_is_not_fetched_again_and_archives_are_kept_when_asked(small_set, tmp_path):
    arguments = ["fetch", "small", "--output", str(tmp_path), "--keep-archives"]
    assert genomamba_cli.main(arguments) == 0
    assert "genome.fa.gz" in names(tmp_path)
    asked = len(small_set.requests)
    assert genomamba_cli.main(arguments) == 0
    assert len(small_set.requests) == asked


def test_one_part_and_a_mirror(small_set, tmp_path):
    small_set.files["/mirror/intervals/rows.bed"] = b"from the mirror\n"
    arguments = [
        "fetch",
        "small",
        "--output",
        str(tmp_path),
        "--species",
        "rows",
        "--mirror",
        small_set.url("/mirror/"),
    ]
    assert genomamba_cli.main(arguments) == 0
    assert names(tmp_path) == {"intervals/rows.bed"}
    assert (tmp_path / "intervals" / "rows.bed").read_bytes() == b"from the mirror\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corrupt": 9}, "another checksum"),
        ({"statuses": [404]}, "404"),
        ({"cuts": [0] * 9}, "resumes the download"),
    ],
)
def test_what_cannot_be_fetched_is_told_in_one_line_and_leaves_nothing_under_its_name(
    small_set, tmp_path, capsys, change, words
):
    for name, value in change.items():
        setattr(small_set, name, value)
    assert genomamba_cli.main(["fetch", "small", "--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert not any(path.name in {"genome.fa", "genome.fa.gz"} for path in tmp_path.rglob("*"))


def test_an_unreachable_archive_says_what_to_do(small_set, tmp_path, monkeypatch, capsys):
    remote = RemoteFile("far.fa", ("http://127.0.0.1:9/far.fa",))
    monkeypatch.setitem(genomes.DNA_SETS, "small", DataSet("small", "", {"far": (SetFile(remote),)}))
    assert genomamba_cli.main(["fetch", "small", "--output", str(tmp_path)]) == 2
    assert "connect to the internet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["great-apse"], "did you mean great-apes"),
        (["hg38", "--species", "mouse"], "it has genome, intervals"),
        (["small", "--output", "a-file"], "is a file"),
        (["small", "--mirror", "somewhere"], "is not a web address"),
    ],
)
def test_mistakes_are_told_in_one_line(small_set, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("mine")
    assert genomamba_cli.main(["fetch", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1
    assert (tmp_path / "a-file").read_text() == "mine"


def test_a_damaged_archive_that_the_server_vouches_for_is_named(small_set, tmp_path, monkeypatch, capsys):
    small_set.files["/genome.fa.gz"] = gzip.compress(GENOME)[:-100]
    remote = RemoteFile("genome.fa.gz", (small_set.url("/genome.fa.gz"),))
    parts = {"genome": (SetFile(remote, ready="genome.fa", prepare=genomes.decompress),)}
    monkeypatch.setitem(genomes.DNA_SETS, "small", DataSet("small", "", parts))
    assert genomamba_cli.main(["fetch", "small", "--output", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert names(tmp_path) == {"genome.fa.gz"}


def test_a_checksum_that_the_storage_states_is_held_against_the_file(small_set, tmp_path):
    small_set.headers["x-goog-hash"] = f"crc32c=AAAA, md5={base64.b64encode(hashlib.md5(b'other').digest()).decode()}"
    assert genomamba_cli.main(["fetch", "small", "--output", str(tmp_path), "--species", "rows"]) == 2
    right = hashlib.md5(small_set.files["/rows.bed"]).digest()
    small_set.headers["x-goog-hash"] = f"crc32c=AAAA, md5={base64.b64encode(right).decode()}"
    assert genomamba_cli.main(["fetch", "small", "--output", str(tmp_path), "--species", "rows"]) == 0


def test_the_digits_are_taken_out_of_the_archive_and_nothing_else(archive, tmp_path, monkeypatch, capsys):
    serve_speech(archive, monkeypatch, speech_archive())
    (tmp_path / ".sc09.part").mkdir()
    (tmp_path / ".sc09.part" / "left-over.wav").write_bytes(b"")
    assert audiomamba_cli.main(["fetch", "sc09", "--output", str(tmp_path)]) == 0
    assert len(speech_commands_files(tmp_path / "sc09", "train")) == 28
    assert len(speech_commands_files(tmp_path / "sc09", "test")) == 1
    assert len(names(tmp_path)) == 32
    captured = capsys.readouterr()
    assert "32 files" in captured.out
    assert "published task has 38,908" in captured.err
    assert not (tmp_path.parent / "outside.wav").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (speech_archive(lists=False), "validation_list.txt"),
        (speech_archive(words=("one",)), "zero"),
        (b"no archive", "is damaged"),
        (speech_archive()[:-200], "is damaged"),
    ],
)
def test_an_archive_without_the_digits_leaves_no_folder(archive, tmp_path, monkeypatch, capsys, content, words):
    serve_speech(archive, monkeypatch, content)
    assert audiomamba_cli.main(["fetch", "sc09", "--output", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert names(tmp_path) == {"speech.tar.gz"}
    assert [path.name for path in tmp_path.iterdir()] == ["speech.tar.gz"]


@pytest.mark.parametrize("name", [*SPECIES_PROTOCOLS, "hg38"])
def test_the_listing_names_every_file_with_its_place(name, capsys):
    assert genomamba_cli.main(["fetch", name, "--list"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    files = [file for part in genomes.DNA_SETS[name].parts.values() for file in part]
    assert len(rows) == len(files) + 1
    assert all(row[3].startswith("https://") for row in rows[1:])
    assert len({row[0] for row in rows}) == len(rows)


def test_assemblies_lie_where_the_species_tasks_look_for_them():
    for protocol in SPECIES_PROTOCOLS.values():
        for assembly in protocol.assemblies:
            fetched = [
                Path("data") / file.folder / file.remote.name
                for file in genomes.DNA_SETS[protocol.name].parts[assembly.species]
            ]
            assert fetched == [assembly.path(Path("data"), file) for file in assembly.files]
