"""The page in headless Chromium: votes by keys and fingers, undo, zoom, sets, and marks that reach training."""

import io
import json

import chromium
import numpy as np
import pytest
from annotate_page import DESKTOP, PHONE, READY, SENT, SHOWN, act, by_prompt
from annotated import picture, png, write_pairs, write_table
from PIL import Image

from diffpo.annotate import export
from diffpo.annotate.export import Export

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on PATH to open the page with")


def test_keys_vote_for_what_is_seen_and_undo_takes_it_back(browser, opened, tmp_path):
    session = opened(write_pairs(tmp_path / "pairs", 6, (64, 64)))
    wanted, seen = {}, []
    for key, said in (("ArrowLeft", (1, 2)), ("ArrowRight", (2, 1)), ("t", (1, 1)), ("b", "bad"), ("s", None)):
        prompt = browser.value("document.querySelector('#prompt').textContent")
        task = next(task for task in session.tasks.all if task.prompt == prompt)
        keys = [each.key for each in task.pictures]
        assert sorted(browser.value(SHOWN)) == sorted(keys)
        wanted[prompt] = said
        seen.append(prompt)
        act(browser, key)
    browser.until(SENT)
    assert by_prompt(session) == wanted
    for vote in session.store.votes():  # the sides that were shown are those that the server knows
        assert 0 <= vote.ms < 60_000
    browser.key("u")
    browser.until(f"document.querySelector('#prompt').textContent === {json.dumps(seen[-1])} && {READY}")
    browser.key("u")
    browser.until(f"document.querySelector('#prompt').textContent === {json.dumps(seen[-2])} && {READY}")
    browser.until(SENT)
    assert by_prompt(session) == {prompt: wanted[prompt] for prompt in seen[:3]}
    act(browser, "ArrowLeft")
    browser.until(SENT)
    assert by_prompt(session)[seen[3]] == (1, 2) and len(by_prompt(session)) == 4
    while browser.value("document.querySelector('#end').hidden"):
        act(browser, "ArrowRight")
    browser.until(SENT)
    assert len(by_prompt(session)) == 6 and "6 votes" in browser.value("document.querySelector('#thanks').textContent")
    assert browser.value("document.querySelector('#count').textContent") == "6 of 6 votes"


def test_the_pictures_on_the_screen_are_those_that_the_vote_is_about(browser, opened, tmp_path):
    for k in range(4):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "pairs" / f"{k}-0.png", comment=str(k))
        Image.new("RGB", (64, 64), (0, 0, 255 - k)).save(tmp_path / "pairs" / f"{k}-1.png")
    rows = [{"prompt": f"p{k}", "image_0": f"{k}-0.png", "image_1": f"{k}-1.png"} for k in range(4)]
    (tmp_path / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = opened(tmp_path / "pairs" / "pairs.jsonl")
    for _ in range(4):
        x, y, width, height = browser.box(".frame")
        browser.screenshot(tmp_path / "shot.png")
        with Image.open(tmp_path / "shot.png") as shot:
            red = shot.convert("RGB").getpixel((int(x + width / 2), int(y + height / 2)))[0] > 200
        act(browser, "ArrowLeft" if red else "ArrowRight")  # always the red one
    browser.until(SENT)
    assert [vote.ranks for vote in session.store.votes()] == [(1, 2)] * 4


def test_edits_stand_below_what_they_are_of(browser, opened, tmp_path):
    """The sources of each task, below its prompt and above its pictures; none where there are none."""
    before = [[png(picture(70 + k)), png(picture(80 + k))][: 2 - k] for k in range(2)]
    rows = [{"prompt": f"edit {k}", "before": before[k]} for k in range(2)]
    rows = [row | {f"image_{i}": png(picture(2 * k + i)) for i in range(2)} for k, row in enumerate(rows)]
    session = opened(write_table(tmp_path / "edits.parquet", rows), before="before")
    seen = "[...document.querySelectorAll('#sources img')]"
    for _ in range(2):
        prompt = browser.value("document.querySelector('#prompt').textContent")
        task = next(task for task in session.tasks.all if task.prompt == prompt)
        browser.until(f"{seen}.every(e => e.naturalWidth === 24)")
        assert browser.value(f"{seen}.map(e => e.src.split('/').pop())") == [each.key for each in task.sources]
        bottom, top = browser.value(
            f"[Math.max(...{seen}.map(e => e.getBoundingClientRect().bottom)), "
            "document.querySelector('.frame').getBoundingClientRect().top]"
        )
        assert 0 < bottom <= top
        act(browser, "ArrowLeft")
    assert browser.value(f"{seen}.length") == 0
    browser.until(SENT)


def test_fingers_vote_at_the_width_of_a_phone(browser, opened, tmp_path):
    session = opened(write_pairs(tmp_path / "pairs", 3, (64, 64)), PHONE)
    assert browser.value("document.documentElement.scrollWidth") == 390
    boxes = browser.value("[...document.querySelectorAll('.frame')].map(e => { const b = e.getBoundingClientRect(); "
                          "return [b.x, b.y, b.right, b.bottom] })")  # fmt: skip
    assert all(box[0] >= 0 and box[2] <= 390 and box[3] <= 844 and box[2] - box[0] > 250 for box in boxes)
    small = "[...document.querySelectorAll('footer button')].filter(e => e.offsetParent && e.offsetHeight < 44).length"
    assert browser.value(small) == 0  # large enough for a finger
    for selector in (".frame:last-child", "[data-do=tie]", ".frame:first-child"):
        before = browser.value("document.querySelector('#prompt').textContent")
        x, y, width, height = browser.box(selector)
        at = [{"x": x + width / 2, "y": y + height / 2}]
        browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=at)
        browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        browser.until(f"document.querySelector('#prompt').textContent !== {json.dumps(before)}")
        browser.until(f"({READY}) || !document.querySelector('#end').hidden")
    browser.until(SENT)
    assert [*by_prompt(session).values()] == [(2, 1), (1, 1), (1, 2)]


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_mark_becomes_the_mask_that_weighs_the_error_in_training(browser, opened, tmp_path, size):
    import torch

    from diffpo.config import Columns, Data
    from diffpo.data.groups import load_groups
    from diffpo.objective.reward import squared_error

    session = opened(write_pairs(tmp_path / "pairs", 2, (64, 64)), size)
    marked = browser.value(SHOWN)[0]
    browser.key("m")
    browser.until("document.body.classList.contains('marking')")
    (browser.swipe if size[2] else browser.drag)(".frame", 0.9)  # from the middle to the right
    assert browser.value("document.querySelector('#votes').hidden") and len(session.store.votes()) == 0
    browser.key("m")
    act(browser, "ArrowRight")
    browser.until(SENT)
    export.run(tmp_path / "votes", tmp_path / "votes.parquet", Export())
    groups = load_groups(Data(resolution=64, columns=Columns(mask="mask")), str(tmp_path / "votes.parquet"), "train")
    white = np.asarray(groups.mask(0)) > 0
    assert white.shape == (64, 64) and white[32, 34:56].all() and not white[:, :28].any() and not white[:24].any()
    assert 0.02 < white.mean() < 0.1
    (vote,) = session.store.votes()
    (number,) = session.store.marks(vote.uid)
    assert session.tasks.by_id[vote.task].pictures[number].key == marked
    # squared errors in the marked places count, those elsewhere do not
    weight = torch.from_numpy(white.astype(np.float32))[None, None]
    weight = weight / weight.mean()
    inside, outside = torch.from_numpy(white)[None, None].float(), torch.from_numpy(~white)[None, None].float()
    zero = torch.zeros(1, 1, 64, 64)
    assert squared_error(inside, zero, weight).item() == pytest.approx(1) and squared_error(outside, zero, weight) == 0


