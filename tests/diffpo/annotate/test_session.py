"""Votes by HTTP: what is stored, what is refused, and a full disk."""

import base64
import io
from dataclasses import replace

import pytest
from annotated import cast, client, made_tasks, make_session, mask, picture, vote, write_pairs
from PIL import Image

from diffpo.annotate import session as sessions
from diffpo.annotate.assign import Plan
from diffpo.annotate.session import Refused, Session
from diffpo.annotate.tasks import Tasks
from diffpo.common.errors import DiffpoError


@pytest.fixture
def session(tmp_path):
    return make_session(tmp_path / "votes", write_pairs(tmp_path / "pairs"))


def given(session, n=1, annotator="ada"):
    return session.next(annotator, n, [])["tasks"]


def test_a_vote_is_stored_in_the_order_of_the_task_whatever_side_it_was_on(session):
    page = client(session)
    orders = set()
    for k, task in enumerate(given(session, 6)):
        first = session.tasks.by_id[task["task"]].pictures[0].key
        ranks = [1, 2] if task["pictures"][0] == first else [2, 1]  # always the task's first picture
        answer = page.post("/api/event", json=vote(task["task"], ranks, f"vote-{k:04d}", ms=1200 + k))
        assert answer.status_code == 200 and answer.json()["new"]
        assert answer.json()["progress"] == {"mine": k + 1, "done": k + 1, "wanted": 6}
        orders.add(tuple(ranks))
    assert orders == {(1, 2), (2, 1)}  # both sides came up
    votes = session.store.votes()
    assert [each.ranks for each in votes] == [(1, 2)] * 6 and [each.ms for each in votes] == [*range(1200, 1206)]
    assert given(session) == []


def test_a_post_that_is_sent_again_changes_nothing(session):
    page, (task,) = client(session), given(session)
    event = vote(task["task"], [1, 1], "vote-0001", marks={"0": mask((24, 16), (0, 0, 5, 5))})
    first, second = (page.post("/api/event", json=event) for _ in range(2))
    assert (first.json()["new"], second.json()["new"]) == (True, False) and len(list(session.store.events())) == 1
    assert first.json()["progress"] == second.json()["progress"]
    other = page.post("/api/event", json=event | {"ranks": [1, 2]})
    assert other.status_code == 409 and session.store.votes()[0].ranks == (1, 1)


def test_undo_gives_the_task_back_and_only_to_its_annotator(session, tmp_path):
    page, (task,) = client(session), given(session)
    cast(session, task, 0, "vote-0001")
    undo = {"kind": "undo", "uid": "undo-0001", "of": "vote-0001"}
    assert page.post("/api/event", json=undo | {"annotator": "bob"}).status_code == 403
    assert page.post("/api/event", json=undo | {"annotator": "ada"}).json()["progress"]["done"] == 0
    assert session.store.votes() == [] and task["task"] in [each["task"] for each in given(session, 9)]
    again = Session(tmp_path / "votes", session.tasks, session.plan)  # and after a restart
    assert again.desk.progress("ada") == {"mine": 0, "done": 0, "wanted": 6}


def test_an_undo_that_comes_before_its_vote_still_counts(session):
    (task,) = given(session)
    session.record({"kind": "undo", "uid": "undo-0001", "of": "vote-0001", "annotator": "ada"})
    cast(session, task, 0, "vote-0001")
    assert session.store.votes() == [] and session.desk.progress("ada")["done"] == 0


def test_of_two_votes_on_one_task_the_last_counts_and_its_undo_brings_back_the_first(session, tmp_path):
    (task,) = given(session)
    cast(session, task, 0, "vote-0001")
    cast(session, task, 1, "vote-0002")  # from another window
    assert session.desk.progress("ada")["mine"] == 1 and session.store.votes()[0].ranks == (2, 1)
    session.record({"kind": "undo", "uid": "undo-0001", "of": "vote-0002", "annotator": "ada"})
    (vote_,) = session.store.votes()
    assert vote_.ranks == (1, 2) and session.desk.votes["ada", task["task"], 0] == vote_


def test_a_mask_is_stored_for_its_own_picture_as_black_and_white(session):
    for k, task in enumerate(given(session, 6)):
        cast(session, task, 1, f"vote-{k:04d}", marks={"0": mask((24, 16), (2, 3, 10, 9))})
        (number, png), *rest = session.store.marks(f"vote-{k:04d}").items()
        assert rest == [] and session.tasks.by_id[task["task"]].pictures[number].key == task["pictures"][0]
        with Image.open(io.BytesIO(png)) as image:
            assert (image.mode, image.size, image.convert("L").getbbox()) == ("1", (24, 16), (2, 3, 10, 9))


