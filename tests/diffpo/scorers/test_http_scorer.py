"""The client: what it gives, and what it makes of servers that misbehave."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from http_scorers import PROMPTS, Both, Fixed, foreign, pictures, png, served, speaking
from on_policy import Brightness
from PIL import Image

import diffpo.scorers.client as client
from diffpo import scorers
from diffpo.common.errors import DiffpoError
from diffpo.common.instruction import Instruction
from diffpo.scorers import server as serve_scorer


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.0, 0.01, 0.02))


@pytest.fixture(scope="module")
def images():
    return pictures()


# ---- what comes back


def test_numbers_over_http_are_the_scorers_own_exactly_and_batches_are_split(images):
    local = Both().score(images, PROMPTS)
    scorer = Both()
    with served(scorer, max_images=3) as server:
        remote = scorers.load(server.url)
        assert (remote.names, remote.optional) == (scorer.names, scorer.optional)
        found = remote.score(images, PROMPTS)
        assert scorer.batches == [3, 3, 1]
        only = scorers.load(f"{server.url}/both.long").score(images, PROMPTS)
        assert remote.score([], [])["both.mean"].shape == (0,)
    assert list(found) == ["both.mean", "both.long"] and list(only) == ["both.long"]
    for name, values in local.items():
        assert found[name].dtype == np.float64
        np.testing.assert_array_equal(found[name], values)  # NaN where the scorer says NaN
    np.testing.assert_array_equal(only["both.long"], local["both.long"])


class Edits:
    """The brightness of an image, and of each picture that its prompt is about, as digits of one number."""

    names, optional = ("edits",), frozenset()

    def __init__(self):
        self.batches = []

    def score(self, images, prompts):
        self.batches.append(len(images))
        rows = [
            [image, *(prompt.pictures() if isinstance(prompt, Instruction) else [])]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        found = [sum(1000**k * np.asarray(each).mean() for k, each in enumerate(row)) for row in rows]
        return {"edits": np.array(found)}


def test_the_pictures_that_prompts_are_about_travel_too(tmp_path):
    """In their order, to the image that they belong to; a request has at most as many sources as images."""
    images = [Image.new("RGB", (8, 8), (level,) * 3) for level in range(1, 7)]
    for level in (7, 8):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{level}.png")
    files = [tmp_path / "7.png", tmp_path / "8.png"]
    prompts = ["x", Instruction("x", files), Instruction("x", files[::-1]), "x", Instruction("x", files[0]), "x"]
    scorer = Edits()
    with served(scorer, max_images=3) as server:
        found = scorers.load(server.url).score(images, prompts)["edits"]
        assert scorer.batches == [2, 3, 1]
        server.about.pop("sources")  # as of an earlier version
        with pytest.raises(DiffpoError, match=rf"{server.url} takes no pictures.*'x'"):
            scorers.load(server.url).score(images, prompts)
        assert scorers.load(server.url).score(images[:1], ["x"])["edits"] == [1]
    assert found.tolist() == [1, 8_007_002, 7_008_003, 4, 7_005, 6]


def test_batches_keep_to_the_servers_bytes(images):
    each = [len(json.dumps({"images": [png(image)], "prompts": [p]})) for image, p in zip(images, PROMPTS, strict=True)]
    scorer = Both()
    with served(scorer, max_bytes=max(each) + 200) as server:
        found = scorers.load(server.url).score(images, PROMPTS)
        assert scorer.batches == [1] * 7
        server.about["max_bytes"] = max(each) - 200  # as it would be on a server with less
        with pytest.raises(DiffpoError, match=rf"{server.url} takes {max(each) - 200}\. .*--max-bytes"):
            scorers.load(server.url).score(images, PROMPTS)
    np.testing.assert_array_equal(found["both.mean"], Both().score(images, PROMPTS)["both.mean"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            {"fixed": [np.nan, 1]},
            r"\(status 500\): the scorer gave fixed = nan for image 0 .*'cat'",
        ),
        ({"fixed": [1, np.inf]}, "fixed = inf for image 1 of the prompt 'dog'"),
        ({"fixed": [1]}, "gave 1 numbers 'fixed' for 2 images"),
        ({"other": [1, 2]}, "gave no numbers 'fixed'"),
        ({"fixed": ["x", 1]}, "gave no numbers 'fixed'"),
        (None, "gave no numbers 'fixed'"),
        (lambda: 1 / 0, r"\(status 500\): the scorer failed: ZeroDivisionError: division by zero"),
        (lambda: scorers.parse("hsp"), r"\(status 422\): unknown scorer 'hsp': did you mean hps"),
    ],
)
def test_a_scorer_that_fails_is_an_error_that_names_the_url(images, capfd, answer, words):
    with served(Fixed(answer)) as server:
        with pytest.raises(DiffpoError, match=f"^the scorer at {server.url} .*{words}") as caught:
            scorers.load(server.url).score(images[:2], ["cat", "dog"])
        assert "\n" not in str(caught.value)
        assert scorers.load(server.url).names == ("fixed",)
    if "ZeroDivision" in words:
        assert "1 / 0" in capfd.readouterr().err  # whoever runs the server sees where


# ---- servers that misbehave


def test_a_server_that_is_down_is_named_with_the_next_step(capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(DiffpoError, match=rf"{url}: Connection refused \(4 attempts\)\. Start it .*serve-scorer"):
        scorers.load(url)
    assert capfd.readouterr().err.count("trying again") == 3


def test_a_server_that_comes_up_late_is_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    late = []
    late_sleep = SimpleNamespace(sleep=lambda s: late.append(start()), monotonic=time.monotonic)
    monkeypatch.setattr(client, "time", late_sleep)

    def start():
        server = serve_scorer.Server(Brightness(), port=port)
        threading.Thread(target=server.serve_forever).start()
        return server

    assert scorers.load(f"http://127.0.0.1:{port}").names == Brightness.names
    assert len(late) == 1
    late[0].shutdown()
    late[0].server_close()


def test_a_slow_server_runs_into_the_time_out(images, monkeypatch):
    go_on = threading.Event()
    with served(Fixed(lambda: go_on.wait() and {"fixed": [1]})) as server:
        remote = scorers.load(server.url)
        with monkeypatch.context() as patch:
            patch.setattr(client, "TIMEOUT", 0.2)
            started = time.monotonic()
            with pytest.raises(DiffpoError, match=rf"{server.url}: no answer within 0\.2 s \(4 attempts\).*max-images"):
                remote.score(images[:1], ["a"])
            assert time.monotonic() - started >= 0.8
        assert scorers.load(server.url).names == ("fixed",), "it says what it is while it scores"
        go_on.set()
        assert remote.score(images[:1], ["a"])["fixed"].tolist() == [1]


def test_busy_is_tried_again_and_refusals_are_not(images, capfd):
    busy = (503, '{"error": "loading"}')
    with foreign(lambda path, n: None if n == 1 else busy if n < 4 else (200, '{"scores": {"fixed": [7]}}')) as server:
        assert scorers.load(server.url).score(images[:1], ["a"])["fixed"].tolist() == [7]
        assert server.asked == ["/", "/score", "/score", "/score"]
    assert capfd.readouterr().err.count("loading; trying again") == 2
    with foreign(lambda path, n: busy) as server:
        with pytest.raises(DiffpoError, match=r"loading \(4 attempts\)"):
            scorers.load(server.url)
    for status in (400, 500):
        with foreign(lambda path, n, status=status: (status, '{"error": "no \\u001b[31m"}')) as server:
            with pytest.raises(DiffpoError, match=rf"{server.url} .*\(status {status}\): no \[31m$"):
                scorers.load(server.url)
            assert len(server.asked) == 1


@pytest.mark.parametrize(
    "numbers",
    ["[NaN]", "[1e999]", "[-1e39]", "[null]", "[true]", '["1"]', "[1, 2]", "[]", "7", f"[{10**400}]", "[[1]]", "[{}]"],
)
def test_numbers_that_are_none_are_refused(images, numbers):
    with foreign(lambda path, n: (200, f'{{"scores": {{"fixed": {numbers}}}}}') if n > 1 else None) as server:
        with pytest.raises(DiffpoError, match=f"^the scorer at {server.url} gave .*fixed"):
            scorers.load(server.url).score(images[:1], ["a cat"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, "<html>"), r"server at http.* \(status 200\) is not a scorer"),
        ((200, "[" * 100_000), "is not a scorer"),
        ((404, "<html>"), r"\(status 404\) is not a scorer"),
        ((302, "", ("Location", "file:///etc/passwd")), r"\(status 302\) is not a scorer"),
        ((200, "{}"), "protocol 1"),
        ((200, '{"protocol": 2, "names": ["a"], "optional": [], "max_images": 9, "max_bytes": 9}'), "protocol 1"),
        ((200, '{"protocol": 1, "names": "ab", "optional": [], "max_images": 9, "max_bytes": 9}'), "protocol 1"),
        ((200, '{"protocol": 1, "names": ["<b>"], "optional": [], "max_images": 9, "max_bytes": 9}'), "protocol 1"),
        ((200, '{"protocol": 1, "names": ["a"], "optional": [], "max_images": 0, "max_bytes": 9}'), "protocol 1"),
        ((200, "{", ("Content-Length", "99")), "IncompleteRead.*4 attempts"),
        ((200, " " * 2**20), "more than 1048576 bytes"),
        ((200, "{" + '"a":{' * 900), "is not a scorer"),
    ],
)
def test_what_is_no_scorer_is_said(answer, words):
    with foreign(lambda path, n: answer) as server:
        with pytest.raises(DiffpoError, match=words):
            scorers.load(server.url)


@pytest.mark.parametrize("key", ["names", "optional"])
@pytest.mark.parametrize(
    "names",
    [
        ["a", 1],
        [None],
        [["a"]],
        [{"a": 1}],
        {"a": 1},
        [""],
        ["a\n"],
        ["a\u202eb"],
        ["\x1b[31m"],
        ["$x$"],
        ["a" * 101],
        [f"n{k}" for k in range(257)],
        7,
    ],
    ids=repr,
)
def test_names_of_numbers_are_names(names, key):
    about = {"protocol": 1, "names": ["a"], "optional": [], "max_images": 9, "max_bytes": 9, key: names}
    with foreign(lambda path, n: (200, json.dumps(about))) as server:
        with pytest.raises(DiffpoError, match="protocol 1") as caught:
            scorers.load(server.url)
        assert len(str(caught.value)) < 300
        about |= {"names": ["a", "a"], "optional": []}
        with pytest.raises(DiffpoError, match="protocol 1"):
            scorers.load(server.url)


HELLO = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("pause", [0, 0.02])
@pytest.mark.parametrize(
    "parts",
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
        (b"HTTP/1.1 100 Continue\r\nA: b\r\n", b"A: b\r\n"),
        (HELLO, b"A: b\r\n"),
        (HELLO, b"A"),
        (b"H",),
        (HELLO + b"\r\n", b"1"),
        (HELLO + b"Content-Length: 999999999\r\n\r\n", b" "),
        (HELLO + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (HELLO + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
    ],
    ids=["100", "100 with headers", "headers", "a header", "a status", "all", "length", "chunks", "trailers"],
)
def test_answers_without_end_are_given_up(monkeypatch, parts, pause):
    """Fast ones by their size, slow ones by the time, however often a byte comes."""
    monkeypatch.setattr(client, "TIMEOUT", 0.15 if pause else 60.0)
    monkeypatch.setattr(client, "WAITS", (0.0,))
    parts = (*parts[:-1], parts[-1] if pause else parts[-1] * 2000)
    with speaking(*parts, pause=pause, forever=True) as url:
        with pytest.raises(DiffpoError, match=rf"^cannot reach the scorer at {url}: ") as caught:
            scorers.load(url)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    assert ("no answer within 0.15 s (2 attempts)" in str(caught.value)) == bool(pause)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0",
        b"\x1b[31m\r\n\r\n",
        b"HTTP/1.1 2\r\n\r\n",
        b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 400 \x1b[31m\r\n\r\n{}",
        HELLO + b"\xff\0: \x1b\r\n\r\n{}",
        HELLO + b"Content-Length: -5\r\n\r\n{}",
        HELLO + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
        HELLO + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
        HELLO + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}",
        HELLO + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        HELLO + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 3000 + b"\r\n{}",
        HELLO + b"\r\n\xff\xfe\0",
        HELLO + b"\r\n" + b"9" * 5000,
        HELLO + b"\r\n" + b"[" * 10**5,
        b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
        b'HTTP/1.1 500 No\r\n\r\n{"error": "\\u001b[31m \\u202e \\ud800 ' + b"x" * 10**5 + b'"}',
    ],
)
def test_odd_answers_are_one_line(monkeypatch, answer):
    monkeypatch.setattr(client, "WAITS", ())
    with speaking(answer) as url:
        with pytest.raises(DiffpoError, match=url) as caught:
            scorers.load(url)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch, images):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with served(Brightness()) as server:
        assert scorers.load(server.url).names == Brightness.names
