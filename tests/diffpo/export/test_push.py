"""`diffpo export --push`: the real client of the hub against a stand-in of its HTTP API on this machine."""

import base64
import json
import re
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from PIL import Image
from test_export import results_of

from diffpo.common.errors import DiffpoError
from diffpo.export import export
from diffpo.weights import lora_file

TOKEN = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    """Keeps one repository. ``refuse``: a part of the path whose requests fail, and the status."""

    protocol_version = "HTTP/1.1"
    refuse, files, created, asked = ("", 0), {}, [], []

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.answer(body)

    def answer(self, body):
        Hub.asked.append(self.path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply({"error": "log in"}, 401)
        part, status = Hub.refuse
        if part and part in self.path:
            return self.reply({"error": "no room"}, status)
        if self.path == "/api/whoami-v2":
            return self.reply({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        if self.path == "/api/repos/create":
            Hub.created.append(json.loads(body))
            return self.reply({"url": f"{URL}/me/style", "id": "me/style"})
        if self.path == "/api/validate-yaml":
            header = json.loads(body)["content"].split("---")[1]
            fine = isinstance(yaml.safe_load(header), dict)
            return self.reply(
                {"errors": [] if fine else [{"message": "no YAML"}], "warnings": []}, 200 if fine else 400
            )
        if "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            return self.reply({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.reply(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{URL}/me/style/commit/{'0' * 40}"}
            )
        if re.fullmatch(r"/api/models/me/style(/revision/main)?(\?.*)?", self.path):
            return self.reply({"id": "me/style", "sha": "1" * 40, "siblings": [], "private": True})
        return self.reply({"error": "not here"}, 404)

    def reply(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


URL = ""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, as the endpoint of huggingface_hub."""
    global URL
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    URL = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("refuse", ("", 0)), ("files", {}), ("created", []), ("asked", [])):
        monkeypatch.setattr(Hub, name, value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", URL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def measured(trained, tmp_path):
    """A run with metrics and an evaluation of five prompts with pictures; the picture of one is damaged."""
    run, _ = trained("sd")
    (run / "metrics.jsonl").write_text('{"step": 5, "rewards/accuracies": 0.75}\n')
    results = results_of(tmp_path / "results", lora_file.file_hash(run))
    row, lines = json.loads((results / "manifest.jsonl").read_text()), []
    for index in range(6):
        for arm in ("base", "tuned"):
            file = results / "images" / arm / f"{index:05d}_0.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * index, 0, 200 * (arm == "base"))).save(file)
            about = {"arm": arm, "index": index, "prompt": f'a "{index}" | b', "file": f"images/{arm}/{file.name}"}
            lines.append(row | about | {"sha256": sha256(file.read_bytes()).hexdigest()})
    (results / "images" / "tuned" / "00001_0.png").write_bytes(b"damaged")
    (results / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run, results


def push(tiny_sd, measured, out):
    run, results = measured
    return export.run(export.Export(run, "diffusers", str(tiny_sd), out, results=results, push="me/style"))


@pytest.mark.parametrize("xet", [True, False])
def test_what_is_pushed_is_the_lora_its_card_numbers_and_pictures(tiny_sd, measured, hub, tmp_path, monkeypatch, xet):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not xet)
    out = push(tiny_sd, measured, tmp_path / "out")
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "style")
    assert created.get("private") or created["visibility"] == "private"  # its name in newer clients
    there = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {name: hub.files[name] for name in there} == there
    card = hub.files["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    shown = [0, 2, 3, 4]  # the first four prompts whose pictures are there
    assert [each["text"] for each in header["widget"]] == [f'a "{k}" | b' for k in shown]
    for number, (k, each) in enumerate(zip(shown, header["widget"], strict=True)):
        assert each["output"]["url"] == f"images/{number}_tuned.png"
        for arm in ("base", "tuned"):
            wanted = (measured[1] / "images" / arm / f"{k:05d}_0.png").read_bytes()
            assert hub.files[f"images/{number}_{arm}.png"] == wanted and f"images/{number}_{arm}.png" in card
    assert "| rewards/accuracies | 0.75 |" in card and "62.5% (50.0% to 75.0%)" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("part, kept", [("whoami", False), ("repos/create", True), ("/commit/", True)])
def test_a_hub_that_refuses_leaves_the_export_or_nothing(tiny_sd, measured, hub, tmp_path, part, kept):
    hub.refuse = (part, 400)
    with pytest.raises(DiffpoError, match="cannot upload to me/style"):
        push(tiny_sd, measured, tmp_path / "out")
    assert (tmp_path / "out" / lora_file.FILE_NAME).is_file() == kept and not hub.files
