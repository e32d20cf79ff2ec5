"""For tests that vote in a browser: opening the page, and pressing keys until the next task is there."""

import json

DESKTOP, PHONE = (1280, 900, False), (390, 844, True)
READY = "document.querySelectorAll('.frame.ready').length > 1 && !document.querySelector('#votes button:disabled')"
SENT = "!Object.keys(localStorage).some(key => key.startsWith('diffpo.out.'))"
SHOWN = "[...document.querySelectorAll('.frame img')].map(e => e.src.split('/').pop())"


def begin(browser, address, size, name):
    browser.open(address, *size)
    browser.until("!document.querySelector('#card').hidden || !!document.querySelector('.frame')")
    if not browser.value("document.querySelector('#card').hidden"):
        browser.value("document.querySelector('#who').focus()")
        browser.call("Input.insertText", text=name)
        browser.click("#begin button")
    browser.until(READY)


def act(browser, key):
    """Press a key, and wait until another task is shown or the end."""
    before = browser.value("document.querySelector('#prompt').textContent")
    browser.key(key)
    text = json.dumps(before)
    browser.until(f"document.querySelector('#prompt').textContent !== {text}")
    browser.until(f"({READY}) || !document.querySelector('#end').hidden")


def by_prompt(session):
    """{prompt: the ranks as they were shown, or bad or None}, and the votes."""
    found = {}
    for vote in session.store.votes():
        task = session.tasks.by_id[vote.task]
        shown = vote.ranks and tuple(vote.ranks[k] for k in vote.order)
        found[task.prompt] = "bad" if vote.bad else shown
    return found


def vote_by_oracle(browser, session):
    """Vote on everything by keys, for the picture whose total the oracle of the embedded world puts higher."""
    from PIL import Image

    from diffpo import shapes

    while browser.value("document.querySelector('#end').hidden"):
        prompt = browser.value("document.querySelector('#prompt').textContent")
        places = {each.key: each.place for task in session.tasks.all for each in task.pictures}
        totals = [shapes.score(Image.open(places[key]), prompt)["total"] for key in browser.value(SHOWN)]
        act(browser, "ArrowLeft" if totals[0] > totals[1] else "ArrowRight")
    browser.until(SENT)
