"""The votes of a folder, in SQLite: events are appended and never changed.

An undo is an event too. Every event has an id that the browser made, so an event that is sent twice is stored once.
WAL with ``synchronous=FULL``: a commit returns once its pages in the log are flushed to the disk. So a vote that the
page has an answer for outlives a kill and a power cut. NORMAL would flush at checkpoints only.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.text import plain

FILE = "votes.sqlite"
VERSION = "1"
TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, time REAL NOT NULL, annotator TEXT NOT NULL, kind TEXT NOT NULL,
    task TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS marks (
    uid TEXT NOT NULL, picture INTEGER NOT NULL, png BLOB NOT NULL, PRIMARY KEY (uid, picture));
"""


class CannotStore(Exception):
    """The disk is full or cannot be written: the event is not stored, and may be sent again."""


class Conflict(Exception):
    """An event of this id is stored with other content."""


@dataclass(frozen=True)
class Event:
    """A vote, or the undo of one.

    Attributes:
        uid: made by the browser.
        kind: vote, or undo, whose ``body`` is {"of": the uid of the vote}.
        body: of a vote {"ranks": of each picture in the task's own order, 1 is best, or None for a skip; "bad": all are
            bad; "repeat": 1 if it is asked for the second time; "order": the task's numbers as shown; "ms": how long}.
        marks: PNG by the picture's number in the task.
        time: seconds since 1970, of the server; 0: when it is stored.
    """

    uid: str
    annotator: str
    kind: str
    task: str
    body: Mapping[str, Any]
    marks: Mapping[int, bytes] = field(default_factory=dict)
    time: float = 0.0


@dataclass(frozen=True)
class Vote:
    """What counts of the events: the last vote of an annotator on a task that is not undone."""

    uid: str
    annotator: str
    task: str
    ranks: tuple[int, ...] | None  # None: skipped
    bad: bool
    repeat: int
    order: tuple[int, ...]
    ms: int
    time: float


class Store:
    """The file of a folder; made if it is missing. One connection, which threads take in turn.

    DiffpoError if it is not a file of votes, or of another version.
    """

    def __init__(self, folder: Path, readonly: bool = False) -> None:
        self.path = folder / FILE
        if readonly and not self.path.is_file():
            raise DiffpoError(f"{folder} holds no votes: there is no {FILE}. `diffpo annotate` makes it")
        self.lock = threading.Lock()
        try:
            if readonly:
                self.db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30)
                self.db.execute("PRAGMA query_only=1")
            else:
                folder.mkdir(parents=True, exist_ok=True)
                self.db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30)
                self.db.execute("PRAGMA journal_mode=WAL")
                self.db.execute("PRAGMA synchronous=FULL")
                self.db.executescript(TABLES)
                self.db.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (VERSION,))
            version = self.get("version")
        except (sqlite3.Error, OSError) as error:
            raise DiffpoError(f"cannot open the votes {self.path}: {error}. Choose another folder with --out") from None
        if version != VERSION:
            raise DiffpoError(f"{self.path} is of version {plain(version, 20)} of the store, not {VERSION}")

    def close(self) -> None:
        self.db.close()

    # ---- settings

    def get(self, key: str) -> str | None:
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def set(self, key: str, value: str) -> None:
        with self.lock:
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # ---- events

    def add(self, event: Event) -> bool:
        """Store an event; it is on the disk when this returns. False if it is there already.

        Raises CannotStore if it cannot be written, and Conflict for an id that has other content.
        """
        text = json.dumps(event.body, sort_keys=True)
        content = (event.annotator, event.kind, event.task, text)
        with self.lock:
            try:
                self.db.execute("BEGIN IMMEDIATE")
                there = self.db.execute(
                    "SELECT annotator, kind, task, body FROM events WHERE uid = ?", (event.uid,)
                ).fetchone()
                if there is None:
                    row = (event.uid, event.time or time.time(), *content)
                    self.db.execute(
                        "INSERT INTO events (uid, time, annotator, kind, task, body) VALUES (?, ?, ?, ?, ?, ?)", row
                    )
                    for picture, png in event.marks.items():
                        self.db.execute("INSERT INTO marks VALUES (?, ?, ?)", (event.uid, picture, png))
                self.db.execute("COMMIT")
            except sqlite3.Error as error:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                full = "full" in str(error)
                raise CannotStore("the disk is full" if full else str(error)) from error
        if there is not None and there != content:
            raise Conflict(f"the id {plain(event.uid, 64)} was used for another vote")
        return there is None

    def events(self, after: int = 0) -> Iterator[Event]:
        """All events in the order in which they came, without their marks."""
        with self.lock:
            rows = self.db.execute(
                "SELECT uid, annotator, kind, task, body, time FROM events WHERE seq > ? ORDER BY seq", (after,)
            ).fetchall()
        for uid, annotator, kind, task, body, when in rows:
            yield Event(uid, annotator, kind, task, json.loads(body), {}, when)

    def marks(self, uid: str) -> dict[int, bytes]:
        """The PNG masks of a vote by the picture's number in the task."""
        with self.lock:
            return dict(self.db.execute("SELECT picture, png FROM marks WHERE uid = ?", (uid,)).fetchall())

    def votes(self) -> list[Vote]:
        """The votes that count, in the order in which they came."""
        return counted(list(self.events()))


def counted(events: Sequence[Event]) -> list[Vote]:
    """The votes that count: not undone, and of one annotator on one task, asked once or again, the last. The order in
    which a vote and its undo came does not matter."""
    undone = {event.body["of"] for event in events if event.kind == "undo"}
    last: dict[tuple[str, str, int], Event] = {}
    for event in events:
        if event.kind == "vote" and event.uid not in undone:
            key = (event.annotator, event.task, event.body["repeat"])
            last.pop(key, None)  # so that the last one also has the last place
            last[key] = event
    return [vote(event) for event in last.values()]


def vote(event: Event) -> Vote:
    """A vote's event as a value."""
    body = event.body
    ranks = None if body["ranks"] is None else tuple(body["ranks"])
    about = (bool(body["bad"]), int(body["repeat"]), tuple(body["order"]), int(body["ms"]))
    return Vote(event.uid, event.annotator, event.task, ranks, *about, event.time)
