"""A hub that hangs, fails or closes the connection: one message within a time limit, and no partial file is used."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

INDEX = b'{"_class_name": "StableDiffusionPipeline"}' + b" " * 1000

CHILD = """
import json, sys, time, urllib.request
sys.modules["bitsandbytes"] = None  # peft imports it if it can, which takes seconds
from huggingface_hub import constants, file_download
from diffpo import models
from diffpo.common import hub
from diffpo.config import Data, Model
from diffpo.data.groups import load_groups

hub.SILENCE = file_download._ETAG_RETRY_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = 0.1
time.sleep = lambda seconds: None  # between two attempts

def tell(what, call):
    started = time.perf_counter()
    try:
        answer = [None, call()]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps([what, *answer, time.perf_counter() - started]), flush=True)

for fault in ("hang", "500", "429", "torn"):
    name = f"someone/{fault}"
    tell(f"model {fault}", lambda: models.pipeline_class(Model(path=name)))
    tell(f"data {fault}", lambda: load_groups(Data(resolution=8), name, "train"))
for mode in ("hang", "500", "429"):
    urllib.request.urlopen(urllib.request.Request(f"{constants.ENDPOINT}/become/{mode}", method="PUT"))
    tell(f"push {mode}", lambda: hub.client("me/style"))
urllib.request.urlopen(urllib.request.Request(f"{constants.ENDPOINT}/become/whole", method="PUT"))
tell("model again", lambda: models.pipeline_class(Model(path="someone/torn")))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers to requests for a file of someone/FAULT, and for the user's name."""

    protocol_version = "HTTP/1.1"
    mode, done = "", threading.Event()

    def answer(self):
        if self.command == "PUT":
            Hub.mode = self.path.rpartition("/")[2]
            return self.reply(200, b"")
        fault = Hub.mode or next(part for part in self.path.split("/") if part in ("hang", "500", "429", "torn"))
        if fault == "hang":
            self.close_connection = True
            Hub.done.wait(60)
        elif fault in ("torn", "whole"):
            self.reply(200, INDEX, torn=fault == "torn")
        else:
            self.reply(int(fault), b"oops")

    do_GET = do_HEAD = do_PUT = answer

    def reply(self, status, content, torn=False):
        self.send_response(status)
        self.send_header("ETag", '"' + "b" * 40 + '"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:42] if torn else content)  # all that is read of it
            self.close_connection |= torn

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        Hub.done.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The results of a separate process: {call: (exception, message or value, seconds)}."""
    home = tmp_path_factory.mktemp("hub")
    with served() as url:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **{"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_TELEMETRY": "1"},
        }
        root = Path(__file__).parents[3]
        run = subprocess.run(
            [sys.executable, "-c", CHILD], env=environment, cwd=root, capture_output=True, text=True, timeout=60
        )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert run.returncode == 0, run.stderr
    return {what: rest for what, *rest in lines}


@pytest.mark.parametrize("fault", ["hang", "500", "429", "torn"])
def test_a_failed_download_of_a_model_or_data_is_named(answers, fault):
    for what in ("model", "data"):
        kind, message, seconds = answers[f"{what} {fault}"]
        assert kind == "DiffpoError" and f"someone/{fault}" in message and "hf download" in message
        assert seconds < 10  # of time-outs of 0.1 s
    why = {"hang": "timed out", "500": "500 Internal", "429": "429 Too Many", "torn": "incomplete|complete message"}
    assert any(each in answers[f"model {fault}"][1] for each in why[fault].split("|"))


def test_a_partial_download_is_repeated(answers):
    assert answers["model again"][:2] == [None, "StableDiffusionPipeline"]


@pytest.mark.parametrize("fault", ["hang", "500", "429"])
def test_pushing_is_refused_before_anything_is_written(answers, fault):
    kind, message, seconds = answers[f"push {fault}"]
    assert kind == "DiffpoError" and "me/style" in message and "hf auth login" in message
    assert seconds < 5
