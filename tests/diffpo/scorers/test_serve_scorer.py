"""The server, asked by hand: what it says, what it refuses, and clients that misbehave."""

import ast
import asyncio
import base64
import http.client
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from http_scorers import PROMPTS, Both, Fixed, header, png, served
from on_policy import Brightness
from PIL import Image

from diffpo import cli, scorers
from diffpo.common.errors import DiffpoError
from diffpo.data.prompts import load_prompts
from diffpo.scorers import server as serve_scorer


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(serve_scorer, "LINGER", 0.3)


def post(server, body, path="/score", method="POST", **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_the_description_says_what_is_served():
    with served(Both(), max_images=4, max_pixels=99) as server:
        status, about = post(server, None, "/", "GET")
    assert status == 200 and about == {
        "protocol": 1,
        "scorer": "Both",
        "names": ["both.mean", "both.long"],
        "optional": ["both.long"],
        "max_images": 4,
        "max_bytes": 2**26,
        "max_pixels": 99,
    }


# ---- clients that misbehave

GOOD = png(Image.new("RGB", (4, 4), "red"))


def one(picture, **more):
    return json.dumps({"images": [picture], "prompts": ["a"], **more})


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "the body is not JSON"),
        (b"\xff\xfe\x00", 400, "the body is not JSON"),
        (b"\x80\x04cos\nsystem\n(S'true'\ntR.", 400, "the body is not JSON"),  # a pickle
        ("[" * 100_000, 400, "the body is not JSON"),
        ("[]", 400, 'expected {"images"'),
        ('{"images": "' + GOOD + '", "prompts": "a"}', 400, 'expected {"images"'),
        ('{"images": [1], "prompts": ["a"]}', 400, 'expected {"images"'),
        ('{"images": [], "prompts": []}', 400, "0 images and 0 prompts"),
        (json.dumps({"images": [GOOD, GOOD], "prompts": ["a"]}), 400, "2 images and 1 prompts: send one prompt"),
        (json.dumps({"images": [GOOD] * 4, "prompts": ["a"] * 4}), 413, "4 images are more than --max-images 3"),
        (one("/etc/passwd."), 400, "image 0 is not base64"),
        (one("ä"), 400, "image 0 is not base64"),
        (one("/etc/passwd="), 400, "image 0 is not a readable PNG"),
        (one(png(Image.new("RGB", (4, 4)), "JPEG")), 400, "image 0 is not a readable PNG"),
        (one(GOOD[:60]), 400, "image 0 is not a readable PNG"),
        (one(header(4, 4)), 400, "image 0 is not a readable PNG"),
        (one(png(Image.new("RGB", (101, 10)))), 413, "image 0 has 101x10 pixels, more than --max-pixels 1000"),
        (one(header(2**20, 2**20)), 413, "image 0 has far too many pixels"),
        (" " * 100_001, 413, "the body has 100001 bytes, more than --max-bytes 100000"),
        (" " * 8_000_000, 413, "the body has 8000000 bytes"),
    ],
)
def test_bad_requests_get_one_sentence_and_the_server_goes_on(body, status, words):
    with served(Brightness(), max_images=3, max_pixels=1000, max_bytes=100_000) as server:
        found, content = post(server, body)
        assert (found, list(content)) == (status, ["error"])
        assert words in content["error"] and "\n" not in content["error"] and "Traceback" not in content["error"]
        assert post(server, one(GOOD)) == (200, {"scores": {"shapes.total": [1.0]}})


def test_other_paths_methods_and_headers_are_refused_in_json(capfd):
    with served(Brightness()) as server:
        assert post(server, one(GOOD), "/../etc/passwd")[0] == 404
        status, content = post(server, None, "/score", "GET")
        assert status == 404 and "POST /score" in content["error"]
        assert post(server, one(GOOD), method="DELETE")[0] == 501
        assert post(server, one(GOOD), **{"Content-Type": "text/plain"})[0] == 415  # a web page could send that
        assert post(server, iter([b"{}"]))[0] == 411  # chunks
        for length in ("-1", "+1", "1e3", "", "1,1", "0x1"):
            assert post(server, "", **{"Content-Length": length})[0] == 411
        assert post(server, "", **{"Content-Length": "9" * 5000})[0] == 413
    assert "Traceback" not in capfd.readouterr().err


