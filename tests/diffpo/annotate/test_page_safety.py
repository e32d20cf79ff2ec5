"""The page in headless Chromium: hostile texts, the token, a full disk, and a server that is gone for a while."""

import chromium
import pytest
from annotate_page import DESKTOP, READY, SENT, act, begin
from annotated import make_session, served, write_pairs

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on PATH to open the page with")
ATTACKS = (
    "<script>window.owned=1</script>",
    "<img src=x onerror=window.owned=1>",
    "\"'><svg onload=window.owned=1>",
    "</p></main><iframe srcdoc='<script>parent.owned=1</script>'>",
    "javascript:window.owned=1",
)


def test_hostile_prompts_and_names_run_nothing(browser, opened, tmp_path):
    attack = " ".join(ATTACKS)
    source = write_pairs(tmp_path / "pairs", 2, (32, 32), prompt=attack + " {}")
    for side in (0, 1):
        name = f"<img src=x onerror=window.owned=1>{side}.png".replace("/", "")
        (tmp_path / "pairs" / f"0-{side}.png").rename(tmp_path / "pairs" / name)
        source.write_text(source.read_text().replace(f"0-{side}.png", name))
    session = opened(source, name="<b onclick=owned=1>ada</b><script>owned=1</script>")
    assert browser.value("document.querySelector('#prompt').textContent").startswith(attack)
    act(browser, "ArrowLeft")
    assert browser.value("document.querySelector('#name').textContent").startswith("<b onclick")
    elements = "document.querySelectorAll('#prompt *, #name *, iframe, svg, script:not([src])').length"
    assert browser.value(elements) == 0 and browser.value("window.owned") is None
    browser.value("document.querySelector('#name').click()")
    browser.until("!document.querySelector('#card').hidden")
    assert browser.value("window.owned") is None
    browser.until(SENT)
    assert session.store.votes()[0].annotator.startswith("<b onclick")
    browser.value("localStorage.clear()")


def test_a_script_that_was_slipped_into_the_page_does_not_run(browser, opened, tmp_path):
    opened(write_pairs(tmp_path / "pairs", 1, (32, 32)))
    inline = "const s = document.createElement('script'); s.textContent = 'window.owned=1'; document.body.append(s)"
    handler = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.owned=1>')"
    browser.value(f"(() => {{ {inline}; {handler} }})()")
    browser.value("new Promise(done => setTimeout(done, 100))")
    assert browser.value("window.owned") is None
    assert any("Content Security Policy" in str(fault) for fault in browser.faults)
    browser.faults.clear()


def test_a_full_disk_keeps_votes_in_the_browser_until_there_is_room(browser, opened, tmp_path):
    session = opened(write_pairs(tmp_path / "pairs", 40, (16, 16)))
    pages = session.store.db.execute("PRAGMA page_count").fetchone()[0]
    session.store.db.execute(f"PRAGMA max_page_count={pages}")
    for _ in range(30):
        act(browser, "ArrowLeft")
    browser.until("document.querySelector('#notice').textContent.includes('disk is full')")
    stored = len(session.store.votes())
    waiting = browser.value("Object.keys(localStorage).filter(key => key.startsWith('diffpo.out.')).length")
    assert stored < 30 and stored + waiting == 30
    browser.open(browser.own, *DESKTOP)  # also when the page is closed meanwhile
    session.store.db.execute("PRAGMA max_page_count=100000")
    browser.until(SENT, 40)
    browser.until("document.querySelector('#notice').hidden")
    votes = session.store.votes()
    assert len(votes) == 30 and len({vote.task for vote in votes}) == 30 and len(list(session.store.events())) == 30
    browser.faults.clear()  # the failed requests


def test_a_server_that_comes_back_gets_what_was_voted_meanwhile(browser, tmp_path):
    source = write_pairs(tmp_path / "pairs", 8, (16, 16))
    session = make_session(tmp_path / "votes", source)
    with served(session) as browser.own:
        begin(browser, browser.own, DESKTOP, "ada")
        port = int(browser.own.rstrip("/").rpartition(":")[2])
        act(browser, "ArrowLeft")
        browser.until(SENT)
    act(browser, "ArrowLeft")  # the next ones are there already
    act(browser, "t")
    browser.until("document.querySelector('#notice').textContent.includes('2 votes wait')")
    session.store.close()
    again = make_session(tmp_path / "votes", source)
    with served(again, port=port):
        browser.until(SENT, 40)
        assert [vote.ranks is not None for vote in again.store.votes()] == [True] * 3
    browser.faults.clear()  # the refused connections
    browser.own = "file:"


def test_votes_for_a_server_of_another_source_are_kept_until_the_right_one_is_back(browser, tmp_path):
    source = write_pairs(tmp_path / "pairs", 4, (16, 16))
    session = make_session(tmp_path / "votes", source)
    with served(session) as browser.own:
        begin(browser, browser.own, DESKTOP, "ada")
        port = int(browser.own.rstrip("/").rpartition(":")[2])
    act(browser, "ArrowLeft")
    other = make_session(tmp_path / "other", write_pairs(tmp_path / "more", 3, (16, 16), prompt="another {}"))
    with served(other, port=port):
        browser.until(SENT, 40)
        assert "refused" in browser.value("document.querySelector('#notice').textContent")
    session.store.close()
    again = make_session(tmp_path / "votes", source)
    with served(again, port=port):
        browser.open(browser.own, *DESKTOP)
        browser.until(READY)
        browser.until(SENT)
        assert len(again.store.votes()) == 1 and other.store.votes() == []
        browser.call("Page.navigate", url="about:blank")
    browser.faults.clear()
    browser.own = "file:"


def test_the_token_opens_the_page_once_and_the_cookie_after_that(browser, tmp_path):
    token = "correct-horse-battery-staple"  # noqa: S105
    session = make_session(tmp_path / "votes", write_pairs(tmp_path / "pairs", 2, (16, 16)))
    with served(session, token) as address:
        browser.own = address
        browser.open(address)
        assert "token" in browser.value("document.body.textContent")
        begin(browser, f"{address}?token={token}", DESKTOP, "ada")
        assert browser.value("location.href") == address and browser.value("document.cookie") == ""
        act(browser, "ArrowLeft")
        browser.until(SENT)
        browser.open(address)
        browser.until(READY)
        assert len(session.store.votes()) == 1
        browser.call("Page.navigate", url="about:blank")
    assert all("401" in str(fault) for fault in browser.faults)
    browser.own = "file:"
