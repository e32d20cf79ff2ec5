import base64
import contextlib
import json
import re
import time
from base64 import b64decode
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO, TextIOWrapper

import numpy as np
import pytest
from on_policy import Brightness
from PIL import Image, ImageFont

from diffpo import cli
from diffpo.commands import check
from diffpo.common.errors import DiffpoError
from diffpo.common.text import plain
from diffpo.evaluation import charts, compare, items, manifest, picture, report, report_pictures, scoring
from diffpo.evaluation.items import Item

PROMPT = 'a "tricky" <b>prompt</b> & more'


def item(index, prompt, base, tuned):
    return Item(index, 0, prompt, {"base": base, "tuned": tuned})


@pytest.fixture
def pairs(tmp_path):
    made = []
    for index in range(3):
        for arm, colour in (("base", (200, 0, index)), ("tuned", (0, 0, 200 + index))):
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{arm}{index}.png")
        made.append(item(index, f"{PROMPT} {index}", tmp_path / f"base{index}.png", tmp_path / f"tuned{index}.png"))
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
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data

    def check(self, page):
        """Of a page of `report.html`: every element is closed, and nothing is loaded or run but its own script."""
        self.feed(page)
        assert self.open == []
        assert [attributes for tag, attributes in self.tags if tag == "script"] == [
            {"type": "application/json", "id": "data"},
            {},
        ]
        script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
        for tag, attributes in self.tags:
            assert tag not in ("link", "iframe", "object", "embed", "base", "frame", "audio", "video")
            assert not [name for name in attributes if name.startswith("on") or name in ("srcdoc", "ping")]
            for name in ("src", "href", "xlink:href", "srcset", "action", "formaction"):
                assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy":
                digest = base64.b64encode(sha256(script.encode()).digest()).decode()
                assert f"script-src 'sha256-{digest}';" in attributes["content"]
                assert attributes["content"].startswith("default-src 'none'; img-src data:;")
        assert "url(" not in page and "@import" not in page and "<!DOCTYPE svg" not in page


def data_of(page):
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_refers_to_nothing_outside_itself(page):
    Tags().check(page)
    assert "Content-Security-Policy" in page