# ---- HTTP by hand


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


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /\r\n", 400),  # HTTP/0.9
        (b"GET / HTTP/0.9\r\n\r\n", 505),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"\0\0\0\0", 400),
        (b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: a\0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: a\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 5000 + b"\r\n", 431),
        (b"\r\n" * 20_000, 431),
        (request("Content-Length: 3"), 400),
        (request("Transfer-Encoding: chunked"), 400),
        (request("Expect: a miracle"), 417),
    ],
)
def test_odd_requests_get_one_error_each(capfd, data, status):
    with served(Brightness()) as server:
        found, content = understood(said(server, data))
        assert (found, list(content)) == (status, ["error"])
        assert post(server, one(GOOD))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_head_has_no_body():
    with served(Brightness()) as server:
        answer = said(server, b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 501 ") and answer.endswith(b"\r\n\r\n")


def test_a_connection_is_for_one_request():
    with served(Brightness()) as server:
        assert understood(said(server, request() * 3)) == (200, {"scores": {"shapes.total": [1.0]}})
        waiting = said(server, request("Expect: 100-continue"))
        assert waiting.startswith(b"HTTP/1.1 100 Continue\r\n\r\n") and understood(waiting[25:])[0] == 200
        assert understood(said(server, request().replace(b"\r\n", b"\n")))[0] == 200
        assert understood(said(server, request(length=999), half=True))[0] == 400
        assert understood(said(server, b"GET / HTTP/1.1\r\nHost: loc", half=True))[0] == 400
        assert said(server, b"", half=True) == b""


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LocalHost:99", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000")),
        *((host, 403) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "")),
        *((host, 403) for host in ("localhost:80:80", "[::1", "localhost/", "user@localhost", "127.0.0.1, evil")),
    ],
)
def test_on_loopback_the_host_is_checked(host, status):
    """A web page can make its own name mean 127.0.0.1, and then ask in that name."""
    with served(Brightness()) as server:
        assert understood(said(server, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()))[0] == status
        server.loopback = False  # as if it listened elsewhere
        assert understood(said(server, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()))[0] == 200


# ---- slow clients


def test_clients_that_hang_up_do_no_harm(capfd):
    with served(Brightness()) as server:
        for data in (b"", b"GE", request(length=999), request(length=10**7) + b" " * 10**6):
            for reset in (False, True):
                with socket.create_connection(server.server_address) as connection:
                    connection.sendall(data)
                    if reset:  # close with RST
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert post(server, one(GOOD))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n", request(length=999)])
def test_one_deadline_is_for_all_of_a_request(start):
    """Each byte comes before any time-out of a silence would end."""
    with served(Brightness(), deadline=0.3) as server:
        began = time.monotonic()
        with socket.create_connection(server.server_address, timeout=30) as slow:
            slow.settimeout(0.02)
            answer, rest = b"", iter(start)
            while not answer and time.monotonic() - began < 20:
                slow.sendall(bytes([next(rest, 65)]) if start else b"")
                try:
                    answer = slow.recv(2**16)
                except TimeoutError:
                    continue
        assert understood(answer)[0] == 408
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("count", [4, 300])
@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nA: ", request(length=10**6)])
def test_slow_clients_do_not_stop_another(capfd, count, start):
    with served(Brightness()) as server, ExitStack() as slow:
        assert post(server, one(GOOD))[0] == 200
        for _ in range(count):
            slow.enter_context(socket.create_connection(server.server_address)).sendall(start)
        threads = threading.active_count()
        assert post(server, one(GOOD)) == (200, {"scores": {"shapes.total": [1.0]}})
        assert threading.active_count() == threads
        end = time.monotonic() + 20
        while len(server.clients) > server.limits.connections and time.monotonic() < end:  # dropped ones still close
            time.sleep(0.01)
        assert len(server.clients) <= server.limits.connections
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_is_dropped_even_at_the_moment_its_request_comes():
    """`asyncio.wait_for` of Python 3.11 swallows a cancellation that comes with its result."""

    async def dropped(server):
        client = serve_scorer.Client(None, None, 9.0)

        async def come():
            asyncio.get_running_loop().call_soon(server._drop, client)

        await server._wait(client, come())
        await asyncio.sleep(0)

    with serve_scorer.Server(Brightness(), port=0) as server, pytest.raises(asyncio.CancelledError):
        asyncio.run(dropped(server))


