"""The client: what it gives, and what it makes of servers that misbehave."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from http_scorers import PROMPTS, Both, Fixed, foreign, pictures, png, served
from on_policy import Brightness

import diffpo.scorers.http as client
from diffpo import scorers, serve_scorer
from diffpo.errors import DiffpoError


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


def test_batches_keep_to_the_servers_bytes(images):
    each = [len(json.dumps({"images": [png(image)], "prompts": [p]})) for image, p in zip(images, PROMPTS, strict=True)]
    scorer = Both()
    with served(scorer, max_bytes=max(each) + 200) as server:
        found = scorers.load(server.url).score(images, PROMPTS)
        assert scorer.batches == [1] * 7
        server.about["max_bytes"] = max(each) - 200  # as it would be on a server with less
        with pytest.raises(DiffpoError, match=rf"{server.url} takes {max(each) - 200}: .*--max-bytes"):
            scorers.load(server.url).score(images, PROMPTS)
    np.testing.assert_array_equal(found["both.mean"], Both().score(images, PROMPTS)["both.mean"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            {"fixed": [np.nan, 1]},
            r"refused \(status 500\): the scorer gave fixed = nan for image 0 .*'cat'",
        ),
        ({"fixed": [1, np.inf]}, "fixed = inf for image 1 of the prompt 'dog'"),
        ({"fixed": [1]}, "gave 1 numbers 'fixed' for 2 images"),
        ({"other": [1, 2]}, "gave no numbers 'fixed'"),
        ({"fixed": ["x", 1]}, "gave no numbers 'fixed'"),
        (None, "gave no numbers 'fixed'"),
        (lambda: 1 / 0, r"\(status 500\): the scorer failed: ZeroDivisionError: division by zero"),
        (lambda: scorers.check_name("hsp"), r"\(status 422\): unknown scorer 'hsp', did you mean 'hps'"),
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
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda s: late.append(start())))

    def start():
        server = serve_scorer.Server(Brightness(), port=port)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
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
            with pytest.raises(DiffpoError, match=rf"refused \(status {status}\): no  \[31m"):
                scorers.load(server.url)
            assert len(server.asked) == 1


@pytest.mark.parametrize(
    "numbers",
    ["[NaN]", "[1e999]", "[null]", "[true]", '["1"]', "[1, 2]", "[]", "7", f"[{10**400}]", "[[1]]"],
)
def test_numbers_that_are_none_are_refused(images, numbers):
    with foreign(lambda path, n: (200, f'{{"scores": {{"fixed": {numbers}}}}}') if n > 1 else None) as server:
        with pytest.raises(DiffpoError, match=f"^the scorer at {server.url} gave .*fixed"):
            scorers.load(server.url).score(images[:1], ["a cat"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, "<html>"), r"what answers at .* \(status 200\) is no scorer"),
        ((200, "[" * 100_000), "is no scorer"),
        ((404, "<html>"), r"\(status 404\) is no scorer"),
        ((302, "", ("Location", "file:///etc/passwd")), r"\(status 302\) is no scorer"),
        ((200, "{}"), "does not describe itself"),
        ((200, '{"protocol": 2, "names": ["a"], "optional": [], "max_images": 9, "max_bytes": 9}'), "protocol 1"),
        ((200, '{"protocol": 1, "names": "ab", "optional": [], "max_images": 9, "max_bytes": 9}'), "not describe"),
        ((200, '{"protocol": 1, "names": ["<b>"], "optional": [], "max_images": 9, "max_bytes": 9}'), "not describe"),
        ((200, '{"protocol": 1, "names": ["a"], "optional": [], "max_images": 0, "max_bytes": 9}'), "not describe"),
        ((200, "{", ("Content-Length", "99")), "IncompleteRead.*4 attempts"),
    ],
)
def test_what_is_no_scorer_is_said(answer, words):
    with foreign(lambda path, n: answer) as server:
        with pytest.raises(DiffpoError, match=words):
            scorers.load(server.url)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch, images):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with served(Brightness()) as server:
        assert scorers.load(server.url).names == Brightness.names
