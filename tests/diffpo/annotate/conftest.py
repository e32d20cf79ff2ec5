import chromium
import pytest
from annotate_page import DESKTOP, begin
from annotated import make_session, served

from diffpo.annotate.assign import Plan


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """opened(source, size, ...): the session of a page that is opened and begun by ada."""
    with_server = []

    def make(source, size=DESKTOP, name="ada", token=None, plan=Plan(repeat=0.0), **about):  # noqa: B008 (frozen)
        session = make_session(tmp_path / "votes", source, plan, **about)
        context = served(session, token)
        browser.own = context.__enter__()
        with_server.append(context)
        browser.faults.clear()
        begin(browser, browser.own, size, name)
        return session

    yield make
    assert browser.faults == []
    browser.call("Page.navigate", url="about:blank")  # before its server is gone
    for context in with_server:
        context.__exit__(None, None, None)
    browser.own = "file:"
