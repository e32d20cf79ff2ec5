"""`diffpo serve-scorer`: a scorer behind a small HTTP protocol, for scorers that need another environment or machine.

    GET  /       -> {"protocol": 1, "scorer": ..., "names": [...], "optional": [...], "max_images": ..., ...}
    POST /score  {"images": [PNG in base64, ...], "prompts": [text, ...]}  -> {"scores": {name: [number, ...], ...}}

A number is null where a prompt does not ask for it. An error is {"error": one sentence} with its status. The client is
scorers/http.py, the page docs/serve_scorer.md. This file asks for Python 3.8 and Pillow only, so that it can be
imported where the scorer's own packages live.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import re
import signal
import socket
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

from .data.images import rgb
from .errors import DiffpoError

PROTOCOL = 1
NAME = re.compile("[A-Za-z0-9_.-]+")  # of a number: it is part of a URL, of a table and of the names of metrics
SLOTS = 4  # requests held in memory at once; others wait before their bodies are read
SILENCE, DEADLINE = 30.0, 300.0  # s: for the next bytes of a request, and for all of them
GRACE = 30.0  # s: what is in progress when the server stops may take that long to end
LINGER = 2.0  # s


class Refused(Exception):
    """An answer other than numbers: a status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = "".join(c if c.isprintable() else " " for c in sentence[:1000])


class Server(ThreadingHTTPServer):
    """Listens from the start; `serve_forever` answers. ``port`` 0 takes a free one, see ``url``.

    ``scorer``: see `diffpo.scorers`; it is called by one thread at a time. Raises DiffpoError if the scorer's names
    cannot be used or the address cannot be had.
    """

    daemon_threads = True  # a silent client does not keep a stopped server alive
    request_queue_size = 128

    def __init__(
        self,
        scorer: Any,
        host: str = "127.0.0.1",
        port: int = 8000,
        max_images: int = 32,
        max_bytes: int = 2**26,
        max_pixels: int = 2**23,
    ) -> None:
        for name in scorer.names or [""]:
            if not NAME.fullmatch(name):
                raise DiffpoError(f"the scorer's name {name!r} must consist of letters, digits, '.', '_' and '-'")
        self.scorer, self.lock, self.slots = scorer, threading.Lock(), threading.Semaphore(SLOTS)
        self.max_images, self.max_bytes, self.max_pixels = max_images, max_bytes, max_pixels
        self.about = {
            "protocol": PROTOCOL,
            "scorer": type(scorer).__name__,
            "names": list(scorer.names),
            "optional": sorted(scorer.optional),
            "max_images": max_images,
            "max_bytes": max_bytes,
            "max_pixels": max_pixels,
        }
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise DiffpoError(
                f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}; choose another --host, "
                "or another --port (0: a free one)"
            ) from None
        self.url = f"http://{host}:{self.server_address[1]}"

    def score(self, body: bytes) -> dict:
        """The answer to a request's body. Raises Refused."""
        pictures, prompts = self.parse(body)
        images = [self.decode(k, picture) for k, picture in enumerate(pictures)]
        try:
            with self.lock:
                scores = self.scorer.score(images, prompts)
        except DiffpoError as error:
            raise Refused(422, str(error)) from None
        except Exception as error:  # whatever a model raises; the server stays
            traceback.print_exc()
            raise Refused(500, f"the scorer failed: {type(error).__name__}: {error}") from None
        return {"scores": {name: self.numbers(name, scores, prompts) for name in self.scorer.names}}

    def parse(self, body: bytes) -> tuple[list[str], list[str]]:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        lists = [request.get(key) for key in ("images", "prompts")] if isinstance(request, dict) else []
        if not lists or not all(isinstance(each, list) and all(isinstance(s, str) for s in each) for each in lists):
            raise Refused(400, 'expected {"images": [PNG in base64, ...], "prompts": [text, ...]}')
        images, prompts = lists
        if not images or len(images) != len(prompts):
            raise Refused(400, f"{len(images)} images and {len(prompts)} prompts: send one prompt with each image")
        if len(images) > self.max_images:
            raise Refused(413, f"{len(images)} images are more than --max-images {self.max_images}")
        return images, prompts

    def decode(self, k: int, picture: str) -> Image.Image:
        """Image ``k`` as RGB. Only Pillow's PNG reader sees what a client sent, and only if the size is allowed."""
        try:
            data = base64.b64decode(picture, validate=True)
        except ValueError:
            raise Refused(400, f"image {k} is not base64") from None
        size = "far too many"
        try:
            with Image.open(BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height <= self.max_pixels:
                    return rgb(image)
                size = f"{image.width}x{image.height}"
        except Image.DecompressionBombError:
            pass
        except Exception:  # Pillow raises a dozen types for damaged files
            raise Refused(400, f"image {k} is not a readable PNG") from None
        raise Refused(413, f"image {k} has {size} pixels, more than --max-pixels {self.max_pixels}")

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

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, socket.timeout)):  # clients may hang up
            super().handle_error(request, client_address)

    def finish(self) -> None:
        """Accept nothing more and wait, for GRACE seconds at most, for the answers in progress."""
        self.server_close()
        end = time.monotonic() + GRACE
        for _ in range(SLOTS):
            self.slots.acquire(timeout=max(0.0, end - time.monotonic()))


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version, timeout = "diffpo-scorer", "", SILENCE

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, self.server.about)
        else:
            self.send_error(404, "there is GET / and POST /score")

    def do_POST(self) -> None:
        try:
            with self.server.slots:
                self.answer(200, self.server.score(self.body()))
        except Refused as refused:
            self.send_error(refused.status, refused.sentence)

    def body(self) -> bytes:
        if self.path != "/score":
            raise Refused(404, "there is GET / and POST /score")
        if self.headers.get_content_type() != "application/json":  # which no web page can send here unasked
            raise Refused(415, "the Content-Type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "the request must say its Content-Length")
        if len(length) > 15 or int(length) > self.server.max_bytes:
            raise Refused(413, f"the body has {length:.15} bytes, more than --max-bytes {self.server.max_bytes}")
        left, end, parts = int(length), time.monotonic() + DEADLINE, []
        while left and time.monotonic() < end:
            part = self.rfile.read1(min(left, 2**16))
            if not part:
                break
            parts.append(part)
            left -= len(part)
        if left:
            raise Refused(408, f"{left} bytes of the body did not come")
        return b"".join(parts)

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own errors, too, are JSON and not pages."""
        print(f"{self.client_address[0]}: {int(code)} {message}", file=sys.stderr, flush=True)
        self.close_connection = True
        self.answer(code, {"error": message or "refused"})
        # closing while the client still sends would reset the connection before it has read why
        end = time.monotonic() + LINGER
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER)
            while time.monotonic() < end and self.connection.recv(2**16):
                pass
        except OSError:  # it has hung up
            pass

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Only errors are printed."""

    def log_message(self, format: str, *values: Any) -> None:
        """Those of http.server: clients that fall silent."""


def serve(scorer: Any, host: str = "127.0.0.1", port: int = 8000, **limits: int) -> None:
    """Answer requests for ``scorer`` until SIGINT or SIGTERM. To be called from the main thread; see `Server`."""
    server = Server(scorer, host, port, **limits)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        print(f"serving {', '.join(server.about['names'])} on {server.url}; Ctrl-C stops", flush=True)
        if not ipaddress.ip_address(server.server_address[0]).is_loopback:
            print("any machine that reaches this address can use the scorer: there is no password", file=sys.stderr)
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr)
    finally:
        server.finish()
