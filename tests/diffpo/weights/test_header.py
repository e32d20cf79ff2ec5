"""What foreign files say of themselves is data: known values or nothing, in the card, its front matter and HTML."""

import json
import math
from html.parser import HTMLParser

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from diffpo.common.errors import DiffpoError
from diffpo.common.text import markdown, plain
from diffpo.evaluation import charts
from diffpo.export import card
from diffpo.objective import users
from diffpo.scorers.step import base as steps
from diffpo.weights import full, lora_file
from diffpo.weights.header import known

ABOUT = {
    "objective": "ipo",
    "beta": 250.0,
    "base": {"name": "me/base", "hash": "ab12", "structure": "cd34", "sample": [0.5, -1]},
    "data_hash": "12ab-34cd",
    "pairs_per_update": 8,
    "step": 5,
}
HOSTILE = [
    "x]\nlicense: mit\nbase_model: evil/model\ntags: [y",
    "](javascript:alert(1)) <img src=x onerror=alert(1)>\n\n# Fake heading",
    "<script>alert(1)</script>",
    "[link](http://evil.example) ![](x) `code` **bold** __b__ | cell | ~~no~~ &amp; \\",
    "---\n---\n",
    "```\n<b>",
    "${x} {0} {__class__} %s",
    "\x1b[31mred\x1b[0m \u202eleft\u2066 \u200b \ud800 \x00 \u2028 \u0085",
    "[bold]x[/] :cat: [/]",
    "~nobody-there/x",
    "../..",
    "a" * 10**6,
    "",
]
ODD = [
    *HOSTILE,
    None,
    True,
    [],
    ["a"],
    {},
    {"a": 1},
    -1,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    0.5,
    "5",
    "1e3",
]


def card_of(about, model="/somewhere/model"):
    return card.export_card(model, known(about), "diffusers", card.Shown("USAGE", [], []), "f" * 64)


def parts(text):
    """The front matter as YAML reads it, and the tags and text of the rest as a browser has it from CommonMark."""
    _, front, body = text.split("---\n", 2)
    page = Page()
    page.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    return yaml.safe_load(front), page


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.words = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words += data


def test_what_diffpo_writes_is_known():
    assert known(ABOUT) == ABOUT
    front, page = parts(card_of(ABOUT))
    assert front["tags"] == ["lora", "text-to-image", "preference-optimization", "ipo"]
    assert "ipo (beta 250), 5 updates of 8 groups (40 in all, data 12ab-34cd, base ab12)" in page.words


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("key", ["objective", "beta", "step", "pairs_per_update", "data_hash", "more"])
def test_other_values_are_as_if_they_were_not_there(key, value):
    right = {"beta": (-1, 1e308, 0.5), "data_hash": ("5", "1e3")}.get(key, ())
    about = {**ABOUT, key: value}
    without = {name: each for name, each in ABOUT.items() if name != key}
    if not isinstance(value, bool) and value in right:
        assert known(about) == about
    else:
        assert known(about) == without and card_of(about) == card_of(without)
    json.dumps(known(about), allow_nan=False)


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("key", ["hash", "structure", "sample"])
def test_odd_records_of_the_base_are_left_out(key, value):
    base = {name: each for name, each in ABOUT["base"].items() if name != key}
    right = {"sample": ([],)}.get(key, ("5", "1e3"))
    expected = base | ({key: value} if value in right else {})
    assert known({"base": {**base, key: value}}) == {"base": expected}
    card_of({**ABOUT, "base": {**base, key: value}})


@pytest.mark.parametrize("name", ODD, ids=lambda value: repr(value)[:30])
def test_the_name_of_the_base_is_no_markup(name):
    about = known({**ABOUT, "base": {**ABOUT["base"], "name": name}})
    shown = about["base"].get("name", "/somewhere/model")
    text = card_of(about, shown)
    front, page = parts(text)
    if shown in ("5", "1e3"):
        assert front.pop("base_model") == shown and front.pop("base_model_relation") == "adapter"
    assert set(front) == {"library_name", "tags"} and page.tags == ["h1", "p", "p", "p", "code"]
    assert len(text) < 3000 and text.encode() and text.replace("\n", "").isprintable()
    if isinstance(name, str) and "/" not in shown:
        assert plain(name, 200).split() == page.words.split("A preference LoRA for ")[1].split("\n")[0].split()


