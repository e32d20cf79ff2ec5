"""The server, asked by hand: what it says, what it refuses, and clients that misbehave."""

import ast
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from http_scorers import Both, Fixed, header, png, served
from on_policy import Brightness
from PIL import Image

from diffpo import cli, scorers, serve_scorer
from diffpo.errors import DiffpoError
from diffpo.prompts import load_prompts


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
        assert post(server, None, "/score", "GET") == (404, {"error": "there is GET / and POST /score"})
        assert post(server, one(GOOD), method="DELETE")[0] == 501
        assert post(server, one(GOOD), **{"Content-Type": "text/plain"})[0] == 415  # a web page could send that
        assert post(server, iter([b"{}"]))[0] == 411  # chunks
        for length in ("-1", "1e3", ""):
            assert post(server, "", **{"Content-Length": length})[0] == 411
        assert post(server, "", **{"Content-Length": "9" * 5000})[0] == 413
    assert "Traceback" not in capfd.readouterr().err


def test_clients_that_hang_up_or_send_rubbish_do_no_harm(capfd, monkeypatch):
    monkeypatch.setattr(serve_scorer.Handler, "timeout", 0.2)
    with served(Brightness()) as server:
        start = f"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{one(GOOD)[:50]}"
        for data, reset in (
            (b"", False),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200), False),  # TLS
            (b"GET / HTTP/9.9\r\n\r\n", False),
            (b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n", False),
            (start.encode(), False),
            (start.encode(), True),
        ):
            with socket.create_connection(server.server_address) as connection:
                connection.sendall(data)
                if reset:  # close with RST
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with socket.create_connection(server.server_address) as silent:
            silent.sendall(start.encode())
            silent.settimeout(30)
            assert silent.recv(1) == b"", "a client that falls silent is dropped"
        assert post(server, one(GOOD))[0] == 200
        assert server.slots.acquire(blocking=False)
    assert "Traceback" not in capfd.readouterr().err


# ---- the server's life


def test_it_listens_on_loopback_unless_told_otherwise(capsys, monkeypatch):
    with serve_scorer.Server(Brightness(), port=0) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(DiffpoError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use; .*--port"):
            serve_scorer.Server(Brightness(), port=server.server_address[1])
    monkeypatch.setattr(sys, "argv", ["diffpo", "serve-scorer", "shapes"])
    given = []
    monkeypatch.setattr(serve_scorer, "serve", lambda *values, **limits: given.append((values[1:], limits)))
    with pytest.raises(SystemExit):
        cli.main()
    assert given == [(("127.0.0.1", 8000), {"max_images": 32, "max_bytes": 2**26, "max_pixels": 2**23})]


def test_names_that_do_not_fit_into_a_url_are_refused():
    scorer = Brightness()
    for names in (("a b",), ("a/b",), ()):
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
        stopping = threading.Thread(target=server.finish)
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
    code = "import sys, diffpo.serve_scorer; print({'numpy', 'torch', 'typer', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
