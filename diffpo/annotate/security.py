"""What every request passes before the page sees it: who may ask, from which page, and how much may be sent.

| refused | status |
| --- | --- |
| a Host that is not this server (DNS rebinding), an Origin that is another page | 403 |
| no token, or a wrong one | 401 |
| a body that is not JSON (a form of another page could send it) | 415 |
| a body above the limit, counted as it comes | 413 |
| a body that does not come in time | 408 |
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

BODY = 2**23  # bytes of a request, marks included
DEADLINE = 30.0  # s in which a body must come
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Rules:
    """``hosts``: names that the server has, in small letters. ``addresses``: any IP address is a name of it too, which
    DNS cannot rebind. ``token``: None where only this machine can connect."""

    hosts: frozenset[str]
    addresses: bool = False
    token: str | None = None
    body: int = BODY
    deadline: float = DEADLINE

    @property
    def cookie(self) -> str:
        """Its name: cookies of one machine's servers are not kept apart by port."""
        return f"diffpo-{sha256((self.token or '').encode()).hexdigest()[:8]}"


def rules(host: str, token: str | None, body: int = BODY) -> Rules:
    """Those of a server that listens on ``host``."""
    names = {"localhost", "127.0.0.1", "[::1]", host.lower(), f"[{host.lower()}]"}
    if is_loopback(host):
        return Rules(frozenset(names), False, token, body)
    return Rules(frozenset(names | {socket.gethostname().lower(), socket.getfqdn().lower()}), True, token, body)


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application in front of another. A body is read whole before the other is called."""

    def __init__(self, app: Any, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        headers = _headers(scope["headers"])
        refusal = (400, "a header is there twice") if headers is None else self._refused(scope, headers)
        if headers is None or refusal is not None:
            await answer(send, *(refusal or (400, "")))
            return
        token = self._new_token(scope)
        if token is not None:  # the address bar and the history keep no token
            cookie = f"{self.rules.cookie}={token}; HttpOnly; SameSite=Strict; Path=/; Max-Age=2592000"
            await answer(send, 303, "see /", {"location": "/", "set-cookie": cookie})
            return
        if self.rules.token is not None and not _equal(self._cookie(headers.get("cookie", "")), self.rules.token):
            await answer(send, 401, "a token is needed: open the address that `diffpo annotate` printed")
            return
        try:
            body = await asyncio.wait_for(self._body(headers, receive), self.rules.deadline)
        except TimeoutError:
            await answer(send, 408, "the request did not come in time")
            return
        if body is None:
            await answer(send, 413, f"the request has more than {self.rules.body} bytes")
            return
        await self.app(scope, _replay(body, receive), _guarded(send))

    def _cookie(self, header: str) -> str:
        try:
            found = SimpleCookie(header).get(self.rules.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _refused(self, scope: dict, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._is_own(host):
            return 403, "this Host is not this server"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "another page may not ask this server"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and (
            scope["method"] != "GET" or scope["path"] != "/"  # a link to the page is allowed
        ):
            return 403, "another page may not ask this server"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "only GET and POST are supported"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return 415, "the Content-Type must be application/json"
        return None

    def _is_own(self, host: str) -> bool:
        name = host.lower()
        if not name.endswith("]"):
            before, colon, port = name.rpartition(":")
            name = before if colon and port.isdecimal() else name
        if name in self.rules.hosts:
            return True
        try:
            return self.rules.addresses and bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False

    def _new_token(self, scope: dict) -> str | None:
        """The right token, where the address brings it."""
        if self.rules.token is None or scope["path"] != "/" or scope["method"] != "GET":
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return self.rules.token if len(given) == 1 and _equal(given[0], self.rules.token) else None

    async def _body(self, headers: dict[str, str], receive: Any) -> bytes | None:
        """The whole body; None as soon as it is longer than the limit. Content-Length is believed only where it says
        that the body is too long."""
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > self.rules.body:
            return None
        found = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(found)
            found += message.get("body", b"")
            if len(found) > self.rules.body:
                return None
            if not message.get("more_body"):
                return bytes(found)


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str] | None:
    """By name; None if one that decides is there twice."""
    found: dict[str, str] = {}
    for name, value in raw:
        key = name.decode("latin-1").lower()
        if key in found and key in ("host", "origin", "content-length", "content-type"):
            return None
        found[key] = f"{found[key]}; {value.decode('latin-1')}" if key in found else value.decode("latin-1")
    return found


def _equal(given: str, token: str) -> bool:
    """In a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _replay(body: bytes, receive: Any) -> Any:
    sent = False

    async def replayed() -> dict:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _guarded(send: Any) -> Any:
    async def guarded(message: dict) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return guarded


async def answer(send: Any, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
    """A short text as the answer."""
    body = sentence.encode()
    every = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body)), "cache-control": "no-store"}
    raw = [(k.encode(), v.encode()) for k, v in (HEADERS | every | (headers or {})).items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