@pytest.mark.parametrize("text", HOSTILE[:-1], ids=lambda value: repr(value)[:30])
def test_markdown_shows_a_text_as_it_is(text):
    page = Page()
    page.feed(
        MarkdownIt("commonmark", {"html": True}).enable("table").render(f"| a |\n| --- |\n| x {markdown(text)} |")
    )
    assert page.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert page.words.split() == ["a", "x", *plain(text, 200).split()]


def test_a_base_that_is_no_record_is_refused():
    for base in (7, None, [], "x"):
        with pytest.raises(ValueError, match="record of the base"):
            known({"base": base})


@pytest.mark.parametrize("text", HOSTILE, ids=lambda value: repr(value)[:30])
def test_the_lora_file_gives_known_values_only(tmp_path, text):
    about = {**ABOUT, "objective": text, "data_hash": text, "more": text}
    header = {lora_file.HEADER: json.dumps(about), "lora_adapter_metadata": "{}"}
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / lora_file.FILE_NAME, header)
    _, found = lora_file.read_lora(tmp_path)
    assert found == {key: ABOUT[key] for key in ("beta", "base", "pairs_per_update", "step")}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / full.ABOUT).write_text(json.dumps(about))
    assert full.read_about(tmp_path / "unet") == found


@pytest.mark.parametrize(
    "content", [b"", b"7", b"[]", b"{}", b'{"base": 7}', b'{"base": {"hash": 7}}', b"\xff", b"[" * 9000]
)
def test_a_network_that_does_not_say_its_base_is_refused(tmp_path, content):
    (tmp_path / full.ABOUT).write_bytes(content)
    with pytest.raises(DiffpoError, match=str(tmp_path / full.ABOUT)):
        full.read_about(tmp_path)


# ---- metrics.jsonl and summary.json