def test_an_eraser_and_an_undo_of_a_marked_vote(browser, opened, tmp_path):
    session = opened(write_pairs(tmp_path / "pairs", 2, (64, 64)))
    for key in ("m", "]", "]"):
        browser.key(key)
    browser.drag(".frame", 0.9)
    browser.key("m")
    act(browser, "ArrowLeft")
    browser.key("u")  # the mark is there again
    browser.until(READY)
    browser.key("m")
    browser.key("e")
    browser.drag(".frame", 0.9)
    browser.key("m")
    act(browser, "ArrowLeft")
    browser.until(SENT)
    first, second = [each for each in session.store.events() if each.kind == "vote"]
    with Image.open(io.BytesIO(next(iter(session.store.marks(first.uid).values())))) as image:
        assert image.convert("L").getbbox()
    with Image.open(io.BytesIO(next(iter(session.store.marks(second.uid).values())))) as image:
        assert image.convert("L").getbbox() is None  # all erased


@pytest.mark.parametrize("ask", ["best", "ranking"])
def test_sets_by_number_keys(browser, opened, tmp_path, ask):
    images = [png(picture(k, (48, 48))) for k in range(4)]
    source = write_table(tmp_path / "lists.parquet", [{"prompt": f"p{k}", "images": images} for k in range(2)])
    session = opened(source, ask=ask)
    for key in "3" if ask == "best" else "31":
        browser.key(key)
    if ask == "ranking":
        browser.key("r")  # start over
        for key in "24":
            browser.key(key)
        act(browser, "1")  # the last one follows
    browser.until(SENT)
    browser.until(READY)
    assert [*by_prompt(session).values()] == [(2, 2, 1, 2) if ask == "best" else (3, 1, 4, 2)]


def test_zoom_is_shared_and_a_click_in_it_does_not_vote(browser, opened, tmp_path):
    session = opened(write_pairs(tmp_path / "pairs", 2, (64, 64)))
    browser.key("z")
    browser.drag(".frame", 0.8)
    scale = "[...document.querySelectorAll('.layer')].map(e => new DOMMatrix(getComputedStyle(e).transform))"
    found = browser.value(f"{scale}.map(m => [m.a, m.e, m.f])")
    assert found[0] == pytest.approx(found[1]) and found[0][0] == 2.5 and found[0][1] < 0
    browser.click(".frame")
    browser.key("Escape")
    assert browser.value(f"{scale}.map(m => m.a)") == [1, 1] and session.store.votes() == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (844, 390, True)])
def test_everything_fits_and_has_a_name_and_motion_can_be_reduced(browser, opened, tmp_path, size):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    try:
        opened(write_pairs(tmp_path / "pairs", 1, (96, 64), prompt="word " * 300 + "{}"), size)
        width, height = size[:2]
        out = "[...document.querySelectorAll('.frame, header, footer, footer button')].map(e => "
        out += "e.getBoundingClientRect()).filter(b => b.width && (b.x < -1 || b.y < -1 || "
        out += f"b.right > {width + 1} || b.bottom > {height + 1})).length"
        assert browser.value(out) == 0
        unnamed = "[...document.querySelectorAll('button, input')].filter(e => !(e.ariaLabel || e.labels?.length || "
        assert browser.value(unnamed + "e.textContent.trim())).length") == 0
        assert browser.value("getComputedStyle(document.querySelector('#done')).transitionDuration") in ("0s", "")
        grey = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        assert len(set(browser.value(grey))) == 1  # no tint around the pictures
    finally:
        browser.call("Emulation.setEmulatedMedia", features=[])
