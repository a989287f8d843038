"""A local page answers its own browser window, and neither other sites nor other names of the machine."""

import asyncio
import http.client
import urllib.parse

import pytest

from mambapipelines.apps.origin import FORBIDDEN, SameOriginOnly, is_loopback
from mambapipelines.apps.server import load_gradio, serve

OWN = "127.0.0.1:7860"


def allows(address: str, /, **headers: str) -> bool:
    return SameOriginOnly(None, address).allows({name: [value] for name, value in headers.items()})


@pytest.mark.parametrize("name", [OWN, "localhost:7860", "[::1]:7860", "LOCALHOST", "127.0.0.2:80"])
def test_loopback_names_are_answered(name: str) -> None:
    assert allows("127.0.0.1", host=name)
    assert allows("127.0.0.1", host=name, origin=f"http://{name}")


@pytest.mark.parametrize(
    "name",
    ["evil.example", "127.0.0.1.evil.example:7860", "192.168.1.2:7860", "", "[", "a b", "localhost.evil.example"],
)
def test_other_names_are_refused(name: str) -> None:
    assert not allows("127.0.0.1", host=name)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:8000", "http://localhost:7860", "https://evil/127.0.0.1:7860"],
)
def test_other_origins_are_refused(origin: str) -> None:
    assert not allows("127.0.0.1", host=OWN, origin=origin)


def test_the_address_of_host_is_answered_and_a_wildcard_takes_addresses_but_no_foreign_names() -> None:
    assert allows("192.168.1.2", host="192.168.1.2:7860")
    assert not allows("192.168.1.2", host="192.168.1.3:7860")
    assert allows("0.0.0.0", host="192.168.1.2:7860")
    assert not allows("0.0.0.0", host="evil.example:7860")


def test_a_request_has_one_host() -> None:
    guard = SameOriginOnly(None, "127.0.0.1")
    assert not guard.allows({})
    assert not guard.allows({"host": [OWN, "evil.example"]})


def test_a_web_socket_of_another_site_is_closed() -> None:
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "websocket", "headers": [(b"host", OWN.encode()), (b"origin", b"http://evil.example")]}
    asyncio.run(SameOriginOnly(None, "127.0.0.1")(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_served_page_refuses_other_hosts_and_uploads_of_other_sites() -> None:
    pytest.importorskip("gradio", reason="the extra app is not installed")
    with load_gradio().Blocks() as blocks:
        pass
    address = urllib.parse.urlsplit(serve(blocks, "127.0.0.1", 0, largest_upload_megabytes=1, wait=False))

    def status(method: str, path: str, **headers: str) -> int:
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
        connection.request(method, path, body=b"" if method == "POST" else None, headers=headers)
        return connection.getresponse().status

    try:
        assert status("GET", "/") == 200
        assert status("GET", "/", Host="evil.example") == FORBIDDEN
        assert status("POST", "/gradio_api/upload", Origin="http://evil.example") == FORBIDDEN
        assert status("POST", "/gradio_api/upload", Origin=f"http://{address.netloc}") != FORBIDDEN
    finally:
        blocks.close()
