"""Captions for each picture of a pair: changed words by their class, and a captioner behind a stub of the API."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from diffpo.common.errors import DiffpoError
from diffpo.common.rng import generator
from diffpo.labelling import captions, words
from diffpo.labelling.captions import Captions, perturbed
from diffpo.labelling.pictures import Picture, Prompted
from diffpo.labelling.rows import Row

PROMPT = "a red circle left of a blue square on a white background"  # six words of the lists


OTHER = {PROMPT: '"A crimson disc beside an azure box."\n', "a red dark square": "a gloomy crimson box"}


def classes(text):
    known = [word for word in text.lower().split() if words.of(word)]
    return [{name for name, own in words.CLASSES.items() if word in own} for word in known]


@pytest.mark.parametrize(("level", "count"), [("weak", 3), ("medium", 4), ("strong", 5)])
def test_so_many_words_change_and_stay_in_their_class(level, count):
    for position in range(20):
        changed = perturbed(PROMPT, level, generator(0, "test", position))
        before, after = ([w for w in text.split() if w not in ("a", "an")] for text in (PROMPT, changed))
        assert sum(one != other for one, other in zip(before, after, strict=True)) == count
        assert all(one & other for one, other in zip(classes(PROMPT), classes(changed), strict=True))


def test_capitals_plurals_articles_and_the_words_of_the_data():
    for position in range(10):
        draw = generator(0, "test", position)
        first, second = perturbed("Two cats", "strong", draw).split()
        assert first[0].isupper() and second.endswith("s") and (first, second) != ("Two", "cats")
    vocabulary = {"orange", "red"}
    assert perturbed("a red ball", "weak", generator(0, "t", 0), vocabulary) == "an orange ball"
    assert perturbed("an orange ball", "weak", generator(0, "t", 0), {"red"}) == "a red ball"
    assert perturbed("xyzzy", "strong", generator(0, "t", 0)) == "xyzzy"


def pair(folder, index, label, light=(50, 200)):
    pictures = []
    for k, level in enumerate(light):
        path = folder / f"{index}-{k}.png"
        Image.new("RGB", (8, 8), (level,) * 3).save(path)
        pictures.append(Picture("base", k, path))
    return Row(Prompted(index, PROMPT, tuple(pictures), np.zeros((2, 1))), (0, 1), label, (0.0, 0.0), 1.0)


def test_the_worse_picture_gets_the_other_words(tmp_path):
    rows = [pair(tmp_path, 0, 1.0), pair(tmp_path, 1, 0.0), pair(tmp_path, 2, 0.5)]
    found, gaps = captions.add(rows, Captions("perturbed"), tmp_path)
    assert not gaps
    (first, second, tie) = (row.captions for row in found)
    assert first[0] == PROMPT != first[1] and second[1] == PROMPT != second[0] and tie == (PROMPT, PROMPT)
    assert captions.add(rows, Captions("perturbed"), tmp_path)[0][0].captions == first  # seeded
    assert captions.add(rows, Captions("perturbed", seed=1), tmp_path)[0][0].captions != first


@pytest.fixture
def captioner(tmp_path):
    """A stub of chat completions that calls a picture by its brightness, and gives `OTHER` words for a caption; asked:
    the questions."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = request["messages"][0]["content"]
            if isinstance(content, str):  # no picture: a paraphrase
                asked.append(content)
                text = OTHER.get(content.split('"')[1], "")
            else:
                picture, question = content
                asked.append(question["text"])
                text = {50: "a red dark square", 200: "a blue bright square"}.get(level(picture), "")
            data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    file = tmp_path / "captioner.yaml"
    file.write_text(f"url: http://127.0.0.1:{server.server_port}/v1\nmodel: some/model\n")
    yield str(file), asked
    server.shutdown()
    server.server_close()


def level(part):
    import base64
    import io

    data = part["image_url"]["url"].partition("base64,")[2]
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean())


def test_a_captioner_describes_both_and_hybrid_changes_the_worse(tmp_path, captioner):
    settings, asked = captioner
    rows = [pair(tmp_path, 0, 0.0), pair(tmp_path, 1, 0.0, (90, 200))]
    found, gaps = captions.add(rows, Captions("captioner", settings), tmp_path)
    assert [row.captions for row in found] == [("a red dark square", "a blue bright square")]
    assert "1 of 2 pairs are left out" in gaps[0] and len(asked) == 4
    (hybrid,), _ = captions.add(rows, Captions("hybrid", settings, "strong"), tmp_path)
    assert len(asked) == 4  # what was described is kept
    assert hybrid.captions[1] == "a blue bright square" and hybrid.captions[0] != "a red dark square"
    with pytest.raises(DiffpoError, match="no pair has captions"):
        captions.add(rows[1:], Captions("captioner", settings), tmp_path)


def test_a_language_model_gives_the_other_words(tmp_path, captioner):
    """Asked without a picture, with the share of its level; each caption once, and once only."""
    settings, asked = captioner
    rows = [pair(tmp_path, 0, 1.0), pair(tmp_path, 1, 0.0), pair(tmp_path, 2, 0.5)]
    for _ in range(2):
        found, gaps = captions.add(rows, Captions("perturbed", level="strong", paraphraser=settings), tmp_path)
        first, second, tie = (row.captions for row in found)
        assert first == (PROMPT, "A crimson disc beside an azure box.") == second[::-1] and tie == (PROMPT, PROMPT)
        assert not gaps and len(asked) == 1 and PROMPT in asked[0] and "80 %" in asked[0]
    captions.add(rows, Captions("perturbed", level="weak", paraphraser=settings), tmp_path)
    assert len(asked) == 2 and "40 %" in asked[1]
    (hybrid,), _ = captions.add(rows[1:2], Captions("hybrid", settings, paraphraser=settings), tmp_path)
    assert hybrid.captions == ("a gloomy crimson box", "a blue bright square")


def test_a_paraphraser_that_says_nothing_or_the_same_is_counted(tmp_path, captioner, monkeypatch):
    settings, _ = captioner
    rows = [pair(tmp_path, 0, 1.0), pair(tmp_path, 1, 0.0)]
    rows[1] = replace(rows[1], prompt=replace(rows[1].prompt, prompt="xyzzy"))
    monkeypatch.setitem(OTHER, PROMPT, PROMPT)
    found, gaps = captions.add(rows, Captions("perturbed", paraphraser=settings), tmp_path)
    assert [row.captions for row in found] == [(PROMPT, PROMPT)]
    assert "1 of 2 pairs are left out" in gaps[0] and "1 of 2 captions" in gaps[1]
    with pytest.raises(DiffpoError, match="--paraphraser"):
        Captions("captioner", settings, paraphraser=settings)