def test_the_grid_is_sorted_by_difference_and_holds_the_very_pixels(page):
    images = [b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    colours = [Image.open(BytesIO(data)).getpixel((0, 0)) for data in images]
    assert colours == [(200, 0, 0), (0, 0, 200), (200, 0, 1), (0, 0, 201), (200, 0, 2), (0, 0, 202)]
    assert re.findall(r'<b style="color:[^"]+">([-+.\d]+)</b>', page) == ["+0.100", "+0.000", "-0.200"]
    data = data_of(page)
    found = [uri.partition("base64,")[2] for entry in data["items"] for uri in entry["pictures"]]
    assert [Image.open(BytesIO(b64decode(each))).getpixel((0, 0)) for each in found] == colours
    assert data["arms"] == ["base", "tuned"] and [e["values"] for e in data["items"]][2] == [[0.3, 0.1]]


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
    monkeypatch.setattr(report_pictures, "STATIC_LIMIT", 3)
    many = [item(i, f"prompt {i}", *pairs[0].pictures.values()) for i in range(9)]
    values = np.arange(9) / 10
    page = report.html(compare.summarise(many, {"clip": {"base": np.zeros(9), "tuned": values}}, None), [], [])
    assert re.findall(r'<b style="color:[^"]+">([-+.\d]+)</b>', page) == ["+0.800", "+0.400", "+0.000"]
    assert [entry["index"] for entry in data_of(page)["items"]] == [*range(9)]  # the script shows all of them


def test_before_after_picture_enlarges_by_whole_pixels(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pair = item(0, "a red circle on a white background", tmp_path / "a.png", tmp_path / "a.png")
    evaluation = compare.summarise([pair] * 3, {"clip": {"base": np.zeros(3), "tuned": np.ones(3)}}, None)
    grid = np.asarray(Image.open(BytesIO(picture.grid_png(evaluation, cell=160))))
    block = np.kron(pixels, np.ones((5, 5, 1), np.uint8))  # 32 * 5 = 160: every pixel is a 5 x 5 block
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
        pairs.append(item(i, f"prompt {i}", tmp_path / f"{i}.png", tmp_path / f"{i}.png"))
    evaluation = compare.summarise(pairs, {"clip": {"base": np.zeros(5), "tuned": tuned}}, None)
    grid = np.asarray(Image.open(BytesIO(picture.grid_png(evaluation, columns=3, cell=32))))
    reds = [tuple(p) for p in grid[-20] if p[1] == 0 and p[2] == 0 and p[0] > 0]
    assert list(dict.fromkeys(int(r[0]) for r in reds)) == [100, 20, 60]  # +0.9 (2), +0.3 (0), -0.2 (1)


def test_a_large_picture_is_reduced_in_the_page(tmp_path):
    Image.new("RGB", (400, 200), (10, 20, 30)).save(tmp_path / "a.png")
    kind, data = report_pictures.data_uri(manifest.open_image(tmp_path / "a.png")).split(";base64,")
    assert kind == "data:image/jpeg" and Image.open(BytesIO(b64decode(data))).size == (192, 96)


# ---- texts of any length and kind

TEXTS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[bold]x[/] [/] [red]y [link=http://evil.example]z[/link] :cat: $x^2$ \\[a]",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \r\n\t \x00 \x9b",
    "\u202eright to left\u202c \u2066a\u2069 zero\u200bwidth \ufeff \u2028",
    "half \ud800 \udc00 a character",
    "größer 猫 😀 e\u0301",
    "word" * 250_000,
    "many words " * 100_000,
    "&amp; &lt; &#60;",
]


def manifest_of(folder, texts, **more):
    """A folder of pictures in both arms with a manifest, as `diffpo generate` leaves it."""
    rows = []
    for index, text in enumerate(texts):
        for arm, bright in (("base", 40), ("tuned", 90)):
            path = manifest.image_path(folder, arm, index, 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (bright + index,) * 3).save(path)
            file = path.relative_to(folder).as_posix()
            rows.append({"arm": arm, "index": index, "seed": 0, "prompt": text, "file": file, **more})
    manifest.save(folder / "manifest.jsonl", b"".join(map(manifest.line, rows)))
    return rows


def test_a_manifest_and_a_summary_keep_every_character(tmp_path):
    rows = manifest_of(tmp_path, TEXTS)
    assert manifest.read_manifest(tmp_path) == rows
    assert json.loads(manifest.json_bytes(TEXTS, indent=2)) == TEXTS


@pytest.fixture
def odd(tmp_path):
    """What `diffpo eval` makes of TEXTS in prompts and settings: its folder, and what it printed in an encoding."""
    manifest_of(tmp_path, TEXTS, solver=TEXTS[0], versions={TEXTS[1]: [TEXTS[3]] * 3}, **{TEXTS[2]: TEXTS})

    def run(encoding):
        out, error = (TextIOWrapper(BytesIO(), encoding) for _ in range(2))
        words = ["diffpo", "eval", "--images", str(tmp_path), "--out", str(tmp_path / "[bold]out[/]")]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(scoring.scorers, "load", lambda spec, device=None: Brightness())
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", error)
            patch.setattr("sys.argv", words)
            cli.main()
        for stream in (out, error):
            stream.flush()
        assert end.value.code == 0, error.buffer.getvalue()
        return tmp_path / "[bold]out[/]", out.buffer.getvalue().decode(encoding)

    return run


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_eval_shows_any_text_in_any_encoding(odd, encoding):
    began = time.process_time()
    folder, shown = odd(encoding)
    assert time.process_time() - began < 60  # a word of 1 MB took minutes
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066\u200b\ud800]", shown)
    assert f"report.html: {folder}/report.html" in shown
    words = plain(TEXTS[2]).encode(encoding, "backslashreplace").decode(encoding)
    assert words[:40] in shown.replace("\n", " ")
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert {entry["prompt"] for entry in summary["best"] + summary["worst"]} <= {*TEXTS}
    with Image.open(folder / "grid.png") as picture:
        assert picture.size[0] < 2000 and picture.size[1] < 700
    page = Tags()
    page.check((folder / "report.html").read_text("utf-8"))
    for text in TEXTS:
        assert " ".join(plain(text).split()) in " ".join(page.text.split())
    assert len(page.text) < 10**5


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text)[:20])
@pytest.mark.parametrize("width", [1, 30, 160])
def test_lines_of_a_picture_keep_to_its_width(text, width):
    font = ImageFont.load_default(13)
    lines = picture.wrap(text, font, width)
    assert 1 <= len(lines) <= 4
    for line in lines:
        line = line.removesuffix(" ...")
        assert len(line) == 1 or font.getlength(line) <= width
    assert "".join(lines).replace(" ", "").removesuffix("...") in plain(text).replace(" ", "")


