"""`diffpo serve-scorer`: a scorer behind a small HTTP protocol, for scorers that need another environment or machine.

    GET  /       -> {"protocol": 1, "scorer": ..., "names": [...], "optional": [...], "max_images": ..., ...}
    POST /score  {"images": [PNG in base64, ...], "prompts": [text, ...]}  -> {"scores": {name: [number, ...], ...}}

A number is null where a prompt does not ask for it. An error is {"error": one sentence} with its status. The client is
client.py, the page docs/serve_scorer.md. This file needs Python 3.8 and Pillow only, so that it can be
imported where the scorer's own packages live.

One thread receives and answers all requests (`Client`, and the coroutines of `Server`), so a slow client costs a few
kilobytes and no time of the others. Two threads decode complete requests and score them, one at a time
(`Server.score`).
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import math
import queue
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from io import BytesIO
from typing import Any

from PIL import Image

from ..common.errors import DiffpoError
from ..common.images import rgb

PROTOCOL = 1
NAME = re.compile("[A-Za-z0-9_.-]{1,100}")  # of a number: it is part of a URL, of a table and of the names of metrics

HEAD = 2**14  # bytes that the request line and the headers may have
BODIES = 4  # of the largest size; so much of all bodies together is in memory
TEXT = 2**16  # bytes that a prompt may have in JSON
CHUNK = 2**16
BACKLOG = 1024  # connections that the system may hold until they are accepted
PACE = 1.0  # s: a client that sends less than CHUNK in that time is slow, and is dropped if memory is short
GRACE = 30.0  # s: a scoring in progress may take that long to end when the server stops
LINGER = 2.0  # s that the client has to read an answer and close

METHOD = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/([0-9])\.([0-9])")
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
HOST = re.compile(r"([^:\[\]]*|\[[0-9a-f:.]+\])(:[0-9]*)?")
SPACE = re.compile(rb"[ \t\r\n]*")
ONCE = {"host", "content-length", "content-type", "transfer-encoding", "expect"}
LATE = (asyncio.TimeoutError, TimeoutError)  # two classes before Python 3.11


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_images, max_bytes: of a request.
        max_pixels: of an image.
        deadline: s in which a request, headers included, must come.
        connections: of more, the one that sends least is dropped.
    """

    max_images: int = 32
    max_bytes: int = 2**26
    max_pixels: int = 2**23
    deadline: float = 120.0
    connections: int = 256


DEFAULTS = Limits()


class Refused(Exception):
    """An answer other than numbers: a status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = "".join(c if c.isprintable() else " " for c in sentence[:1000])


class Client:
    """A connection: one request and its answer. A second request on it is not read.

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


