"""The report in headless Chromium: sorting, zoom, slider, width of a phone, 2,000 pictures, hostile texts."""

import time

import chromium
import numpy as np
import pytest
from PIL import Image
from test_report_page import ATTACKS, edits_page, evaluated, page_of

from diffpo.common.text import plain
from diffpo.evaluation import compare, report, report_pictures
from diffpo.evaluation.items import Item
from diffpo.evaluation.traits import Traits

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on PATH to open the report with")
SIZES = ((1280, 900, False), (390, 844, True))
SHOWN = "[...document.querySelectorAll('.card .dim')].map(e => Number(e.textContent.match(/\\d+/)[0]))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def without_faults(browser):
    browser.faults.clear()
    yield
    assert browser.faults == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Arm by arm, twelve pictures: those of one arm have one colour."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = ("red", "lime", "blue")
    for arm, colour in enumerate(colours):
        for k in range(12):
            Image.new("RGB", (32, 32), colour).save(folder / f"{12 * arm + k}.png")
    return [[folder / f"{12 * arm + k}.png" for k in range(12)] for arm in range(3)]


@pytest.fixture(scope="module")
def page(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_of(pictures), "utf-8")
    return path


def choose(browser, name, value):
    browser.value(f"(() => {{ const e = document.getElementById('{name}'); e.value = {value!r}; "
                  "e.dispatchEvent(new Event('change')); e.dispatchEvent(new Event('input')) })()")  # fmt: skip


def colour_at(browser, tmp_path, share):
    """The colour of the enlarged picture at this share of the stage's width."""
    browser.value("Promise.all([after, before].filter(e => !e.hidden).map(e => e.decode())).then(() => null)")
    x, y, width, height = browser.box("#stage")
    browser.screenshot(tmp_path / "shot.png")
    with Image.open(tmp_path / "shot.png") as image:
        return image.convert("RGB").getpixel((round(x + width * share), round(y + height * 0.3)))


@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_its_window_and_says_what_it_shows(browser, page, size):
    browser.open(page, *size)
    assert browser.value("document.documentElement.scrollWidth") == size[0]
    assert browser.value(f"{SHOWN}.length") == 12
    unnamed = "[...document.querySelectorAll('button,select,input,svg,img')].filter(e => !(e.ariaLabel || e.alt || "
    assert browser.value(unnamed + "e.labels?.length || e.textContent.trim() || e.closest('dialog'))).length") == 0


def test_the_order_is_by_the_chosen_difference(browser, page, pictures):
    browser.open(page)
    values = evaluated(pictures).scores["clip"]
    for arm, name in ((1, "mine"), (2, "other")):
        differences = values[name] - values["base"]
        scored = np.flatnonzero(~np.isnan(differences))
        nothing = np.flatnonzero(np.isnan(differences)).tolist()
        best = scored[np.argsort(-differences[scored])].tolist()
        choose(browser, "arm", str(arm))
        for order, expected in (("best", best), ("worst", best[::-1]), ("prompt", None)):
            choose(browser, "order", order)
            assert browser.value(SHOWN) == ([*range(12)] if expected is None else expected + nothing)
        choose(browser, "order", "best")
        choose(browser, "score", "1")  # the other score is the first one with its sign changed
        assert browser.value(SHOWN) == best[::-1] + nothing
        choose(browser, "score", "0")
    choose(browser, "filter", "PROMPT 11")
    browser.value("new Promise(done => setTimeout(done, 300))")
    assert browser.value(SHOWN) == [11] and browser.value("count.textContent").startswith("1 of 12")


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_is_enlarged_and_left_by_keys(browser, page, size, tmp_path):
    browser.open(page, *size)
    choose(browser, "order", "prompt")
    browser.click(".card button")
    assert browser.value("zoom.open") and colour_at(browser, tmp_path, 0.5) == (255, 0, 0)
    said = [browser.value("caption.textContent")]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        browser.key(key)
        said.append(browser.value("caption.textContent"))
    found = [(text.split()[0], int(text.partition("#")[2].partition(",")[0])) for text in said]
    path = [("base", 0), ("mine", 0), ("other", 0), ("base", 1), ("other", 0), ("other", 1), ("other", 0)]
    assert found == path and colour_at(browser, tmp_path, 0.5) == (0, 0, 255)
    assert browser.value("document.querySelector('#stage').contains(document.activeElement) || "
                         "zoom.contains(document.activeElement)")  # fmt: skip
    browser.key("Escape")
    assert not browser.value("zoom.open")
    assert browser.value("document.activeElement.closest('.card') !== null")  # back where it was opened


@pytest.mark.parametrize("size", SIZES)
def test_the_slider_moves_by_mouse_touch_and_keys(browser, page, size, tmp_path):
    browser.open(page, *size)
    choose(browser, "order", "prompt")
    browser.click(".card .foot button")
    red, lime, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert (colour_at(browser, tmp_path, 0.45), colour_at(browser, tmp_path, 0.55)) == (red, lime)
    (browser.swipe if size[2] else browser.drag)("#split", 0.64)
    assert 60 < float(browser.value("split.value")) < 68
    assert (colour_at(browser, tmp_path, 0.58), colour_at(browser, tmp_path, 0.69)) == (red, lime)
    at = float(browser.value("split.value"))
    browser.value("split.focus()")
    for _ in range(4):
        browser.key("ArrowRight")
    assert float(browser.value("split.value")) == at + 2
    browser.value("next.focus()")
    browser.key("ArrowLeft")  # from any other control too
    assert float(browser.value("split.value")) == at - 3
    choose(browser, "left", "2")
    assert colour_at(browser, tmp_path, 0.45) == blue
    browser.key("ArrowDown")
    assert "#1," in browser.value("caption.textContent") and browser.value("left.value") == "2"
    browser.key("Escape")
    assert not browser.value("zoom.open")


