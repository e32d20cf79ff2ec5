"""What the report says of several arms, and that nothing that it shows can become code."""

import base64
import io
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_report import Tags, data_of

from diffpo.common.instruction import Instruction
from diffpo.common.text import plain
from diffpo.evaluation import charts, compare, report, report_curves, report_pictures
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.items import Item
from diffpo.evaluation.statistics import Estimate

ATTACKS = [
    "</script><script>window.owned=1</script>",
    "<!--<script>",
    "]]></style><img src=x onerror=window.owned=1>",
    '" onload="window.owned=1" x="',
    "'><svg onload=window.owned=1>",
    "{{ 7 * 7 }} {% raw %} ${1+1}",
    "\u2028</noscript><iframe srcdoc='<script>parent.owned=1</script>'>",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Arm by arm, twelve pictures of 16 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(36):
        Image.new("RGB", (16, 16), (7 * k, 255 - 7 * k, 10 * (k // 12))).save(folder / f"{k}.png")
    return [[folder / f"{12 * arm + k}.png" for k in range(12)] for arm in range(3)]


def evaluated(pictures, arms=("base", "mine", "other"), score="clip", prompt="a prompt"):
    """Three arms; of item 3 the last one has no picture, and of item 4 no score."""
    rng = np.random.default_rng(0)
    items = [
        Item(k, 0, f"{prompt} {k}", {arm: own[k] for arm, own in zip(arms, pictures, strict=True)}) for k in range(12)
    ]
    del items[3].pictures[arms[2]]
    values = {arm: rng.normal(0.1 * k, 1, 12) for k, arm in enumerate(arms)}
    values[arms[2]][[3, 4]] = np.nan
    part = f"{score}.part"
    return compare.summarise(items, {score: values, part: {a: -v for a, v in values.items()}}, part)


def page_of(pictures, text="plain", **names):
    """A page with ``text`` wherever a text can be."""
    evaluation = evaluated(pictures, **names)
    rows = [{"arm": arm, "seed": 0, "index": 0, "model": text, text: [text]} for arm in evaluation.arms]
    metrics = [{"step": 1, "loss": 0.5, text: 1.0}]
    verdict = SimpleNamespace(sentence=text, findings=[text, text], arm=None, needed=0)
    strengths = {evaluation.primary: {arm: Estimate(0.0, -1.0, 1.0) for arm in evaluation.arms}}
    return report.html(replace(evaluation, verdict=verdict, strengths=strengths), rows, metrics)


@pytest.fixture(scope="module")
def benign(pictures):
    found = Tags()
    found.check(page_of(pictures))
    return found


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_becomes_markup_anywhere(pictures, benign, attack):
    """The elements and the names of their attributes are those of a page with harmless texts."""
    evil = Tags()
    arms = (f"base{attack}", f"mine{attack}", f"other{attack}")
    page = page_of(pictures, attack, arms=arms, score=f"clip{attack}", prompt=attack)
    evil.check(page)
    found = [Counter((tag, *sorted(attributes)) for tag, attributes in each.tags) for each in (evil, benign)]
    assert found[0] == found[1]
    data = data_of(page)
    assert data["items"][0]["prompt"] == plain(f"{attack} 0") and data["arms"] == [*arms]


def test_data_in_a_script_element_cannot_end_it():
    for attack in ATTACKS:
        text = report_pictures.script_safe({attack: [attack, 0.5, None]})
        assert not {*"<>&\u2028"} & {*text} and json.loads(text) == {attack: [attack, 0.5, None]}
    with pytest.raises(ValueError):
        report_pictures.script_safe(float("nan"))  # a script could not read it


def test_gaps_are_said_and_not_drawn(pictures):
    data = data_of(page_of(pictures))
    assert data["items"][3]["pictures"][2] is None and data["items"][3]["values"][0][2] is None
    assert data["items"][4]["pictures"][2] is not None and data["items"][4]["values"][0][2] is None


def test_a_picture_that_cannot_be_read_is_left_out(pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page = page_of([[broken, *pictures[0][1:]], *pictures[1:]])
    assert [uri is None for uri in data_of(page)["items"][0]["pictures"]] == [True, False, False]


def edits_page(pictures, sources, text="make it blue"):
    """A page of edits: item k is about picture k of ``sources``, and on from the first behind the last."""
    evaluation = evaluated(pictures)
    prompts = [Instruction(f"{text} {k}", sources[k % len(sources)], str(k % len(sources))) for k in range(12)]
    items = [replace(item, prompt=prompt) for item, prompt in zip(evaluation.items, prompts, strict=True)]
    return report.html(replace(evaluation, items=items), [], [])


def test_edits_stand_beside_what_they_are_of(pictures, tmp_path):
    """Each source once, cut at its middle to the shape of the results; one that is gone is a gap."""
    levels = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 3), dtype=np.uint8)
    for name, each in zip("ab", levels, strict=True):
        Image.fromarray(each).save(tmp_path / f"{name}.png")
    page = edits_page(pictures, [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "gone.png"], ATTACKS[0])
    tags = Tags()
    tags.check(page)
    data = data_of(page)
    assert [item["source"] for item in data["items"]] == [0, 1, None] * 4
    for uri, whole in zip(data["sources"], levels, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as found:
            np.testing.assert_array_equal(np.asarray(found), whole[:, 8:24])
    static = [attributes["src"] for tag, attributes in tags.tags if tag == "img" and attributes.get("alt") == "source"]
    assert {*static} == {*data["sources"]}
    assert data_of(page_of(pictures))["sources"] == []
    both = data_of(edits_page(pictures, [[tmp_path / "a.png", tmp_path / "b.png"]]))["sources"]
    with Image.open(io.BytesIO(base64.b64decode(both[0].partition(",")[2]))) as found:  # side by side
        np.testing.assert_array_equal(np.asarray(found), np.concatenate([each[:, 8:24] for each in levels], 1))


def test_the_win_matrix_counts_pairs_and_is_antisymmetric(pictures):
    evaluation = evaluated(pictures)
    matrix = dict(report.report_tables.scores(evaluation, {})[0]["matrix"])
    rates = np.array([[np.nan if c is None else float(c["text"].rstrip("%")) for c in row] for row in matrix.values()])
    values = evaluation.scores["clip"]
    both = ~np.isnan(values["other"])
    wins = (values["other"] > values["mine"])[both].mean()
    assert rates[2, 1] == round(100 * wins)
    np.testing.assert_allclose((rates + rates.T)[~np.eye(3, dtype=bool)], 100, atol=1)
    assert np.isnan(np.diag(rates)).all()


def test_many_large_pictures_stay_within_the_budget(tmp_path):
    """Random texture, which compresses worse than photographs do."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.normal(size=(75, 100)), np.ones((8, 8))) * 40 + rng.normal(size=(600, 800)) * 20 + 128
    Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    sides = []
    for count in (10, 200, 2000):
        made = report_pictures.Thumbnails(count)
        uri = made.uri(tmp_path / "a.png")
        assert len(uri) * count < 25e6
        sides.append(made.side)
    assert sides[0] > sides[1] > sides[2] == report_pictures.SMALL


def test_pictures_that_compress_badly_stay_within_the_budget_too(tmp_path):
    """Noise, at sizes that keep their pixels if they can."""
    rng = np.random.default_rng(0)
    for side in (192, 150, 400):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{side}.png")
        uri = report_pictures.Thumbnails(2000).uri(tmp_path / f"{side}.png")
        assert len(uri) * 2000 < 25e6
    few = report_pictures.Thumbnails(10).uri(tmp_path / "192.png")
    with Image.open(io.BytesIO(base64.b64decode(few.partition(",")[2]))) as kept, Image.open(tmp_path / "192.png") as a:
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(a))


def test_settings_know_every_arm_also_those_in_folders():
    made = [row("base", steps=8), row("fast", steps=4), {"arm": "photos", "folder": "pictures"}]
    arms, settings = report.report_tables.settings(made)
    settings = dict(settings)
    assert arms == ["base", "fast", "photos"]
    assert settings["steps"] == [8, 4, "not known"] and settings["seeds"] == ["0", "0", "not known"]
    assert settings["folder"] == ["made for this comparison", "made for this comparison", "pictures"]


# ---- curves over several arms


def row(arm, **more):
    how = Generation("m", model_hash="h", **more)
    return {"arm": arm, "index": 0, "seed": 0, "prompt": "p", "file": "f", **how.recorded()}


def curve_evaluation(arms):
    scores = {"clip": {arm: np.arange(4.0) + k for k, arm in enumerate(arms)}}
    return compare.summarise([Item(k, 0, "p", {}) for k in range(4)], scores)


def drawn(function, rows):
    """The lines that a chart shows: by name, (x, difference to the first arm)."""
    found = {}

    def panel(title, lines, *_):
        found.update({line.name: [point[:2] for point in line.points] for line in lines})
        return "<svg>"

    evaluation = curve_evaluation(list(dict.fromkeys(row["arm"] for row in rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "panel", panel)
        assert function(evaluation, rows) == ("<svg>" if found else "")
    return found


def test_checkpoints_of_a_run_are_a_line_that_begins_at_the_base(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 300, "loss": 0.5}\n')
    loras = [tmp_path / "checkpoint-000200", tmp_path / "checkpoint-000100" / "lora.safetensors", tmp_path]
    rows = [row("base"), *(row(f"c{k}", lora=str(lora), lora_hash=str(k)) for k, lora in enumerate(loras))]
    others = [row("alone", lora="elsewhere/checkpoint-000100"), row("kohya", lora="x.safetensors")]
    others += [row("half", lora=str(loras[0]), lora_weight=0.5), row("fast", lora=str(loras[0]), steps=3)]
    found = drawn(report_curves.over_checkpoints, rows + others)
    assert found == {tmp_path.name: [(0, 0), (100, 2), (200, 1), (300, 3)]}
    assert not drawn(report_curves.over_checkpoints, rows[:2])


def test_arms_that_differ_in_calls_are_a_line_for_each_solver():
    rows = [row("base", steps=20), row("ten", steps=10), row("five", steps=5), row("unipc", steps=5, solver="unipc")]
    rows += [row("p4", plan="a.safetensors", plan_hash="1", steps=4), row("p6", plan="b", plan_hash="2", steps=6)]
    found = drawn(report_curves.over_calls, [*rows, row("low", steps=5, guidance=1.0)])
    assert found == {
        "default solver": [(5, 2), (10, 1), (20, 0)],
        "unipc": [(5, 3)],
        "plans": [(4, 4), (6, 5)],
    }
    assert not drawn(report_curves.over_calls, [rows[0], row("low", steps=20, guidance=1.0)])


@pytest.mark.parametrize("limits", [(0, 1), (-3e-9, 2e-9), (1e16, 1e16 + 64), (-3e38, 3e38), (5, 5), (0, 5e-324)])
def test_ticks_are_few_and_inside(limits):
    found = charts.ticks(*limits)
    assert 1 <= len(found) <= 6 and all(limits[0] - 1e-9 <= each <= limits[1] + 1e-9 * abs(limits[1]) for each in found)
