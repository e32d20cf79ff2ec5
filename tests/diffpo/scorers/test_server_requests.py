"""Requests to the server: what it refuses, each in one sentence, and how strictly it reads HTTP."""

import json

import pytest
from http_scorers import GOOD, header, one, png, post, request, said, served, understood
from on_policy import Brightness
from PIL import Image

from diffpo.scorers.server import connection


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(connection, "LINGER", 0.3)


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
