"""Whatever a browser sends: votes are stored or refused with a status, and the server never fails."""

import pytest
from annotated import client, make_session, vote, write_pairs
from hypothesis import example, given
from hypothesis import strategies as st

TEXT = st.text(max_size=80)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("kind", "uid", "annotator", "task", "repeat", "ranks", "bad", "ms", "marks", "of")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz-votes")
    return client(make_session(folder / "votes", write_pairs(folder / "pairs", 2)))


@given(changes=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3))
def test_a_vote_with_anything_in_its_fields(page, changes):
    task = page.post("/api/next", json={"annotator": "ada", "n": 1}).json()["tasks"]
    good = vote(task[0]["task"] if task else "0" * 16, [1, 2], "vote-0001")
    assert page.post("/api/event", content=_json(good | changes), headers=JSON).status_code in (200, 400, 403, 404, 409)


@given(body=ANYTHING)
def test_a_body_of_any_json(page, body):
    for path in ("/api/event", "/api/next"):
        assert page.post(path, content=_json(body), headers=JSON).status_code == 400


@given(body=st.binary(max_size=200))
def test_a_body_of_any_bytes(page, body):
    for path in ("/api/event", "/api/next"):
        assert page.post(path, content=body, headers=JSON).status_code == 400


@given(name=st.text(max_size=60))
@example(name="0/")
@example(name="/")
@example(name="about/")
def test_any_address(page, name):
    from urllib.parse import quote

    for start in ("/", "/picture/", "/api/"):
        status = page.get(start + quote(name, safe="", errors="replace")).status_code
        assert status in (200, 204, 404, 405) and (status == 404 or start != "/picture/" or not name)


JSON = {"content-type": "application/json"}


def _json(value) -> bytes:
    import json

    return json.dumps(value).encode()