@pytest.mark.parametrize("size", SIZES)
def test_edits_are_enlarged_and_laid_over_their_sources(browser, pictures, size, tmp_path):
    Image.new("RGB", (64, 32), "yellow").save(tmp_path / "before.png")
    (tmp_path / "page.html").write_text(edits_page(pictures, [tmp_path / "before.png"], ATTACKS[0]), "utf-8")
    browser.open(tmp_path / "page.html", *size)
    assert browser.value("document.documentElement.scrollWidth") == size[0]
    choose(browser, "order", "prompt")
    names = "[...document.querySelector('.card').querySelectorAll('b')].map(e => e.textContent).slice(0, 4)"
    assert browser.value(names) == ["source", "base", "mine", "other"]
    browser.click(".card button")
    yellow, lime = (255, 255, 0), (0, 255, 0)
    assert colour_at(browser, tmp_path, 0.5) == yellow
    for key, name in (("ArrowRight", "base"), ("ArrowLeft", "source, #0,")):
        browser.key(key)
        assert browser.value("caption.textContent").startswith(name)
    browser.click("#slider")
    assert (colour_at(browser, tmp_path, 0.45), colour_at(browser, tmp_path, 0.55)) == (yellow, lime)
    assert browser.value("window.owned") is None


def test_hostile_texts_run_nothing(browser, pictures, tmp_path):
    for attack in (" ".join(ATTACKS), ATTACKS[1]):  # the second one would swallow what follows
        text = page_of(pictures, attack, arms=(f"a{attack}", f"b{attack}", f"c{attack}"), prompt=attack)
        (tmp_path / "page.html").write_text(text, "utf-8")
        browser.open(tmp_path / "page.html")
        assert browser.value("window.owned") is None and browser.value(f"{SHOWN}.length") == 12
        browser.click(".card button")
        assert browser.value("zoomed.textContent").startswith(plain(attack, 900))
        assert browser.value("document.querySelectorAll('iframe,script').length") == 2


def test_a_script_that_is_not_the_page_s_own_does_not_run(browser, page, tmp_path):
    text = page.read_text("utf-8").replace(
        "</main>", "<script>window.owned=1</script><img src=http://127.0.0.1:9></main>"
    )
    (tmp_path / "changed.html").write_text(text)
    browser.open(tmp_path / "changed.html")
    assert browser.value("window.owned") is None and browser.value(f"{SHOWN}.length") == 12
    assert len([fault for fault in browser.faults if "Content Security Policy" in str(fault)]) >= 2
    assert "http://127.0.0.1:9/" not in browser.faults  # it was not even asked for
    browser.faults.clear()


def test_without_scripts_the_best_and_the_worst_are_listed(browser, page):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        width = "[...document.images].filter(e => e.closest('noscript') && e.naturalWidth === 32).length"
        assert browser.value(width) > 20 and browser.value("document.querySelector('.tools').offsetHeight") == 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_two_thousand_pictures_do_not_freeze_it(browser, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for k in range(20):
        texture = np.kron(rng.normal(size=(24, 24, 3)), np.ones((12, 12, 1))) * 40 + rng.normal(size=(288, 288, 3)) * 12
        Image.fromarray(np.clip(texture + 128, 0, 255).astype(np.uint8)).save(tmp_path / f"{k}.png")
    items = [
        Item(k, 0, f"prompt {k}", {arm: tmp_path / f"{(k + 7 * a) % 20}.png" for a, arm in enumerate(("base", "mine"))})
        for k in range(1000)
    ]
    scores = {"clip": {arm: rng.normal(size=1000) for arm in ("base", "mine")}}
    traits = Traits(diversity={arm: np.full(1000, 0.5) for arm in ("base", "mine")})  # not the matter here, and slow
    evaluation = compare.summarise(items, scores, traits=traits)
    made = tmp_path / "report.html"
    made.write_text(report.html(evaluation, [], []), "utf-8")
    assert 10e6 < made.stat().st_size < 25e6
    seconds = browser.open(made)
    ready = browser.value("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") / 1000
    assert browser.value("document.querySelectorAll('.card').length") < 200  # not all at once
    began = time.monotonic()
    choose(browser, "order", "worst")
    sorting = time.monotonic() - began
    down = "new Promise(done => { let k = 0; const go = () => { scrollTo({top: 1e9, behavior: 'instant'}); "
    down += "++k < 8 ? requestAnimationFrame(go) : done(document.querySelectorAll('.card').length) }; go() })"
    began, there = time.monotonic(), browser.value("document.querySelectorAll('.card').length")
    assert browser.value(down) > there  # further cards come where the page ends
    scrolling = time.monotonic() - began
    with capsys.disabled():
        print(f"\n2,000 pictures, {made.stat().st_size / 1e6:.1f} MB: DOMContentLoaded {ready:.2f} s,", end=" ")
        print(f"loaded {seconds:.2f} s, sorted {sorting:.2f} s, eight pages down {scrolling:.2f} s")
    assert ready < 30 and sorting < 10 and scrolling < 60
    assert report_pictures.Thumbnails(2000).side == report_pictures.SMALL