BAD = [
    *({"uid": each} for each in (None, "short", "a b c d e f g", "x" * 65, 5)),
    *({"annotator": each} for each in (None, "", "   ", "x" * 65, 7)),
    *({"ranks": each} for each in ([1], [1, 2, 3], [2, 2], [0, 1], [1, 3], ["1", 2], [1.0, 2], "12", {}, [True, 2])),
    *({"repeat": each} for each in (2, -1, None, "0")),
    *({"ms": each} for each in (-1, 1.5, None, 2**50)),
    {"bad": "yes"},
    *({"marks": each} for each in ([], {"2": ""}, {"x": ""}, {"0": "no base64!"}, {"0": "AAAA"}, {"0": 5})),
    {"marks": {"0": mask((25, 16), (0, 0, 5, 5))}},  # not the picture's size
]


def test_votes_that_cannot_be_used_are_refused_and_nothing_is_stored(session):
    page, (task,) = client(session), given(session)
    for change in BAD:
        answer = page.post("/api/event", json=vote(task["task"], [1, 2], "vote-0001") | change)
        assert answer.status_code == 400 and answer.json()["error"], change
    assert page.post("/api/event", json=vote("0" * 16, [1, 2], "vote-0001")).status_code == 404
    for body in (b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000):
        answer = page.post("/api/event", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body[:10]
    for body in ({}, {"annotator": "a", "n": 99}, {"annotator": "a", "n": "1"}, {"annotator": "a", "n": 1, "have": 5}):
        assert page.post("/api/next", json=body).status_code == 400
    assert list(session.store.events()) == []


def test_a_picture_bomb_in_a_mark_is_refused_before_it_is_decoded(session, monkeypatch):
    (task,) = given(session)
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    opened = []
    monkeypatch.setattr(Image.Image, "convert", lambda self, *a, **k: opened.append(self.size) or self)
    event = vote(task["task"], [1, 2], "vote-0001", marks={"0": base64.b64encode(buffer.getvalue()).decode()})
    with pytest.raises(Refused) as refused:
        session.record(event)
    assert refused.value.status == 400 and (20_000, 20_000) not in opened


def test_a_full_disk_is_said_and_the_vote_can_be_sent_again(session):
    page, (task,) = client(session), given(session)
    pages = session.store.db.execute("PRAGMA page_count").fetchone()[0]
    session.store.db.execute(f"PRAGMA max_page_count={pages}")
    answers = [
        page.post("/api/event", json=vote(task["task"], [1, 2], f"vote-{k:04d}", annotator="x" * 60)) for k in range(60)
    ]
    stored = len(list(session.store.events()))
    statuses = [answer.status_code for answer in answers]
    assert 0 < stored < 60 and statuses == [200] * stored + [507] * (60 - stored)
    assert "disk is full" in answers[-1].json()["error"]
    session.store.db.execute("PRAGMA max_page_count=10000")
    again = page.post("/api/event", json=vote(task["task"], [1, 2], "vote-0059", annotator="x" * 60))
    assert again.json()["new"] and len(list(session.store.events())) == stored + 1


def test_a_folder_goes_on_with_its_own_seed_and_source_only(session, tmp_path):
    (task,) = given(session)
    cast(session, task, 0, "vote-0001")
    with pytest.raises(DiffpoError, match="--shuffle 0"):
        Session(tmp_path / "votes", session.tasks, Plan(repeat=0.0, seed=1))
    with pytest.raises(DiffpoError, match="--ask best"):
        Session(tmp_path / "votes", replace(session.tasks, ask="ranking"), session.plan)
    with pytest.raises(DiffpoError, match="1 tasks"):
        Session(tmp_path / "votes", Tasks(made_tasks(3)), session.plan)


@pytest.mark.parametrize(
    ("name", "mode", "kind"),
    [
        *(("a.png", "RGB", "image/png"), ("a.jpg", "L", "image/jpeg"), ("a.webp", "RGB", "image/webp")),
        *(("a.png", "RGBA", None), ("a.tiff", "RGB", None), ("a.gif", "P", None)),
        *(("a.jpg", "CMYK", None), ("a.bmp", "RGB", None)),
    ],
)
def test_browsers_get_what_they_can_show_with_the_pixels_that_training_sees(tmp_path, name, mode, kind):
    from diffpo.common.images import decode

    path = tmp_path / name
    image = picture(3).convert(mode)
    if mode == "RGBA":
        image.putalpha(120)
    image.save(path)
    found, data = sessions._for_browser(path.read_bytes())
    assert found == (kind or "image/png")
    with Image.open(io.BytesIO(data)) as shown:
        assert shown.convert("RGB").tobytes() == decode(path.read_bytes()).tobytes()


def test_a_picture_that_changed_is_not_shown(session, tmp_path):
    page, (task,) = client(session), given(session)
    for side in ("0", "1"):
        for k in range(6):
            picture(99).save(tmp_path / "pairs" / f"{k}-{side}.png")
    assert page.get(f"/picture/{task['pictures'][0]}").status_code == 409
