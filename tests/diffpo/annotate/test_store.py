"""The store of votes: nothing lost, nothing twice, whatever happens to the process and the disk."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from diffpo.annotate.store import FILE, CannotStore, Conflict, Event, Store, counted
from diffpo.common.errors import DiffpoError

BODY = {"ranks": [1, 2], "bad": False, "repeat": 0, "order": [0, 1], "ms": 5}


def event(uid, annotator="ada", task="t", **body):
    return Event(uid, annotator, "vote", task, BODY | body)


def undo(uid, of, annotator="ada"):
    return Event(uid, annotator, "undo", "t", {"of": of})


def test_an_event_that_comes_twice_is_stored_once(tmp_path):
    store = Store(tmp_path)
    assert store.add(event("u1")) and not store.add(event("u1")) and store.add(event("u2", task="s"))
    with pytest.raises(Conflict, match="u1"):
        store.add(event("u1", ms=6))
    assert [each.uid for each in store.events()] == ["u1", "u2"]
    assert [vote.uid for vote in Store(tmp_path, readonly=True).votes()] == ["u1", "u2"]


def test_votes_are_on_the_disk_before_they_are_confirmed(tmp_path):
    store = Store(tmp_path)
    assert store.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store.db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize("late", [False, True])
def test_an_undo_takes_back_its_vote_in_whichever_order_they_come(late):
    first, second, taken = event("v1"), event("v2", ranks=[2, 1]), undo("u1", "v2")
    events = [first, taken, second] if late else [first, second, taken]
    assert [vote.uid for vote in counted(events)] == ["v1"]
    assert [vote.uid for vote in counted([first, second])] == ["v2"]  # the last one counts
    assert counted([first, undo("u0", "v1")]) == []
    again = event("v3", repeat=1)  # a repetition is a vote of its own
    assert [vote.uid for vote in counted([first, again, taken, second])] == ["v1", "v3"]


WRITER = """
import sys
from pathlib import Path
from diffpo.annotate.store import Event, Store
store, start = Store(Path(sys.argv[1])), int(sys.argv[2])
body = {"ranks": [1, 2], "bad": False, "repeat": 0, "order": [0, 1], "ms": 5}
for k in range(start, 10**6):
    store.add(Event(f"vote-{k:06d}", "ada", "vote", f"t{k}", body, {0: b"x" * 3000} if k % 7 == 0 else {}))
    print(k, flush=True)
"""


def test_a_killed_process_loses_no_confirmed_vote_and_a_second_try_stores_none_twice(tmp_path):
    rng, confirmed = np.random.default_rng(0), -1
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(max(0, confirmed))]  # the last one is sent again
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(rng.integers(3, 40)):
            confirmed = max(confirmed, int(process.stdout.readline()))
        time.sleep(rng.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split()
        confirmed = max([confirmed, *map(int, rest)])
        process.wait()
        store = Store(tmp_path)
        stored = Counter(each.uid for each in store.events())
        assert {f"vote-{k:06d}" for k in range(confirmed + 1)} <= set(stored) and set(stored.values()) == {1}
        assert all(store.marks(uid) == ({0: b"x" * 3000} if int(uid[5:]) % 7 == 0 else {}) for uid in stored)
        assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        store.close()


def test_a_full_disk_stores_all_of_a_vote_or_nothing_and_the_vote_can_be_sent_again(tmp_path):
    store = Store(tmp_path)
    store.add(event("v0"))
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count={pages + 1}")  # SQLite's own full disk
    large = replace(event("v1"), marks={0: b"x" * 50_000})
    with pytest.raises(CannotStore, match="the disk is full"):
        store.add(large)
    assert [each.uid for each in store.events()] == ["v0"] and store.marks("v1") == {}
    store.db.execute("PRAGMA max_page_count=100000")
    assert store.add(large) and store.marks("v1") == {0: b"x" * 50_000}


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(DiffpoError, match="votes"):
        Store(tmp_path / "none", readonly=True)
    (tmp_path / FILE).write_bytes(b"something else" * 100)
    with pytest.raises(DiffpoError, match=FILE):
        Store(tmp_path)
    (tmp_path / FILE).unlink()
    Store(tmp_path).set("version", "9")
    with pytest.raises(DiffpoError, match="9"):
        Store(tmp_path)


def test_reading_changes_nothing(tmp_path):
    Store(tmp_path).add(event("v0"))
    with pytest.raises(sqlite3.OperationalError):
        Store(tmp_path, readonly=True).db.execute("DELETE FROM events")
