"""Downloads from public archives: resumed, verified, and taken from the next mirror if one fails.

A file is written under a hidden name and renamed when its size and checksum are right, so that a file under its final
name is complete. The source and version of a partial file are recorded beside it: a resumed download never joins two
versions.
"""

from __future__ import annotations

import base64
import email.utils
import errno
import hashlib
import http.client
import json
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambacore.errors import InputError

BYTES_PER_READ = 1 << 20
TIMEOUT_SECONDS = 60.0
# Attempts at one mirror that brought nothing new, before the next mirror is asked.
FRUITLESS_ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 1.0
USER_AGENT = "genomamba (https://pypi.org/project/genomamba)"
HTTP_PARTIAL_CONTENT = 206
HTTP_RANGE_NOT_SATISFIABLE = 416
HTTP_TOO_MANY_REQUESTS = 429
HTTP_SERVER_ERROR = 500

Report = Callable[[int, int | None], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file in a public archive.

    Attributes:
        name: of the local file.
        urls: its addresses, the preferred one first.
        size: in bytes; `None` if the archive does not state it.
        checksum: `md5:...` or `sha256:...`; `None` when it is to be read from `checksum_list`, or when only the server
            may state it.
        checksum_list: address of a text of the archive with a line `CHECKSUM  FILE` for each of its files (md5).
    """

    name: str
    urls: tuple[str, ...]
    size: int | None = None
    checksum: str | None = None
    checksum_list: str | None = None


class _CutOffError(Exception):
    """The connection failed or was cut: worth another attempt."""


class _RefusedError(Exception):
    """The server refuses the file: try another mirror."""


def download(
    file: RemoteFile,
    folder: Path,
    report: Report = lambda done, total: None,
    *,
    pause_seconds: float = FIRST_PAUSE_SECONDS,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Path:
    """Download a file into a folder; a correct file already there is left alone.

    Args:
        file: name, addresses and checksum.
        folder: created if missing.
        report: called with the bytes so far and in total (`None`: unknown).
        pause_seconds: before the second attempt; doubled before each further one.
        timeout_seconds: silence after which a connection counts as cut.

    Returns:
        The file's path.

    Raises:
        InputError: no mirror provided the complete file, its checksum is wrong everywhere, or it cannot be written.
            The partial file is kept, and the next call continues it.
    """
    path = folder / file.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_present(file, path)
            report(path.stat().st_size, path.stat().st_size)
            return path
        reasons = []
        for url in file.urls:
            try:
                _from_mirror(file, url, path, report, pause_seconds, timeout_seconds)
                return path
            except (_CutOffError, _RefusedError) as reason:
                reasons.append(f"{urllib.parse.urlsplit(url).netloc}: {reason}")
    except OSError as error:
        remedy = "make room" if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} else "choose another folder"
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): {remedy} and run the same command again; the "
            "partial file is kept."
        ) from error
    raise InputError(
        f"{file.name} could not be fetched ({'; '.join(reasons)}): connect to the internet and run the same command "
        f"again, which resumes the download, or put the file from {file.urls[0]} into {folder} yourself."
    )


def stated_checksum(file: RemoteFile, timeout_seconds: float = TIMEOUT_SECONDS) -> str | None:
    """The checksum a file should have, from the archive's list where it is not known here.

    Raises:
        InputError: the list cannot be read or does not name the file.
    """
    if file.checksum is not None or file.checksum_list is None:
        return file.checksum
    try:
        with _opened(file.checksum_list, {}, timeout_seconds) as answer:
            text = answer.read().decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"the checksums of {file.name} cannot be read from {file.checksum_list} ({_reason(error)}): connect to the "
            "internet and run the same command again."
        ) from None
    wanted = {urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1]) for url in file.urls}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and words[1].lstrip("*").rsplit("/", 1)[-1] in wanted:
            return f"md5:{words[0].lower()}"
    raise InputError(
        f"{file.checksum_list} names no checksum of {file.name}: the archive has changed; fetch the file yourself."
    )


def file_checksum(path: Path, kind: str) -> str:
    """Checksum of a file as it is written in `RemoteFile.checksum`.

    Args:
        path: the file.
        kind: `md5` or `sha256`.
    """
    with path.open("rb") as stream:
        return f"{kind}:{hashlib.file_digest(stream, kind).hexdigest()}"


def _check_present(file: RemoteFile, path: Path) -> None:
    """Refuse to replace a file under the final name that is not the wanted one."""
    if not path.is_file():
        raise InputError(f"{path} is in the way: move it or choose another folder.")
    if file.size is not None and path.stat().st_size != file.size:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes and not {file.size:,}: remove it and run the same command again."
        )
    checksum = stated_checksum(file)
    if checksum is not None and file_checksum(path, checksum.partition(":")[0]) != checksum:
        raise InputError(f"{path} does not have the checksum {checksum}: remove it and run the same command again.")


def _from_mirror(
    file: RemoteFile, url: str, path: Path, report: Report, pause_seconds: float, timeout_seconds: float
) -> None:
    """Fetch the file from one mirror, with further attempts as long as the file grows."""
    partial = path.with_name(f".{path.name}.part")
    fruitless, damaged = 0, False
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _attempt(file, url, partial, report, timeout_seconds)
        except _CutOffError as reason:
            grown = partial.exists() and partial.stat().st_size > before
            fruitless = 0 if grown else fruitless + 1
            if fruitless >= FRUITLESS_ATTEMPTS:
                raise _CutOffError(f"{reason}, {FRUITLESS_ATTEMPTS} times in a row") from None
            time.sleep(pause_seconds * 2 ** max(0, fruitless - 1))
            continue
        checksum = stated_checksum(file, timeout_seconds) or _origin(partial).get("checksum")
        if checksum is None or file_checksum(partial, checksum.partition(":")[0]) == checksum:
            partial.replace(path)
            _origin_path(partial).unlink(missing_ok=True)
            return
        _forget(partial)
        if damaged:
            raise _RefusedError(f"the file came twice with another checksum than {checksum}")
        # The transfer or a proxy may have damaged a part: start over once.
        damaged = True


def _attempt(file: RemoteFile, url: str, partial: Path, report: Report, timeout_seconds: float) -> None:
    """One connection: append the missing part, or start over if the server cannot or must not resume."""
    present = partial.stat().st_size if partial.exists() else 0
    headers = _range_headers(file, url, partial, present)
    if "Range" not in headers:
        present = 0
    try:
        with _opened(url, headers, timeout_seconds) as answer:
            if answer.status != HTTP_PARTIAL_CONTENT:
                present = 0
            total = _total_size(answer, present)
            if file.size is not None and total is not None and total != file.size:
                raise _RefusedError(f"the file there has {total:,} bytes and not {file.size:,}")
            _check_room(partial, (total or present) - present)
            _write_origin(partial, url, answer)
            with partial.open("r+b" if present else "wb") as stream:
                stream.truncate(present)
                stream.seek(present)
                present = _copy(answer, stream, present, total, report)
    except urllib.error.HTTPError as error:
        if error.code == HTTP_RANGE_NOT_SATISFIABLE and present:
            if file.size == present or error.headers.get("Content-Range") == f"bytes */{present}":
                return
            _forget(partial)
            raise _CutOffError("the file there became shorter") from None
        passing = error.code == HTTP_TOO_MANY_REQUESTS or error.code >= HTTP_SERVER_ERROR
        raise (_CutOffError if passing else _RefusedError)(_reason(error)) from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _CutOffError(_reason(error)) from None
    if total is not None and present < total:
        raise _CutOffError(f"the connection was cut after {present:,} of {total:,} bytes")
    if file.size is not None and present != file.size:
        raise _CutOffError(f"the connection was cut after {present:,} of {file.size:,} bytes")


def _range_headers(file: RemoteFile, url: str, partial: Path, present: int) -> dict[str, str]:
    """Headers that request the rest of a partial file; none if it must be fetched from the start."""
    if not present:
        return {}
    rest = {"Range": f"bytes={present}-"}
    origin = _origin(partial)
    if origin.get("url") == url and "version" in origin:
        # The server sends the rest if the file is still of this version, else the whole file.
        return rest | {"If-Range": origin["version"]}
    # Another mirror may hold another build of the file under the same name; a checksum would tell.
    return rest if file.checksum is not None or file.checksum_list is not None else {}


def _copy(answer: Any, stream: Any, present: int, total: int | None, report: Report) -> int:
    """Append the answer; returns the size of the file then. After an error the file keeps what was read."""
    while True:
        try:
            block = answer.read(BYTES_PER_READ)
        except http.client.IncompleteRead as cut:
            block = cut.partial
            stream.write(block)
            report(present + len(block), total)
            raise
        if not block:
            return present
        stream.write(block)
        present += len(block)
        report(present, total)


def _opened(url: str, headers: dict[str, str], timeout_seconds: float) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"} | headers)
    return urllib.request.urlopen(request, timeout=timeout_seconds)


def _total_size(answer: Any, present: int) -> int | None:
    length = answer.headers.get("Content-Length")
    return int(length) + present if length is not None and length.isdigit() else None


def _check_room(partial: Path, missing: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if missing > free:
        raise InputError(
            f"{partial.parent} has room for {free:,} bytes and {missing:,} are missing: make room or choose another "
            "folder, and run the same command again."
        )


def _origin_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _origin(partial: Path) -> dict[str, str]:
    try:
        content = json.loads(_origin_path(partial).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_origin(partial: Path, url: str, answer: Any) -> None:
    """Record the source of the partial file and the version stated by the server."""
    content = {"url": url}
    tag, date = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    if tag is not None and not tag.startswith("W/"):
        content["version"] = tag
    elif date is not None and email.utils.parsedate_tz(date) is not None:
        content["version"] = date
    # Google's storage states a checksum of its files.
    hashes = dict(item.strip().partition("=")[::2] for item in (answer.headers.get("x-goog-hash") or "").split(","))
    if "md5" in hashes:
        content["checksum"] = f"md5:{base64.b64decode(hashes['md5']).hex()}"
    _origin_path(partial).write_text(json.dumps(content), encoding="utf-8")


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _origin_path(partial).unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        inner = error.reason
        return f"no connection, {getattr(inner, 'strerror', None) or inner}"
    if isinstance(error, TimeoutError):
        return "the server fell silent"
    return f"the connection was cut, {error or type(error).__name__}"