@pytest.mark.parametrize(
    "change",
    [
        {"file": "/etc/passwd"},
        {"file": "../private.png"},
        {"file": "images/../../private.png"},
        {"file": 7},
        {"file": None},
        {"prompt": ["a"]},
        {"prompt": None},
        {"index": 2**63},
        {"index": -1},
        {"index": True},
        {"index": 0.0},
        {"seed": -(2**63)},
        {"seed": "0"},
        {"arm": ["base"]},
        {"arm": "../base"},
        {"arm": ""},
    ],
    ids=repr,
)
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, change):
    rows = manifest_of(tmp_path / "a", ["a"])
    (tmp_path / "a" / "manifest.jsonl").write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))
    with pytest.raises(DiffpoError, match=r"manifest\.jsonl:1 is not a manifest line"):
        manifest.read_manifest(tmp_path / "a")


@pytest.mark.parametrize(
    "values", [[0, 0], [1e17, 1e17], [-3.4e38, 3.4e38], [3.4e38, 3.4e38], [1e-300, 0], [5, np.nan]]
)
def test_scores_of_any_size_are_drawn(pairs, values, recwarn):
    scores = {"clip": {"base": np.array([*values, 0.0]), "tuned": np.array([0.0, *values])}}
    evaluation = compare.summarise(pairs, scores, None)
    assert "<svg" in charts.histograms("clip", scores["clip"])
    for page in (
        report.html(evaluation, [], []),
        charts.panel("p", [charts.Line("", [*enumerate(np.nan_to_num(values))])], "x"),
    ):
        assert not re.search(r"[=\" ,ML](nan|-?inf)\b", page)
    same = np.full(3, values[0])
    assert "<svg" in charts.histograms("clip", {"base": same, "tuned": same})
    assert not list(recwarn)


def test_scores_that_no_prompt_asks_for_are_said(pairs):
    nothing = np.full(3, np.nan)
    with pytest.raises(DiffpoError, match=r"scores clip; name"):
        compare.summarise(pairs, {"clip": {"base": nothing, "tuned": nothing}}, None)


@pytest.mark.parametrize("text", TEXTS[:7], ids=lambda text: repr(text)[:20])
def test_check_and_errors_show_names_as_they_are(monkeypatch, text, capsys):
    """``check`` stops at its first question; what it printed until then is the config."""
    monkeypatch.setattr(check, "scan", lambda *args, **options: (_ for _ in ()).throw(DiffpoError(f"no {text}")))
    monkeypatch.setattr("diffpo.config.load_config", lambda *args: Settings(text))
    monkeypatch.setattr("sys.argv", ["diffpo", "check", "x.yaml"])
    with pytest.raises(SystemExit) as end, contextlib.suppress(UnicodeEncodeError):
        cli.main()
    found = capsys.readouterr()
    assert end.value.code == 2
    for line in text.split("\n"):
        assert plain(line).rstrip() in found.out and plain(line).rstrip() in found.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", found.out + found.err)


class Settings:
    """A config as far as ``check`` looks at it before the data."""

    def __init__(self, text):
        self.text, self.data, self.objective = text, self, self
        self.on_policy, self.link, self.train, self.train_split = False, "sigmoid", text, "train"

    def to_yaml(self):
        return f"data: {self.text}"


def test_scorers_get_texts_that_a_tokenizer_reads(tmp_path, monkeypatch):
    class Reading(Brightness):
        def score(self, images, prompts):
            assert prompts == ["a \ufffd b"] * len(images)
            return super().score(images, prompts)

    monkeypatch.setattr(scoring.scorers, "load", lambda spec, device=None: Reading())
    manifest_of(tmp_path, ["a \ud800 b"])
    found = {name: items.of_folder(folder, None, []) for name, folder in items.in_folder(tmp_path).items()}
    (one,) = items.joined(found, None, None, [])
    assert (
        scoring.score_items([one], ["base", "tuned"], scoring.Scoring(("clip",))).values and one.prompt == "a \ud800 b"
    )
