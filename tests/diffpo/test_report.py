import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from diffpo import charts, compare, report
from diffpo.compare import Pair

PROMPT = 'a "tricky" <b>prompt</b> & more'


@pytest.fixture
def pairs(tmp_path):
    made = []
    for index in range(3):
        for arm, colour in (("base", (200, 0, index)), ("tuned", (0, 0, 200 + index))):
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{arm}{index}.png")
        made.append(Pair(index, 0, f"{PROMPT} {index}", tmp_path / f"base{index}.png", tmp_path / f"tuned{index}.png"))
    return made


@pytest.fixture
def metrics(tmp_path):
    rows = [
        {
            "step": step,
            "loss": 0.7 - 0.001 * step,
            "rewards/margins": 0.01 * step,
            "rewards/accuracies": 0.5,
            "error/chosen_delta": -0.001 * step,
            "error/rejected_delta": 0.002 * step,
            **({"eval/accuracy": 0.6} if step % 10 == 0 else {}),
        }
        for step in range(60)
    ]
    lines = [json.dumps(row) for row in rows] + ['{"step": 60, "loss": NaN}', '{"step": 61, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    return charts.read_metrics(tmp_path)


@pytest.fixture
def page(pairs, metrics):
    scores = {"clip": {"base": np.array([0.1, 0.2, 0.3]), "tuned": np.array([0.2, 0.2, 0.1])}}
    evaluation = compare.summarise(pairs, scores, None)
    manifest = [{"arm": "base", "seed": 0, "model": "m<x>", "steps": 8, "prompt": PROMPT}]
    return report.html(evaluation, manifest, metrics)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def test_the_page_refers_to_nothing_outside_itself(page):
    parser = Tags()
    parser.feed(page)
    assert parser.open == []  # every element is closed
    for tag, attributes in parser.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "url(http" not in page and "@import" not in page and "<!DOCTYPE svg" not in page


def test_the_grid_is_sorted_by_difference_and_holds_the_very_pixels(page):
    images = [b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    colours = [Image.open(BytesIO(data)).getpixel((0, 0)) for data in images]
    assert colours == [(200, 0, 0), (0, 0, 200), (200, 0, 1), (0, 0, 201), (200, 0, 2), (0, 0, 202)]
    assert re.findall(r'<b style="color:[^"]+">([-+.\d]+)</b>', page) == ["+0.100", "+0.000", "-0.200"]


def test_prompts_are_text_and_not_markup(page):
    assert "<b>prompt</b>" not in page and "m<x>" not in page
    parser = Tags()
    parser.feed(page)
    assert PROMPT in parser.text


def test_training_curves_show_every_series_of_the_log(page, metrics):
    assert len(metrics) == 61  # the half-written line is left out, the NaN is only not drawn
    for text in (
        "Training",
        "error/chosen_delta",
        "error/rejected_delta",
        "held-out pairs ranked right",
        "reward margin",
    ):
        assert text in page
    assert charts.curves([]) == "" and charts.read_metrics(None) == []


def test_large_evaluations_show_best_middle_and_worst(pairs, monkeypatch):
    monkeypatch.setattr(report, "_GRID_LIMIT", 3)
    many = [Pair(i, 0, f"prompt {i}", pairs[0].base, pairs[0].tuned) for i in range(9)]
    values = np.arange(9) / 10
    page = report.html(compare.summarise(many, {"clip": {"base": np.zeros(9), "tuned": values}}, None), [], [])
    assert re.findall(r'<b style="color:[^"]+">([-+.\d]+)</b>', page) == ["+0.800", "+0.400", "+0.000"]


def test_before_after_picture_enlarges_by_whole_pixels(tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    pair = Pair(0, 0, "a red circle on a white background", tmp_path / "a.png", tmp_path / "a.png")
    evaluation = compare.summarise([pair] * 3, {"clip": {"base": np.zeros(3), "tuned": np.ones(3)}}, None)
    grid = np.asarray(Image.open(BytesIO(report.grid_png(evaluation, cell=160))))
    block = np.kron(picture, np.ones((5, 5, 1), np.uint8))  # 32 * 5 = 160: every pixel is a 5 x 5 block
    at = [
        (y, x)
        for y in range(grid.shape[0] - 159)
        for x in range(grid.shape[1] - 159)
        if (grid[y, x] == block[0, 0]).all() and (grid[y : y + 160, x : x + 160] == block).all()
    ]
    assert len(at) == 2 and at[0][1] == at[1][1]  # base above tuned, one column: the same prompt is shown once


def test_before_after_picture_spans_best_to_worst(tmp_path):
    pairs, tuned = [], np.array([0.3, -0.2, 0.9, 0.1, 0.5])
    for i in range(5):
        Image.new("RGB", (32, 32), (40 * i + 20, 0, 0)).save(tmp_path / f"{i}.png")
        pairs.append(Pair(i, 0, f"prompt {i}", tmp_path / f"{i}.png", tmp_path / f"{i}.png"))
    evaluation = compare.summarise(pairs, {"clip": {"base": np.zeros(5), "tuned": tuned}}, None)
    grid = np.asarray(Image.open(BytesIO(report.grid_png(evaluation, columns=3, cell=32))))
    reds = [tuple(p) for p in grid[-20] if p[1] == 0 and p[2] == 0 and p[0] > 0]
    assert list(dict.fromkeys(int(r[0]) for r in reds)) == [100, 20, 60]  # +0.9 (2), +0.3 (0), -0.2 (1)


def test_a_large_picture_is_reduced_in_the_page(tmp_path):
    Image.new("RGB", (400, 200), (10, 20, 30)).save(tmp_path / "a.png")
    kind, data = report._data_uri(tmp_path / "a.png").split(";base64,")
    assert kind == "data:image/jpeg" and Image.open(BytesIO(b64decode(data))).size == (192, 96)
