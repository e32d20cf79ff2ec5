"""One request over HTTP and its answer, which must come in time and have an end."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Mapping
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from io import BufferedReader, BytesIO, RawIOBase
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ..common.images import rgb
from ..common.text import plain

ANSWER = 2**20  # bytes that an answer may have, headers included


def exchange(
    url: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout: float
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers (names in lower case) and content of the answer to ``data``, which is JSON; without it to a GET.
    No proxy of the environment is asked, and no redirection followed.

    Args:
        url: ``http://HOST:PORT`` or https, checked before.
        headers: sent beside the usual ones.
        timeout: s for the request and its whole answer.

    Raises OSError, HTTPException or ValueError (of chunks with a negative length).
    """
    address, end = urlsplit(url), time.monotonic() + timeout
    if address.hostname is None:
        raise ValueError(f"{url} names no host")
    kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
    with contextlib.closing(kind(address.hostname, address.port, timeout=timeout)) as connection:
        connection.connect()
        connection.sock.settimeout(_left(end))
        connection.response_class = partial(_Response, end=end)  # type: ignore[assignment]  # it is only called
        usual = {"Content-Type": "application/json", "Connection": "close", "User-Agent": "diffpo"}
        connection.request("GET" if data is None else "POST", path, data, {**usual, **headers})
        with connection.getresponse() as response:
            answer = response.read(ANSWER)
            if response.length:  # http.client is silent if the connection ended early
                raise IncompleteRead(answer, response.length)
            return response.status, {name.lower(): value for name, value in response.headers.items()}, answer


class _Response(HTTPResponse):
    """An answer that must come until ``end``."""

    def __init__(self, sock: Any, *args: Any, end: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = BufferedReader(_Received(self.fp.detach(), sock, end))


class _Received(RawIOBase):
    """At most ANSWER bytes from a socket until ``end``. http.client alone waits for each of them anew, and reads any
    number of "100 Continue"."""

    def __init__(self, raw: Any, sock: Any, end: float) -> None:
        self.raw, self.sock, self.end, self.size = raw, sock, end, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(_left(self.end))
        count = self.raw.readinto(buffer)
        self.size += count
        if self.size > ANSWER:
            raise HTTPException(f"it answers with more than {ANSWER} bytes")
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def png(image: Image.Image) -> str:
    """The picture as PNG in base64."""
    buffer = BytesIO()
    rgb(image).save(buffer, "PNG", compress_level=1)  # five times as fast as the default, a tenth larger
    return base64.b64encode(buffer.getvalue()).decode()


def as_line(error: object) -> str:
    """One line that is fit for a terminal."""
    return plain(getattr(error, "strerror", None) or error) or type(error).__name__


def read_object(data: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