def test_metrics_are_finite_numbers_with_a_step(tmp_path):
    lines = [json.dumps({"step": 1, "loss": value}) for value in ODD if value != 10**400]
    lines += [json.dumps({"step": step, "loss": 0.5}) for step in (*HOSTILE, None, True, [], -1, math.nan, 1e308)]
    lines += [
        '{"loss": 1}',
        '{"step": 2, "loss": 1' + "0" * 400 + "}",
        "7",
        "[" * 9000,
        '{"step": 3, "eval/accuracy": 0.75}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    rows = charts.read_metrics(tmp_path)
    assert {row["loss"] for row in rows if "loss" in row} == {-1, 0.5} and {row["step"] for row in rows} == {1, 2, 3}
    assert "<svg" in charts.curves(rows)
    table = card.training_table(tmp_path, 3)
    assert "| loss | -0.25 |" in table and "| held-out pair accuracy | 0.750 |" in table
    assert card.training_table(tmp_path, 0) == ""


NUMBERS = {"value": 0.25, "low": 0.125, "high": 0.375}
ROW = {"scorer": "clip", "base": 1.5, "tuned": 1.75, "difference": NUMBERS, "win_rate": NUMBERS, "n": 4}
ROW |= {"training_signal": "no"}


def summary(folder, row=ROW, **more):
    (folder / "summary.json").write_text(json.dumps({"rows": [row], "prompts": 2, **more}))
    picture = {"arm": "tuned", "index": 0, "seed": 0, "prompt": "a", "file": "a.png", "lora_hash": "f"}
    (folder / "manifest.jsonl").write_text(json.dumps(picture) + "\n")
    return card.evaluation_table(folder, "f")


@pytest.mark.parametrize("text", HOSTILE[:-1], ids=lambda value: repr(value)[:30])
def test_a_foreign_summary_is_no_markup(tmp_path, text):
    _, page = parts("---\n---\n" + summary(tmp_path, {**ROW, "scorer": text, "training_signal": text}))
    assert page.tags.count("tr") == 2 and page.tags.count("td") == 7 and page.tags.count("p") == 1
    assert not {*page.tags} - {"table", "thead", "tbody", "tr", "th", "td", "p"}
    with pytest.raises(DiffpoError, match=r"another LoRA|manifest\.jsonl"):
        summary(tmp_path)
        row = {"arm": "tuned", "index": 0, "seed": 0, "prompt": "a", "file": "a.png", "lora_hash": [text]}
        (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
        card.evaluation_table(tmp_path, "f")


@pytest.mark.parametrize(
    "value", [*HOSTILE[:3], None, True, [], {}, math.nan, math.inf, 10**400], ids=lambda v: repr(v)[:30]
)
@pytest.mark.parametrize("key", ["base", "tuned", "n", "difference", "win_rate", "prompts", "rows"])
def test_numbers_of_a_foreign_summary_are_numbers(tmp_path, key, value):
    if (key, value) == ("rows", []):
        return
    with pytest.raises(DiffpoError, match=r"summary\.json") as caught:
        summary(tmp_path, **{key: value}) if key in ("prompts", "rows") else summary(tmp_path, {**ROW, key: value})
    assert str(caught.value).isprintable()


# ---- step scorers and user tokens


@pytest.mark.parametrize(
    "about",
    [
        {"kind": "latent", "base": 7, "head": {"image": 1, "texts": [1], "width": 1}},
        {"kind": "latent", "base": {}, "head": {"image": 1, "texts": 7, "width": 1}},
        {"kind": "latent", "base": {}, "head": {"image": 10**12, "texts": [1], "width": 1}},
        {"kind": "latent", "base": {}, "head": {"image": True, "texts": [1], "width": 1}},
        {"kind": "latent", "base": {}, "head": [1]},
        {"kind": "latent", "head": {"image": 1, "texts": [1], "width": 1}},
        {"kind": "pixel"},
        {"kind": ["pixel"]},
        [],
    ],
)
def test_descriptions_of_step_scorers_are_checked(tmp_path, about):
    (tmp_path / steps.ABOUT).write_text(json.dumps(about))
    with pytest.raises(DiffpoError, match=str(tmp_path / steps.ABOUT)):
        steps.read_about(tmp_path)


def test_of_a_step_scorer_only_what_loading_needs_is_read(tmp_path):
    about = {"kind": "latent", "base": ABOUT["base"], "head": {"image": 3, "texts": [2, 1], "width": 4}}
    (tmp_path / steps.ABOUT).write_text(json.dumps({**about, "settings": HOSTILE, "time_aware": 1}))
    assert steps.read_about(tmp_path) == about
    (tmp_path / steps.ABOUT).write_text(json.dumps({"kind": "pixel", "time_aware": False, "settings": HOSTILE}))
    assert steps.read_about(tmp_path) == {"kind": "pixel", "time_aware": False}


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": torch.tensor([8, 8])},
        {"resolution": torch.tensor(10**9)},
        {"resolution": torch.tensor(-1)},
        {"resolution": torch.tensor(math.nan)},
        {"resolution": torch.zeros(0)},
        {"scale": torch.tensor(1.0)},
        {"scale": torch.ones(2, 2)},
        {"scale": torch.full((3,), math.nan)},
        {"scale": None},
        {"more": torch.ones(1)},
    ],
    ids=repr,
)
def test_user_tokens_of_another_form_are_refused(tmp_path, monkeypatch, change):
    class Network(torch.nn.Module):
        device = "cpu"

    monkeypatch.setattr(users.models, "text_width", lambda network: 5)
    path, network = tmp_path / lora_file.USERS_FILE_NAME, Network()
    users.attach(network, torch.ones(3))
    state = {**network.user_tokens.state_dict(), "resolution": torch.tensor(16)}
    save_file(state, path)
    assert users.load(path, Network()) == 16
    save_file({key: value for key, value in (state | change).items() if value is not None}, path)
    with pytest.raises(DiffpoError, match=str(path)):
        users.load(path, Network())
