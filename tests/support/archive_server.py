"""A small archive on this machine that misbehaves when told to: cuts, corrupts, redirects, refuses."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Archive:
    """What the server gives and how.

    Attributes:
        files: content by path.
        cuts: for each of the next answers, after how many bytes the connection is cut; `None` for not at all.
        corrupt: how many of the next answers have a wrong byte.
        redirects: where a path has moved to.
        statuses: for each of the next requests, a status to refuse it with.
        ranges: whether parts may be asked for.
        version: of all files; a part of another version is answered with the whole.
        headers: further headers of every answer.
        requests: path and `Range` of every request that came.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int | None] = field(default_factory=list)
    corrupt: int = 0
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    version: str = '"1"'
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def url(self, path: str) -> str:
        """Address of a path."""
        return f"{self.address}{path}"


@contextmanager
def archive_server() -> Iterator[Archive]:
    """Serve an archive inside."""
    archive = Archive()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            archive.requests.append((self.path, self.headers.get("Range")))
            if archive.statuses:
                self.send_error(archive.statuses.pop(0))
                return
            if self.path in archive.redirects:
                self.send_response(302)
                self.send_header("Location", archive.redirects[self.path])
                self.end_headers()
                return
            if self.path not in archive.files:
                self.send_error(404)
                return
            self._send(archive.files[self.path])

        def _send(self, content: bytes) -> None:
            start, status = 0, 200
            asked = self.headers.get("Range")
            same_version = self.headers.get("If-Range") in {None, archive.version}
            if asked is not None and archive.ranges and same_version:
                start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
            body = bytearray(content[start:])
            if archive.corrupt:
                archive.corrupt -= 1
                body[len(body) // 2] ^= 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for header in ({"ETag": archive.version} | archive.headers).items():
                self.send_header(*header)
            self.end_headers()
            cut = archive.cuts.pop(0) if archive.cuts else None
            self.wfile.write(bytes(body) if cut is None else bytes(body[:cut]))
            if cut is not None:
                self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    archive.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield archive
    finally:
        server.shutdown()
        server.server_close()
