"""Rejection of requests to a local page that are sent by a browser on behalf of another web site.

A page on 127.0.0.1 can be reached by every site that the user's browser visits: with a cross-origin request, or through
a domain name that the site points at 127.0.0.1 (DNS rebinding). Both are recognised by their headers: `Host` names
another machine, or `Origin` differs from `Host`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
WILDCARDS = frozenset({"0.0.0.0", "::", ""})
FORBIDDEN = 403
# Of a WebSocket: the policy of the server is violated (RFC 6455, section 7.4.1).
POLICY_VIOLATION = 1008

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether an address or name is that of this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(authority: str) -> str:
    """The host of a `Host` header or of the authority of a URL, in lower case, without port and brackets."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").rstrip(".")
    except ValueError:
        return ""


class SameOriginOnly:
    """ASGI middleware that answers requests for this machine from its own pages, and refuses all others.

    Args:
        app: the application.
        host: address that the server listens on. Loopback names are always allowed; for a wildcard address also this
            machine's names, and addresses in numbers, which no other site can use as its name.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str) -> None:
        self._app = app
        self._names = LOOPBACK_NAMES | {host_name(f"[{host}]" if ":" in host else host)} - {""}
        self._any_address = host in WILDCARDS
        if self._any_address:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        kind = scope["type"]
        if kind not in {"http", "websocket"} or self.allows(_headers(scope)):
            await self._app(scope, receive, send)
            return
        if kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        body = b"This page answers only requests from itself: open it under the address that the command printed.\n"
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": FORBIDDEN, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def allows(self, headers: dict[str, list[str]]) -> bool:
        """Whether a request with these headers, lower-case name -> values, is for this machine and of its own page."""
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not self._is_allowed_name(host_name(hosts[0])):
            return False
        return all(urlsplit(origin).netloc.lower() == hosts[0].lower() for origin in headers.get("origin", []))

    def _is_allowed_name(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address


def _headers(scope: Message) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope.get("headers", ()):
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found