def held(server):
    return sum(len(client.body) for client in server.clients)


@pytest.mark.parametrize("sent", [2**17, 2**18 - 1])
def test_whoever_sends_slowly_makes_room_for_others(monkeypatch, sent):
    monkeypatch.setattr(serve_scorer, "PACE", 0.1)
    body = one(GOOD).encode().ljust(2**18)
    with served(Brightness(), max_bytes=2**18) as server, ExitStack() as opened:
        slow = [opened.enter_context(socket.create_connection(server.server_address)) for _ in range(20)]
        for each in slow:
            each.sendall(request(body=body)[: sent + 90])
        for k in range(3):
            assert understood(said(server, request(body=body)))[0] == 200
            assert held(server) <= serve_scorer.BODIES * server.limits.max_bytes
            slow[k].sendall(b" ")
        slow[0].settimeout(30)
        assert understood(slow[0].recv(2**16))[0] == 503  # the client tries again


class Waiting(SimpleNamespace):
    __hash__ = object.__hash__


def test_of_bodies_that_wait_for_each_other_the_last_one_makes_room():
    def client(began, body, missing):
        made = Waiting(began=began, moved=began, body=bytearray(body), missing=missing, answered=False)
        made.task = SimpleNamespace(cancel=lambda: dropped.append(began) or server.clients.discard(made))
        return made

    with serve_scorer.Server(Brightness(), port=0, limits=serve_scorer.Limits(max_bytes=100)) as server:
        for scored in (0, 50):
            dropped = []
            first, second, third = client(1, 130 - scored, 70), client(2, 130, 60), client(3, 130, 50)
            server.clients = {first, second, third, client(0, scored, 0)}
            waiting = asyncio.wait_for(server._room(first), 0.2)
            if scored:  # its memory will be free
                with pytest.raises(asyncio.TimeoutError):
                    asyncio.run(waiting)
                assert not dropped
            else:
                asyncio.run(waiting)
                assert dropped == [3]


def test_bodies_wait_for_memory_while_others_are_scored():
    go_on, found = threading.Event(), []
    body = one(GOOD).encode().ljust(2**20)
    with served(Fixed(lambda: go_on.wait() and {"fixed": [3]}), max_bytes=2**20, deadline=0.5) as server:
        asking = [threading.Thread(target=lambda: found.append(post(server, body))) for _ in range(9)]
        for each in asking:
            each.start()
        time.sleep(1)  # the deadline is for what the clients have to do
        assert held(server) <= serve_scorer.BODIES * server.limits.max_bytes and not found
        assert post(server, None, "/", "GET")[0] == 200
        go_on.set()
        for each in asking:
            each.join(60)
    assert found == [(200, {"scores": {"fixed": [3.0]}})] * len(asking)


