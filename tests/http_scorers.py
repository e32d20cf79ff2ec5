"""For tests of scorers over HTTP: our server in a thread, another server, scorers without weights, PNGs."""

import base64
import contextlib
import http.client
import itertools
import json
import socket
import socketserver
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
from PIL import Image

from diffpo.scorers import server as serve_scorer

PROMPTS = ["a", "two cats", "größer 猫", 'quote " and \\', "", "six\nlines", "7"]


def pictures():
    """One of noise for each of PROMPTS."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8 + i, 16, 3), dtype=np.uint8)) for i in range(len(PROMPTS))]


class Both:
    """Two numbers of image and prompt; the second is only asked for by long prompts."""

    names = ("both.mean", "both.long")
    optional = frozenset({"both.long"})

    def __init__(self):
        self.batches = []

    def score(self, images, prompts):
        self.batches.append(len(images))
        bright = [np.asarray(image, np.float64).mean() / 3 for image in images]
        mean = np.array(bright) + [len(prompt) for prompt in prompts]
        return {"both.mean": mean, "both.long": np.where([len(p) > 5 for p in prompts], mean**0.5, np.nan)}


class Fixed:
    names = ("fixed",)
    optional = frozenset()

    def __init__(self, answer):
        self.answer = answer

    def score(self, images, prompts):
        return self.answer() if callable(self.answer) else self.answer


@contextmanager
def running(server, *poll):
    thread = threading.Thread(target=server.serve_forever, args=poll)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def served(scorer, **limits):
    with running(serve_scorer.Server(scorer, port=0, limits=serve_scorer.Limits(**limits))) as server:
        yield server


@contextmanager
def foreign(respond):
    """A server that is not ours: ``respond(path, number of this request)`` gives status and body. GETs of the
    description are answered properly unless ``respond`` does."""
    about = {"protocol": 1, "names": ["fixed"], "optional": [], "max_images": 9, "max_bytes": 10**6}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            status, body, *headers = respond(self.path, len(self.server.asked)) or (200, json.dumps(about))
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"
    with running(server, 0.01):
        yield server


@contextmanager
def speaking(*parts, pause=0.0, forever=False):
    """A server that reads nothing and sends ``parts``, the last one without end if ``forever``; gives its URL."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                for part in itertools.chain(parts, itertools.repeat(parts[-1]) if forever else ()):
                    self.request.sendall(part)
                    time.sleep(pause)
                self.request.shutdown(socket.SHUT_WR)
                while self.request.recv(2**16):
                    pass

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    with running(Server(("127.0.0.1", 0), Handler), 0.01) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}"


def png(image, form="PNG"):
    buffer = BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def header(width, height):
    """A PNG that says how large it is and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return base64.b64encode(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))).decode()


# ---- requests by hand


def post(server, body, path="/score", method="POST", **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


GOOD = png(Image.new("RGB", (4, 4), "red"))


def one(picture, **more):
    return json.dumps({"images": [picture], "prompts": ["a"], **more})


def said(server, data, half=False):
    """All that the server answers to these bytes, until it closes."""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(data)
        if half:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def understood(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    version, status, *_ = head.split()
    assert version == b"HTTP/1.1" and f"\r\nContent-Length: {len(body)}\r\n".encode() in head
    return int(status), json.loads(body)


def request(*headers, body=None, length=None):
    body = one(GOOD).encode() if body is None else body
    lines = ["POST /score HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    lines += [f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
