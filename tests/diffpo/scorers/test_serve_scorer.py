"""The server of scores: its description, its address, its end."""

import ast
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from http_scorers import Both, Fixed, post, served
from on_policy import Brightness
from PIL import Image

from diffpo import cli, scorers
from diffpo.common.errors import DiffpoError
from diffpo.data.prompts import load_prompts
from diffpo.scorers import server as serve_scorer
from diffpo.scorers.server import connection


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(connection, "LINGER", 0.3)


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
        "sources": True,
    }


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
    for path in Path(serve_scorer.__file__).parent.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))
    code = "import sys, diffpo.scorers.server; print({'numpy', 'torch', 'typer', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