@pytest.mark.parametrize("count", [3, 12])
def test_many_large_requests_at_once_are_all_answered(count):
    """More than memory holds; each is sent in small parts, so that all are on their way at the same time."""
    body, found = one(GOOD).encode().ljust(2**20), []

    def ask(server):
        data = request(body=body)
        with socket.create_connection(server.server_address, timeout=60) as connection:
            for start in range(0, len(data), 2**15):
                connection.sendall(data[start : start + 2**15])
            found.append(understood(connection.recv(2**16))[0])

    with served(Brightness(), max_bytes=2**20) as server:
        asking = [threading.Thread(target=ask, args=(server,)) for _ in range(count)]
        for each in asking:
            each.start()
        for each in asking:
            each.join(60)
    assert found == [200] * count


# ---- memory

SIZE = 2**22


@pytest.mark.parametrize(
    "body",
    [
        b'{"images": [' + b"{}," * (SIZE // 3) + b"{}]}",
        b"[" + b"{}," * (SIZE // 3) + b"{}]",
        b"[" * SIZE,
        b'{"a":' * (SIZE // 5),
        b'{"images": [' + b'"",' * (SIZE // 3) + b'""]}',
        b'{"images": [' + b"1," * (SIZE // 2),
        b'{"prompts": ["' + b'\\"' * (SIZE // 2) + b'"]}',
        b'{"prompts": ["' + b"\\" * SIZE + b'"]}',
        b'{"prompts": ["' + "😀".encode() * (SIZE // 4) + b'"]}',
        b'{"prompts": ["' + b"\\ud83d\\ude00" * (SIZE // 12) + b'"], "images": ["A"]}',
        b"{" + b" " * SIZE,
    ],
    ids="objects list deep-list deep-object empty numbers quotes backslashes wide escapes space".split(),
)
def test_what_a_body_becomes_is_not_larger_than_a_few_of_it(body):
    with serve_scorer.Server(Brightness(), port=0) as server:
        tracemalloc.start()
        try:
            with pytest.raises(serve_scorer.Refused):
                server.parse(body)
            assert tracemalloc.get_traced_memory()[1] < 8 * SIZE  # json.loads: 20 to 60 times
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("prompt", [*PROMPTS, "\\", '\\"', "😀", "/", "\x00\x7f"])
@pytest.mark.parametrize("ascii", [True, False])
def test_prompts_are_those_that_were_sent(prompt, ascii):
    body = json.dumps({"prompts": [prompt, "b"], "images": ["A/+=", ""]}, ensure_ascii=ascii, indent=1)
    with serve_scorer.Server(Brightness(), port=0) as server:
        assert server.parse(body.encode()) == (["A/+=", ""], [prompt, "b"])
        assert server.parse(body.replace("/", "\\/").encode()) == (["A/+=", ""], [prompt, "b"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"images": ["a"], "prompts": ["b"]} {}', 400),
        ('{"images": ["a"], "prompts": ["b"], "more": 1}', 400),
        ('{"images": ["a"], "images": ["b"]}', 400),
        ('{"images": ["a",], "prompts": ["b"]}', 400),
        ('{"images": ["a" "b"], "prompts": ["b"]}', 400),
        ('{"images": ["a"] "prompts": ["b"]}', 400),
        ('{"images": ["a"], "prompts": ["\\x"]}', 400),
        ('{"images": ["a"], "prompts": ["line\nbreak"]}', 400),
        ('{"images": ["a"], "prompts": ["\\ud800"]}', 400),
        ('{"images": ["a"], "prompts": ["' + "b" * 70_000 + '"]}', 413),
    ],
)
def test_the_form_of_a_body_is_strict(body, status):
    with serve_scorer.Server(Brightness(), port=0) as server:
        with pytest.raises(serve_scorer.Refused) as refused:
            server.parse(body.encode())
        assert refused.value.status == status


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(*chunks):
    plain = base64.b64decode(png(Image.new("RGB", (4, 4), (10, 20, 30))))
    return base64.b64encode(plain[:33] + b"".join(chunks) + plain[33:]).decode()  # behind IHDR


BOMB = zlib.compress(bytes(2**24), 9)


def test_texts_and_profiles_in_a_png_are_not_kept():
    with serve_scorer.Server(Brightness(), port=0) as server:
        texts = [chunk(b"zTXt", b"k%d\0\0" % k + zlib.compress(bytes(2**19), 9)) for k in range(8)]
        image = server.decode(0, with_chunks(*texts))
        assert image.getpixel((0, 0)) == (10, 20, 30) and image.info.keys() <= {"notes", "altered"}
        for bomb in (
            chunk(b"zTXt", b"k\0\0" + BOMB),
            chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
            chunk(b"iCCP", b"k\0\0" + BOMB),
            chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1))) * 70,
        ):
            tracemalloc.start()
            try:
                server.decode(0, with_chunks(bomb))
            except serve_scorer.Refused as refused:
                assert refused.sentence == "image 0 is not a readable PNG"
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert peak < 2**27


def test_16_bits_are_scaled():
    values = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)
    with serve_scorer.Server(Brightness(), port=0) as server:
        found = server.decode(0, png(Image.fromarray(values)))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found)[..., 1], np.arange(0, 256, 17).reshape(4, 4))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_seen_on_white(mode):
    image = Image.new("RGBA", (2, 1), (100, 100, 100, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image = image.convert(mode)
    with serve_scorer.Server(Brightness(), port=0) as server:
        found = server.decode(0, png(image))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(100, 100, 100), (255, 255, 255)]


# ---- the server's life


def test_it_listens_on_loopback_unless_told_otherwise(capsys, monkeypatch):
    with serve_scorer.Server(Brightness(), port=0) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(DiffpoError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use; .*--port"):
            serve_scorer.Server(Brightness(), port=server.server_address[1])
    monkeypatch.setattr(sys, "argv", ["diffpo", "serve-scorer", "shapes"])
    given = []
    monkeypatch.setattr(serve_scorer, "serve", lambda *values: given.append(values[1:]))
    with pytest.raises(SystemExit):
        cli.main()
    assert given == [("127.0.0.1", 8000, serve_scorer.Limits(max_images=32, max_bytes=2**26, max_pixels=2**23))]


def test_names_that_do_not_fit_into_a_url_are_refused():
    scorer = Brightness()
    for names in (("a b",), ("a/b",), ("a" * 101,), ("a\n",), ()):
        scorer.names = names
        with pytest.raises(DiffpoError, match="must consist of letters"):
            serve_scorer.Server(scorer, port=0)


def test_an_answer_in_progress_is_finished_before_the_server_stops():
    started, go_on, found = threading.Event(), threading.Event(), []
    scorer = Fixed(lambda: started.set() or (go_on.wait() and {"fixed": [3]}))
    with served(scorer) as server:
        remote = scorers.load(server.url)
        asking = threading.Thread(target=lambda: found.append(remote.score([Image.new("RGB", (4, 4))], ["a"])))
        asking.start()
        started.wait()
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        stopping.join(0.2)
        assert stopping.is_alive()
        go_on.set()
        stopping.join(60)
        asking.join(60)
        assert not stopping.is_alive() and found[0]["fixed"].tolist() == [3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(number):
    command = [sys.executable, "-m", "diffpo.cli", "serve-scorer", "shapes", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        words = process.stdout.readline().split()
        url = words[words.index("on") + 1].rstrip(";")
        images, prompts = [Image.new("RGB", (32, 32), "red")] * 2, load_prompts("shapes:train:2")
        found, local = (scorers.load(spec).score(images, prompts) for spec in (url, "shapes"))
        for name, values in local.items():
            np.testing.assert_array_equal(found[name], values)
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stderr.read() == "stopping\n"
    finally:
        process.kill()
        process.communicate()


def test_the_server_can_be_imported_where_little_is_installed():
    source = Path(serve_scorer.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))
    code = "import sys, diffpo.scorers.server; print({'numpy', 'torch', 'typer', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
