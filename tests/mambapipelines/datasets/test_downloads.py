"""Downloads survive what networks do, and never leave a file under its name that is not the one wanted."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from archive_server import Archive, archive_server
from mambacore.errors import InputError
from mambapipelines.datasets import downloads
from mambapipelines.datasets.downloads import RemoteFile, download

CONTENT = np.random.default_rng(3).bytes(300_000)
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def archive():
    with archive_server() as server:
        server.files["/genome.fa.gz"] = CONTENT
        yield server


def remote(archive: Archive, path: str = "/genome.fa.gz", **known: object) -> RemoteFile:
    known = {"size": len(CONTENT), "checksum": CHECKSUM} | known
    return RemoteFile("genome.fa.gz", (archive.url(path),), **known)


def fetch(file: RemoteFile, folder: Path) -> Path:
    return download(file, folder, pause_seconds=0.001, timeout_seconds=5)


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def test_a_file_arrives_whole_and_is_not_fetched_twice(archive, tmp_path):
    counts: list[tuple[int, int | None]] = []
    path = download(remote(archive), tmp_path / "new", lambda done, total: counts.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert counts[-1] == (len(CONTENT), len(CONTENT))
    assert entries(tmp_path / "new") == {"genome.fa.gz"}
    fetch(remote(archive), tmp_path / "new")
    assert len(archive.requests) == 1


def test_a_connection_that_is_cut_is_taken_up_where_it_ended(archive, tmp_path):
    archive.cuts = [100_000, 50_000, 1]
    assert fetch(remote(archive), tmp_path).read_bytes() == CONTENT
    assert [part for _, part in archive.requests] == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]


def test_a_later_call_goes_on_with_what_an_earlier_one_brought(archive, tmp_path):
    archive.cuts = [120_000] + [0] * downloads.FRUITLESS_ATTEMPTS
    with pytest.raises(InputError, match="resumes the download"):
        fetch(remote(archive), tmp_path)
    assert "genome.fa.gz" not in entries(tmp_path)
    archive.cuts, archive.requests = [], []
    assert fetch(remote(archive), tmp_path).read_bytes() == CONTENT
    assert [part for _, part in archive.requests] == ["bytes=120000-"]
    assert entries(tmp_path) == {"genome.fa.gz"}


def test_a_file_that_changed_in_between_is_fetched_from_the_start(archive, tmp_path):
    archive.cuts = [120_000] + [0] * downloads.FRUITLESS_ATTEMPTS
    unchecked = remote(archive, size=None, checksum=None)
    with pytest.raises(InputError):
        fetch(unchecked, tmp_path)
    newer = CONTENT[::-1]
    archive.cuts, archive.version, archive.files["/genome.fa.gz"] = [], '"2"', newer
    assert fetch(unchecked, tmp_path).read_bytes() == newer


def test_a_server_without_ranges_is_asked_for_the_whole_file(archive, tmp_path):
    archive.ranges, archive.cuts = False, [100_000]
    assert fetch(remote(archive), tmp_path).read_bytes() == CONTENT


def test_a_corrupted_file_is_fetched_once_more(archive, tmp_path):
    archive.corrupt = 1
    assert fetch(remote(archive), tmp_path).read_bytes() == CONTENT
    assert len(archive.requests) == 2


def test_a_file_that_stays_corrupted_is_refused_and_not_kept(archive, tmp_path):
    archive.corrupt = 9
    with pytest.raises(InputError, match="came twice with another checksum"):
        fetch(remote(archive), tmp_path)
    assert entries(tmp_path) == set()


def test_redirects_are_followed(archive, tmp_path):
    archive.redirects["/old.fa.gz"] = archive.url("/genome.fa.gz")
    assert fetch(remote(archive, "/old.fa.gz"), tmp_path).read_bytes() == CONTENT


def test_the_next_mirror_is_asked_and_goes_on(archive, tmp_path):
    archive.files["/mirror.fa.gz"] = CONTENT
    archive.cuts = [70_000] + [0] * downloads.FRUITLESS_ATTEMPTS
    file = RemoteFile(
        "genome.fa.gz", (archive.url("/genome.fa.gz"), archive.url("/mirror.fa.gz")), len(CONTENT), CHECKSUM
    )
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert archive.requests[-1] == ("/mirror.fa.gz", "bytes=70000-")


def test_parts_of_two_mirrors_are_not_joined_without_a_checksum(archive, tmp_path):
    archive.files["/mirror.fa.gz"] = CONTENT[::-1]
    archive.cuts = [70_000] + [0] * downloads.FRUITLESS_ATTEMPTS
    file = RemoteFile("genome.fa.gz", (archive.url("/genome.fa.gz"), archive.url("/mirror.fa.gz")))
    assert fetch(file, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(archive, tmp_path):
    archive.statuses = [503, 429]
    assert fetch(remote(archive), tmp_path).read_bytes() == CONTENT
    archive.requests = []
    with pytest.raises(InputError, match="404"):
        fetch(remote(archive, "/nowhere.fa.gz"), tmp_path / "other")
    assert len(archive.requests) == 1


def test_the_checksum_is_read_from_the_archives_list(archive, tmp_path):
    archive.files["/md5sum.txt"] = f"{hashlib.md5(CONTENT).hexdigest()}  ./genome.fa.gz\n".encode()
    listed = remote(archive, checksum=None, checksum_list=archive.url("/md5sum.txt"))
    assert fetch(listed, tmp_path / "right").read_bytes() == CONTENT
    archive.files["/md5sum.txt"] = f"{'0' * 32}  genome.fa.gz\n".encode()
    with pytest.raises(InputError, match="another checksum"):
        fetch(listed, tmp_path / "wrong")
    archive.files["/md5sum.txt"] = b"nothing of use\n"
    with pytest.raises(InputError, match="names no checksum"):
        fetch(listed, tmp_path / "unlisted")


def test_an_unreachable_archive_is_named_with_what_to_do(tmp_path):
    file = RemoteFile("genome.fa.gz", ("http://127.0.0.1:9/genome.fa.gz",))
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9.*connect to the internet.*yourself"):
        fetch(file, tmp_path)


def test_a_file_of_another_size_is_not_taken(archive, tmp_path):
    with pytest.raises(InputError, match=r"300,000 bytes and not 5"):
        fetch(remote(archive, size=5), tmp_path)


def test_what_is_in_the_way_is_neither_trusted_nor_removed(archive, tmp_path):
    (tmp_path / "genome.fa.gz").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(InputError, match="remove it"):
        fetch(remote(archive), tmp_path)
    (tmp_path / "genome.fa.gz").write_bytes(b"mine")
    with pytest.raises(InputError, match="has 4 bytes"):
        fetch(remote(archive), tmp_path)
    assert (tmp_path / "genome.fa.gz").read_bytes() == b"mine"


def test_a_full_disk_is_seen_before_and_during_the_download(archive, tmp_path, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(downloads.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(InputError, match="room for 10 bytes"):
            fetch(remote(archive), tmp_path / "before")

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_copy", full)
    with pytest.raises(InputError, match="make room"):
        fetch(remote(archive), tmp_path / "during")
    assert "genome.fa.gz" not in entries(tmp_path / "during")