class Server:
    """Listens from the start; `serve_forever` answers. ``port`` 0 takes a free one, see ``url``.

    ``scorer``: see `diffpo.scorers.Scorer`; it is called by one thread at a time. Raises DiffpoError if the scorer's
    names cannot be used or the address cannot be had.
    """

    def __init__(self, scorer: Any, host: str = "127.0.0.1", port: int = 8000, limits: Limits = DEFAULTS) -> None:
        for name in scorer.names or [""]:
            if not NAME.fullmatch(name):
                raise DiffpoError(f"the scorer's name {name!r} must consist of letters, digits, '.', '_' and '-'")
        self.scorer, self.lock = scorer, threading.Lock()
        self.limits = limits
        self.about: dict[str, Any] = {
            "protocol": PROTOCOL,
            "scorer": getattr(scorer, "spec", type(scorer).__name__),
            "names": list(scorer.names),
            "optional": sorted(scorer.optional),
            "max_images": limits.max_images,
            "max_bytes": limits.max_bytes,
            "max_pixels": limits.max_pixels,
        }
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
            raise DiffpoError(
                f"cannot listen on {host}:{port}: {reason}; choose another --host, or another --port (0: a free one)"
            ) from None
        self.server_address = self.socket.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}"
        # a web page whose name resolves to this machine would send that name (DNS rebinding)
        self.loopback = ipaddress.ip_address(self.server_address[0].partition("%")[0]).is_loopback
        self.hosts = {"localhost", "127.0.0.1", "[::1]", name.lower()}

        self.clients: set[Client] = set()
        self.awaited: set[Client] = set()  # those that the server waits for
        self.work: queue.SimpleQueue = queue.SimpleQueue()
        self.loop: Any = None
        self.asked_to_stop, self.ended = False, threading.Event()
        self.ended.set()

    # ---- the server's life

    def serve_forever(self) -> None:
        """Answer until `stop`; ends when what is being scored is answered, after GRACE seconds at the latest."""
        self.ended.clear()
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(2)]
        for worker in workers:
            worker.start()
        try:
            asyncio.run(self._serve())
        finally:
            for _ in workers:
                self.work.put(None)
            self.ended.set()

    async def _serve(self) -> None:
        self.wake = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(_say)
        listening = await asyncio.start_server(self._connected, sock=self.socket, limit=HEAD, backlog=BACKLOG)
        if not self.asked_to_stop:
            await self.wake.wait()
        print("stopping", file=sys.stderr, flush=True)
        listening.close()
        for client in list(self.awaited):
            self._drop(client)
        if self.clients:
            await asyncio.wait({client.task for client in self.clients if client.task}, timeout=GRACE)

    def stop(self) -> None:
        """Let `serve_forever` end. May be called from a signal handler or another thread."""
        self.asked_to_stop = True
        if self.loop and not self.ended.is_set():
            self.loop.call_soon_threadsafe(self.wake.set)

    def shutdown(self) -> None:
        """`stop`, and wait for the end; from another thread than that of `serve_forever`."""
        self.stop()
        self.ended.wait()

    def server_close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.server_close()

    # ---- requests

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(reader, writer, self.limits.deadline)
        self.clients.add(client)
        status = 200
        content: dict[str, Any] = {}
        try:
            try:
                if len(self.clients) > self.limits.connections and not self._drop_slowest(self.awaited):
                    raise Refused(503, "too many requests at a time; send it again later")
                status, content = await self._content(client)
            except Refused as refused:
                status, content = refused.status, {"error": refused.sentence}
            except asyncio.CancelledError:
                status, content = 503, {"error": "too many requests at a time; send it again later"}
            if status != 200:
                place = (writer.get_extra_info("peername") or ["?"])[0]
                print(f"{place}: {status} {content['error']}", file=sys.stderr, flush=True)
            client.answer(status, content)
            if not client.dropped:
                await self._wait(client, client.close())
        except (Refused, OSError, asyncio.CancelledError):  # the client has hung up, or never will
            pass
        finally:
            self.clients.discard(client)
            writer.transport.abort()
            client.task = None  # no cycle keeps the body in memory

    async def _content(self, client: Client) -> tuple[int, dict]:
        """Status and answer to a request. Raises Refused."""
        await self._wait(client, client.head())
        size = self._body_size(client)
        if size is None:
            return 200, self.about
        client.size = size
        if client.headers.get("expect") and client.version != "1.0":
            client.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while client.missing:
            await self._room(client)
            await self._wait(client, client.receive())
        done = self.loop.create_future()
        self.work.put((client.body, done))
        return await done

    async def _wait(self, client: Client, coroutine: Coroutine) -> None:
        """Wait for the client, which may be dropped meanwhile. Raises Refused when its time is over."""
        client.moved = time.monotonic()
        self.awaited.add(client)
        try:
            await asyncio.wait_for(coroutine, client.left)
            if client.dropped:  # before Python 3.12, wait_for swallows a cancellation that comes with its result
                raise asyncio.CancelledError
        except LATE:
            raise Refused(408, f"the request was not complete within {self.limits.deadline:g} s") from None
        finally:
            self.awaited.discard(client)
            client.left -= time.monotonic() - client.moved

    async def _room(self, client: Client) -> None:
        """Wait until memory holds the next chunk of the client's body, beside the rest of all bodies that miss less:
        else many would begin and none could end. Slow clients are not waited for, and dropped where memory is short."""
        while True:
            late = time.monotonic() - PACE
            slow = {each for each in self.awaited if each.missing and each.moved < late}
            chunk, place = min(client.missing, CHUNK), (client.missing, client.began)
            first = [each for each in self.clients - slow if (each.missing, each.began) < place]
            room = BODIES * self.limits.max_bytes - sum(len(each.body) for each in self.clients)
            if chunk + sum(each.missing for each in first) <= room:
                return
            if not self._drop_slowest(each for each in slow if each.body) and chunk > room:
                holders = [each for each in self.clients if each.body]
                if all(each.missing and each not in self.awaited for each in holders):  # they wait for each other
                    self._drop(max(holders, key=lambda each: each.began))
            await asyncio.sleep(0.02)

    def _drop_slowest(self, clients: Iterable[Client]) -> bool:
        slowest = min(clients, key=lambda each: (not each.answered, each.moved), default=None)
        if slowest:
            self._drop(slowest)
        return slowest is not None

    def _drop(self, client: Client) -> None:
        self.awaited.discard(client)
        client.body, client.dropped = bytearray(), True
        if client.task:
            client.task.cancel()

    def _body_size(self, client: Client) -> int | None:
        """How many bytes the body of a POST /score has; None for GET /. Raises Refused for all others."""
        headers = client.headers
        if client.version != "1.0" and "host" not in headers:
            raise Refused(400, "the request needs the header Host")
        if self.loopback and "host" in headers:
            found = HOST.fullmatch(headers["host"].lower())
            if not found or found[1] not in self.hosts:
                raise Refused(403, f"the Host {headers['host']!r} is not this server; --host NAME allows another")
        if client.method not in ("GET", "POST"):
            raise Refused(501, "only GET / and POST /score are supported")
        if client.method == "GET" and client.path == "/":
            return None
        if client.method != "POST" or client.path != "/score":
            raise Refused(404, "only GET / and POST /score are supported")
        # which no web page can send here unasked
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the Content-Type must be application/json")
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers and length:
            raise Refused(400, "the request has both Content-Length and Transfer-Encoding")
        if not re.fullmatch("[0-9]+", length):
            raise Refused(411, "the request needs the header Content-Length")
        if len(length) > 15 or int(length) > self.limits.max_bytes:
            raise Refused(413, f"the body has {length:.40} bytes, more than --max-bytes {self.limits.max_bytes}")
        if headers.get("expect", "100-continue").lower() != "100-continue":
            raise Refused(417, "the only supported value of Expect is 100-continue")
        return int(length)

    # ---- scores: in two threads, so that one request is decoded while another is scored

    def _work(self) -> None:
        for body, done in iter(self.work.get, None):
            try:
                answer = 200, self.score(body)
            except Refused as refused:
                answer = refused.status, {"error": refused.sentence}
            except Exception as error:  # unforeseen; the server goes on
                traceback.print_exc()
                answer = 500, {"error": f"the server failed: {type(error).__name__}"}
            try:
                self.loop.call_soon_threadsafe(_settle, done, answer)
            except RuntimeError:  # the server has stopped
                return
            del body, done  # not kept until the next request

    def score(self, body: bytes) -> dict:
        """The answer to a request's body. Raises Refused."""
        pictures, prompts = self.parse(body)
        images = [self.decode(k, picture) for k, picture in enumerate(pictures)]
        try:
            with self.lock:
                scores = self.scorer.score(images, prompts)
        except DiffpoError as error:
            raise Refused(422, str(error)) from None
        except Exception as error:  # whatever a model raises; the server goes on
            traceback.print_exc()
            raise Refused(500, f"the scorer failed: {type(error).__name__}: {error}") from None
        return {"scores": {name: self.numbers(name, scores, prompts) for name in self.scorer.names}}

    def parse(self, body: bytes) -> tuple[list[str], list[str]]:
        """Images and prompts. Only strings are ever made, and no more than are allowed: what json.loads makes of 60 MB
        of "{}" takes 2 GB."""
        form = 'the body is not JSON, or not as expected {"images": [PNG in base64, ...], "prompts": [text, ...]}'
        found: dict[str, list[str]] = {}
        at = 0

        def take(mark: bytes) -> bool:
            nonlocal at
            at = _past_space(body, at)
            there = body[at : at + 1] == mark
            at += there
            return there

        def string() -> str:
            nonlocal at
            if not take(b'"'):
                raise Refused(400, form)
            start, escaped = at - 1, True
            while escaped:
                end = body.find(b'"', at)
                if end < 0:
                    raise Refused(400, form)
                part, at = body[at:end], end + 1
                escaped = (len(part) - len(part.rstrip(b"\\"))) % 2 == 1
                if escaped and at - start > TEXT:  # base64 has no quotes
                    raise Refused(413, f"a prompt has more than {TEXT} bytes")
            return json.loads(body[start:at].decode())

        def strings(key: str) -> Iterable[str]:
            if not take(b"["):
                raise Refused(400, form)
            count = 0
            while not take(b"]"):
                if count and not take(b","):
                    raise Refused(400, form)
                count += 1
                if count > self.limits.max_images:
                    raise Refused(413, f"at least {count} {key} are more than --max-images {self.limits.max_images}")
                yield string()

        try:
            for mark in (b"{", b","):
                if not take(mark):
                    raise Refused(400, form)
                key = string()
                if key not in ("images", "prompts") or key in found or not take(b":"):
                    raise Refused(400, form)
                found[key] = list(strings(key))
            if not take(b"}") or _past_space(body, at) != len(body):
                raise Refused(400, form)
        except ValueError:  # no UTF-8, or no string of JSON
            raise Refused(400, form) from None
        images, prompts = found["images"], found["prompts"]
        if not images or len(images) != len(prompts):
            raise Refused(400, f"{len(images)} images and {len(prompts)} prompts: send one prompt with each image")
        for k, prompt in enumerate(prompts):
            if len(prompt) > TEXT:
                raise Refused(413, f"prompt {k} has more than {TEXT} characters")
            if any("\ud800" <= c <= "\udfff" for c in prompt):
                raise Refused(400, f"prompt {k} holds half a character (a lone surrogate)")
        return images, prompts

    def decode(self, k: int, picture: str) -> Image.Image:
        """Image ``k`` as RGB, on white. Only Pillow's PNG reader sees what a client sent, and only if the size is
        allowed."""
        try:
            data = base64.b64decode(picture, validate=True)
        except ValueError:
            raise Refused(400, f"image {k} is not base64") from None
        size = "far too many"
        try:
            with Image.open(BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height <= self.limits.max_pixels:
                    return rgb(image)
                size = f"{image.width}x{image.height}"
        except Image.DecompressionBombError:
            pass
        except Exception:  # Pillow raises a dozen types for damaged files
            raise Refused(400, f"image {k} is not a readable PNG") from None
        raise Refused(413, f"image {k} has {size} pixels, more than --max-pixels {self.limits.max_pixels}")

    def numbers(self, name: str, scores: Any, prompts: list[str]) -> list[float | None]:
        """The scorer's numbers ``name``, None for NaN where the scorer calls that optional. Raises Refused."""
        try:
            found = [float(value) for value in scores[name]]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(500, f"the scorer gave no numbers {name!r} ({type(error).__name__}: {error})") from None
        if len(found) != len(prompts):
            raise Refused(500, f"the scorer gave {len(found)} numbers {name!r} for {len(prompts)} images")
        for k, value in enumerate(found):
            if not math.isfinite(value) and not (math.isnan(value) and name in self.scorer.optional):
                raise Refused(500, f"the scorer gave {name} = {value} for image {k} of the prompt {prompts[k]!r}")
        return [None if math.isnan(value) else value for value in found]


def _say(_loop: Any, context: dict) -> None:
    """Print asyncio's reports, such as too many open files."""
    print(f"{context['message']}: {context.get('exception')!r}", file=sys.stderr, flush=True)


def _past_space(body: bytes, at: int) -> int:
    """Where the white space at ``at`` ends."""
    found = SPACE.match(body, at)
    assert found is not None  # noqa: S101 (the pattern also matches no characters)
    return found.end()


def _settle(done: asyncio.Future, answer: tuple[int, dict]) -> None:
    if not done.done():  # its client may be gone
        done.set_result(answer)


def serve(scorer: Any, host: str = "127.0.0.1", port: int = 8000, limits: Limits = DEFAULTS) -> None:
    """Answer requests for ``scorer`` until SIGINT or SIGTERM. To be called from the main thread; see `Server`."""

    def stop(*_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)  # once more: at once
        server.stop()

    with Server(scorer, host, port, limits) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        print(f"serving {', '.join(server.about['names'])} on {server.url}; Ctrl-C stops", flush=True)
        if not server.loopback:
            print("any machine that reaches this address can use the scorer: there is no password", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
