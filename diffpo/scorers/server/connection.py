"""A client's connection to the server: HTTP/1.1 as far as the protocol needs it, read with bounds on every part."""

from __future__ import annotations

import asyncio
import json
import re
import time
from http import HTTPStatus

from .protocol import Refused

HEAD = 2**14  # bytes that the request line and the headers may have
CHUNK = 2**16
LINGER = 2.0  # s that the client has to read an answer and close

METHOD = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/([0-9])\.([0-9])")
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
HOST = re.compile(r"([^:\[\]]*|\[[0-9a-f:.]+\])(:[0-9]*)?")
ONCE = {"host", "content-length", "content-type", "transfer-encoding", "expect"}


class Connection:
    """A client's connection: one request and its answer. A second request on it is not read.

    Attributes:
        began, moved: when it connected, and when it last sent all that the server waited for, by time.monotonic.
        left: s in which the rest of the request must come.
        dropped: closed by the server, because memory or connections are short.
        size: of the body, once it is known.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadline: float) -> None:
        self.reader, self.writer, self.task = reader, writer, asyncio.current_task()
        self.began = self.moved = time.monotonic()
        self.left, self.answered, self.dropped = deadline, False, False
        self.method = self.path = self.version = ""
        self.headers: dict[str, str] = {}
        self.size, self.body = 0, bytearray()

    @property
    def missing(self) -> int:
        """Bytes of the body that are still to come."""
        return self.size - len(self.body)

    async def head(self) -> None:
        """Receive the request line and the headers. Raises Refused, ConnectionError if nothing comes."""
        line = await self.reader.read(1)
        if not line:
            raise ConnectionError
        if not (line.isalpha() or line in b"\r\n"):
            raise Refused(400, "this is not an HTTP request; use http, not https")
        size = 0
        while True:
            try:
                line += await self.reader.readline()
            except ValueError:  # longer than HEAD
                line = b" " * HEAD + b"\n"
            size += len(line)
            if size > HEAD:
                raise Refused(431, f"the request line and the headers have more than {HEAD} bytes")
            if not line.endswith(b"\n"):
                raise Refused(400, "the request ended before its headers did")
            line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
            if line and not self.method:
                self._request(line)
            elif line:
                self._header(line)
            elif self.method:
                return
            line = b""

    def _request(self, line: bytes) -> None:
        found = METHOD.fullmatch(line)
        if not found:
            raise Refused(400, "the first line is no request of HTTP/1.1")
        self.method, self.path = found[1].decode(), found[2].decode()
        self.version = f"{found[3].decode()}.{found[4].decode()}"
        if found[3] != b"1":
            raise Refused(505, "only HTTP/1.0 and HTTP/1.1 are supported")

    def _header(self, line: bytes) -> None:
        name, colon, value = line.partition(b":")
        if not colon or not TOKEN.fullmatch(name) or CONTROL.search(value):
            raise Refused(400, "a header is not of the form NAME: VALUE")
        key = name.decode().lower()
        if key in ONCE and key in self.headers:
            raise Refused(400, f"the header {key} appears twice")
        self.headers[key] = value.strip(b" \t").decode("latin-1")

    def body_size(self, hosts: set[str] | None, max_bytes: int) -> int | None:
        """How many bytes the body of a POST /score has; None for GET /. Raises Refused for all others, and for a Host
        that is not one of ``hosts`` (None: any)."""
        headers = self.headers
        if self.version != "1.0" and "host" not in headers:
            raise Refused(400, "the request needs the header Host")
        if hosts is not None and "host" in headers:
            found = HOST.fullmatch(headers["host"].lower())
            if not found or found[1] not in hosts:
                raise Refused(403, f"the Host {headers['host']!r} is not this server; --host NAME allows another")
        if self.method not in ("GET", "POST"):
            raise Refused(501, "only GET / and POST /score are supported")
        if self.method == "GET" and self.path == "/":
            return None
        if self.method != "POST" or self.path != "/score":
            raise Refused(404, "only GET / and POST /score are supported")
        # which no web page can send here unasked
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the Content-Type must be application/json")
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers and length:
            raise Refused(400, "the request has both Content-Length and Transfer-Encoding")
        if not re.fullmatch("[0-9]+", length):
            raise Refused(411, "the request needs the header Content-Length")
        if len(length) > 15 or int(length) > max_bytes:
            raise Refused(413, f"the body has {length:.40} bytes, more than --max-bytes {max_bytes}")
        if headers.get("expect", "100-continue").lower() != "100-continue":
            raise Refused(417, "the only supported value of Expect is 100-continue")
        return int(length)

    async def receive(self) -> None:
        """Receive the next chunk of the body. Raises Refused if the client ends before."""
        try:
            self.body += await self.reader.readexactly(min(self.missing, CHUNK))
        except asyncio.IncompleteReadError:
            raise Refused(400, f"{self.missing} bytes of the body are missing") from None

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content, allow_nan=False).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        self.writer.write(head.encode() + (b"" if self.method == "HEAD" else data))
        self.answered, self.left = True, LINGER + len(data) / CHUNK
        self.size, self.body = 0, bytearray()

    async def close(self) -> None:
        """Wait until the client has the answer and closes: if it still sends, closing first would reset the connection
        before the answer is read."""
        await self.writer.drain()
        self.writer.write_eof()
        while await self.reader.read(CHUNK):
            pass
