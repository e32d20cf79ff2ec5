"""The judge over chat completions, against a stub server that speaks the documented API and can misbehave."""

import base64
import contextlib
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from diffpo import scorers
from diffpo.common.errors import DiffpoError
from diffpo.common.instruction import Instruction
from diffpo.scorers import chat
from diffpo.scorers.vlm import JudgeSettings, VlmJudge

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(chat, "WAITS", (0.0, 0.01, 0.02))
    monkeypatch.setattr(chat, "LONGEST", 0.05)


@contextlib.contextmanager
def serving(answer):
    """A server whose every request is answered by ``answer(request, number)``: (status, headers, content)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), asked))
            status, headers, content = answer(asked, len(requests))
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            with contextlib.suppress(OSError):  # the client has given up
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def reply(top, text=None):
    """An answer as vLLM and OpenAI give it, for {token: probability}."""
    listed = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in top.items()]
    best = max(top, key=top.get) if top else ""
    content = [{"token": best, "logprob": 0.0, "bytes": [], "top_logprobs": listed}]
    message = {"role": "assistant", "content": best if text is None else text}
    return {"choices": [{"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "length"}]}


def good(request, _):
    """Yes with the brightness of the first picture as probability."""
    light = shown(request)[0]
    return 200, {}, reply({"Yes": light * 0.9, " yes": light * 0.1, "No": 1 - light})


def shown(request):
    """Brightness, 0 to 1, of the pictures of a request."""
    parts = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(part.removeprefix("data:image/png;base64,")))) for part in parts]
    return [np.asarray(picture).mean() / 255 for picture in pictures]


def grey(level):
    return Image.new("RGB", (5, 4), (level,) * 3)


def judge(url, **settings):
    return VlmJudge(JudgeSettings(url=url, model="some/model", **settings))


LIGHT = [grey(51), grey(204), grey(102)]


def test_vqascore_is_the_probability_of_yes(tmp_path):
    """The question as published, one token, greedy; the order of pictures is kept although they are asked at once."""
    with serving(good) as (url, requests):
        file = tmp_path / "judge.yaml"
        file.write_text(f"url: {url}\nmodel: some/model\nextra: {{seed: 1}}\n")
        scorer = scorers.load(f"judge={file}")
        found = scorer.score(LIGHT, ["cat", "dog", 'a "fox"'])
    assert found["judge"] == pytest.approx([0.2, 0.8, 0.4], abs=1e-9) and found["judge"].dtype == np.float64
    assert scorer.names == ("judge",) and scorer.reads_prompt
    path, headers, request = min(requests, key=lambda each: json.dumps(each[2])[-40:])
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert (request["max_tokens"], request["temperature"], request["logprobs"], request["seed"]) == (1, 0.0, True, 1)
    asked = {each[2]["messages"][0]["content"][-1]["text"] for each in requests}
    assert 'Does this figure show "a "fox""? Please answer yes or no.' in asked and len(asked) == 3


def test_marks_are_weighted_by_their_probabilities():
    top = {"4": 0.5, "5": 0.25, "3": 0.05, "The": 0.2}
    with serving(lambda *_: (200, {}, reply(top))) as (url, _):
        marks = {str(i): i for i in range(1, 6)}
        raw = judge(url, answers=marks).score([grey(0)], ["x"])["judge"]
        mean = judge(url, answers=marks, normalise=True, name="mark").score([grey(0)], ["x"])["mark"]
    assert raw == pytest.approx([0.5 * 4 + 0.25 * 5 + 0.05 * 3]) and mean == pytest.approx(raw / 0.8)


def test_edits_are_judged_beside_the_picture_that_they_are_of(tmp_path):
    """Source first, then the result; marks from 0 to 5 by their probabilities, as a share: (2 x 0.3 + 5 x 0.6)/(5 x
    0.9)."""
    grey(51).save(tmp_path / "before.png")
    prompt, shows = Instruction("brighter", tmp_path / "before.png"), [0.2, 0.8]

    def marks(request, _):
        assert shown(request) == pytest.approx(shows)
        return 200, {}, reply({"5": 0.6, " 2": 0.3, "very": 0.1})

    with serving(marks) as (url, requests):
        scorer = judge(url, edits=True)
        scorer.check_prompts([prompt])
        found = scorer.score([grey(204)], [prompt])
        asked = requests[0][2]["messages"][0]["content"][-1]["text"]
        assert '"brighter"' in asked and "from 0" in asked
        own = judge(url, edits=True, question="Better?", answers={"5": 1.0}).score([grey(204)], [prompt])
        with pytest.raises(DiffpoError, match=r"'brighter'.*--source"):
            scorer.score([grey(204)], ["brighter"])
        grey(102).save(tmp_path / "other.png")
        shows[:] = [0.2, 0.4, 0.8]
        scorer.score([grey(204)], [Instruction("brighter", [tmp_path / "before.png", tmp_path / "other.png"])])
        several = requests[-1][2]["messages"][0]["content"][-1]["text"]
        assert "The last image" in several and "The second image" not in several and "The second image" in asked
    assert found["judge"] == pytest.approx([(2 * 0.3 + 5 * 0.6) / (5 * 0.9)])
    assert own["judge"] == pytest.approx([0.6])


def test_yaml_reads_yes_as_a_truth_value_and_the_answers_do_not():
    settings = JudgeSettings(url="http://x/v1", model="m", answers={True: 1, False: 0.5})
    assert settings.worth == {"Yes": 1.0, "No": 0.5}


def test_numbers_of_a_text_are_read_by_name():
    text = "Alignment Score (1-5): 4.5\nStyle Score (1-5): 3"
    with serving(lambda *_: (200, {}, reply({}, text))) as (url, requests):
        patterns = {"alignment": r"Alignment Score \(1-5\): ([0-9.]+)", "style": r"Style Score \(1-5\): ([0-9.]+)"}
        found = judge(url, numbers=patterns, name="unified").score(LIGHT[:2], ["a", "b"])
    assert {name: values.tolist() for name, values in found.items()} == {
        "unified.alignment": [4.5, 4.5],
        "unified.style": [3, 3],
    }
    assert "logprobs" not in requests[0][2] and requests[0][2]["max_tokens"] == 1024


def test_a_liking_for_the_first_place_cancels():
    """P(first) = 0.2 + 0.6 [the first is lighter] + 0.2 whatever is there: asked in one order it is biased by 0.1."""

    def biased(request, _):
        one, other = shown(request)
        first = 0.3 + 0.5 * (one > other) + 0.1
        return 200, {}, reply({"first": first * 0.5, "First": first * 0.5, "second": 1 - first})

    with serving(biased) as (url, _):
        found = judge(url).compare([grey(200), grey(10)], [grey(100), grey(100)], ["a", "b"])
    np.testing.assert_allclose(found.by_order, [[0.9, 0.6], [0.4, 0.1]], atol=1e-9)
    np.testing.assert_allclose(found.value, [0.75, 0.25], atol=1e-9)  # symmetric about a half


def test_the_key_is_sent_and_never_said(monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def refusing(request, number):
        return (429 if number < 3 else 401), {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}}

    with serving(refusing) as (url, requests):
        with pytest.raises(DiffpoError, match=r"refused \(status 401\).*\*\*\*.*variable JUDGE_KEY") as caught:
            judge(url, key_from="JUDGE_KEY", parallel=1).score(LIGHT[:1], ["a"])
        assert {headers["Authorization"] for _, headers, _ in requests} == {f"Bearer {KEY}"}
    assert KEY not in str(caught.value) + "".join(capfd.readouterr())
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(DiffpoError, match="set the environment variable JUDGE_KEY"):
        judge("http://127.0.0.1:1/v1", key_from="JUDGE_KEY")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_temporary_failures_are_tried_again(status, capfd):
    def twice(request, number):
        if number < 3:
            return status, {"Retry-After": "0.03"}, {"error": {"message": "busy"}}
        return good(request, number)

    start = time.monotonic()
    with serving(twice) as (url, requests):
        assert judge(url).score(LIGHT[:1], ["a"])["judge"] == pytest.approx([0.2])
    assert len(requests) == 3 and time.monotonic() - start >= 0.06  # as the server asked
    assert capfd.readouterr().err.count(f"status {status} busy; trying again") == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, {}, {"error": "out of memory"}), r"status 500 out of memory \(4 attempts\)"),
        (
            (404, {}, {"error": {"message": "no model some/model"}}),
            r"status 404\): no model some/model\. Check url and",
        ),
        ((400, {}, {"message": "logprobs is too large"}), r"status 400\): logprobs is too large"),
        ((200, {}, b"<html>"), "does not answer with JSON"),
        ((200, {}, {"choices": []}), "another form than that of chat completions"),
        ((200, {}, {"choices": [{"message": {"content": "Yes"}, "logprobs": None}]}), r"no log-probabilities.*numbers"),
        ((200, {"Content-Length": "999"}, b'{"choices"'), r"\(4 attempts\)"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), r"refused \(status 302\)"),
    ],
)
def test_servers_that_misbehave_are_one_message(answer, said):
    with serving(lambda *_: answer) as (url, _), pytest.raises(DiffpoError, match=said) as caught:
        judge(url).score(LIGHT, ["a", "b", "c"])
    assert "\n" not in str(caught.value) and url in str(caught.value)


def test_a_slow_server_runs_into_the_time_out():
    go_on = threading.Event()

    def slow(*_):
        go_on.wait(5)
        return 200, {}, b"{}"

    with serving(slow) as (url, _):
        with pytest.raises(DiffpoError, match=r"no answer within 0\.1 s \(4 attempts\).*timeout"):
            judge(url, timeout=0.1).score(LIGHT[:1], ["a"])
        go_on.set()


def test_nonsense_is_counted_and_a_judge_of_nonsense_refused():
    def odd(request, number):
        light = shown(request)[0]
        return 200, {}, reply({"Perhaps": 0.6, "Yes": 0.4} if light < 0.1 else {"Yes": light, "No": 1 - light})

    with serving(odd) as (url, _):
        scorer = judge(url)
        found = scorer.score([grey(204)] * 7 + [grey(0)], ["x"] * 8)["judge"]
        assert np.isnan(found[-1]) and found[:-1] == pytest.approx([0.8] * 7)
        assert (scorer.asked, scorer.nonsense) == (8, 1)
        with pytest.raises(
            DiffpoError, match=r"gave 4 answers of 11 that cannot be read, e\.g\. 'Perhaps', where one of Yes"
        ):
            scorer.score([grey(0)] * 3, ["x"] * 3)
        with pytest.raises(DiffpoError, match="text with the numbers is expected"):
            judge(url, numbers={"a": "Score: ([0-9]+)"}).score([grey(0)] * 4, ["x"] * 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m", "missing key url"),
        ("url: http://x/v1\nmodel: m\nquestoin: x", "questoin: did you mean question"),
        ("url: http://x/v1\nmodel: m\nnumbers: {a: 'no group'}", "numbers.a needs one group"),
        ("url: http://x/v1\nmodel: m\nnumbers: {a: '('}", "numbers.a is not a regular expression"),
        ("url: http://x/v1\nmodel: m\nanswers: {Yes: 1, 'yes ': 0}", "answers must be different words"),
        ("url: http://x/v1\nmodel: m\nanswers: {A: 1}\nnumbers: {a: '(1)'}", "set one of them"),
        ("url: ftp://x\nmodel: m", "is not the address of a judge"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, text, said):
    file = tmp_path / "judge.yaml"
    file.write_text(text)
    with pytest.raises(DiffpoError, match=said):
        scorers.load(f"judge={file}")
    with pytest.raises(DiffpoError, match=r"judge=FILE\.yaml"):
        scorers.load("judge")
