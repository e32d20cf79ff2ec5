"""A running annotation: tasks, store and desk together, and what a browser may ask of them."""

from __future__ import annotations

import json
import re
import threading
import time
from base64 import b64decode
from collections import OrderedDict
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..common.errors import DiffpoError
from ..common.images import PIXELS, BadRow, decode
from . import assign
from .assign import Assignment, Desk, Plan
from .store import Event, Store, counted, vote
from .tasks import Picture, Task, Tasks

UID = re.compile(r"[A-Za-z0-9_-]{8,64}")
NAME = 64  # characters of an annotator's name
CACHED = 64  # pictures that are kept in memory
AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
MARKS = 2**25  # pixels of all marks of a vote


class Refused(Exception):
    """What a browser sent cannot be used: a status of HTTP and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Session:
    """All methods may be called from several threads. DiffpoError if the folder was begun with other settings."""

    def __init__(self, folder: Path, tasks: Tasks, plan: Plan) -> None:
        self.tasks, self.plan, self.store = tasks, plan, Store(folder)
        self.lock = threading.Lock()
        self._check_same(folder)
        self.desk = Desk(tasks.all, plan)
        events = list(self.store.events())
        self.undone = {event.body["of"] for event in events if event.kind == "undo"}
        for each in counted(events):
            if each.task in tasks.by_id:
                self.desk.put(each)
        self.places = {event.uid: event for event in events if event.kind == "vote"}
        lost = {each.task for each in counted(events)} - set(tasks.by_id)
        if lost:
            raise DiffpoError(
                f"{folder} holds votes on {len(lost)} tasks that the source no longer has: give the source that it was "
                "begun with, or choose another folder with --out"
            )
        self._served: OrderedDict[str, tuple[str, bytes]] = OrderedDict()

    def _check_same(self, folder: Path) -> None:
        """The sides of the votes follow from the seed, and what their ranks mean from what was asked."""
        for key, option, now in (("seed", "--shuffle", str(self.plan.seed)), ("ask", "--ask", self.tasks.ask)):
            before = self.store.get(key)
            if before is None:
                self.store.set(key, now)
            elif before != now:
                raise DiffpoError(f"{folder} was begun with {option} {before}: use it, or another folder with --out")
        self.store.set("plan", json.dumps(asdict(self.plan)))

    # ---- what is asked

    def next(self, annotator: Any, n: Any, have: Any) -> dict[str, Any]:
        """The next tasks of an annotator, as the page shows them, and the progress."""
        annotator = _name(annotator)
        good = isinstance(n, int) and 0 <= n <= 20 and isinstance(have, list) and len(have) < 10_000
        if not good or not all(isinstance(each, str) for each in have):
            raise Refused(400, "n must be 0 to 20, and have a list of tasks")
        with self.lock:
            found = self.desk.next(annotator, n, have)
            return {"tasks": [self._shown(each) for each in found], "progress": self.desk.progress(annotator)}

    def _shown(self, given: Assignment) -> dict[str, Any]:
        pictures = [given.task.pictures[k].key for k in given.order]
        found = {"task": given.task.id, "repeat": given.repeat, "prompt": given.task.prompt, "pictures": pictures}
        return found | {"sources": [each.key for each in given.task.sources]}

    def record(self, sent: Any) -> dict[str, Any]:
        """Store a vote or an undo. Raises Refused, CannotStore and Conflict."""
        if not isinstance(sent, dict) or not isinstance(sent.get("uid"), str) or not UID.fullmatch(sent["uid"]):
            raise Refused(400, "an event needs a uid of 8 to 64 letters and digits")
        annotator = _name(sent.get("annotator"))
        event = self._undo(sent, annotator) if sent.get("kind") == "undo" else self._vote(sent, annotator)
        new = self.store.add(event)
        with self.lock:
            if new:
                self._count(event)
            return {"new": new, "progress": self.desk.progress(annotator)}

    def _count(self, event: Event) -> None:
        if event.kind == "vote":
            self.places[event.uid] = event
            if event.uid not in self.undone:
                self.desk.put(vote(event))
            return
        self.undone.add(event.body["of"])
        of = self.places.get(event.body["of"])
        if of is None:
            return
        key = (of.annotator, of.task, int(of.body["repeat"]))
        if (current := self.desk.votes.get(key)) and current.uid == of.uid:
            self.desk.take_back(*key)
            for other in self.places.values():  # an earlier vote on the same, from another window
                if (other.annotator, other.task, int(other.body["repeat"])) == key and other.uid not in self.undone:
                    self.desk.put(vote(other))

    def _undo(self, sent: dict, annotator: str) -> Event:
        of = sent.get("of")
        if not isinstance(of, str) or not UID.fullmatch(of):
            raise Refused(400, "an undo names the uid of a vote in `of`")
        vote = self.places.get(of)
        if vote is not None and vote.annotator != annotator:
            raise Refused(403, "only one's own votes can be undone")
        return Event(sent["uid"], annotator, "undo", vote.task if vote else "", {"of": of}, time=time.time())

    def _vote(self, sent: dict, annotator: str) -> Event:
        named = sent.get("task")
        task = self.tasks.by_id.get(named) if isinstance(named, str) else None
        if task is None:
            raise Refused(404, "there is no such task: the server was started with another source")
        repeat, ms, bad = sent.get("repeat"), sent.get("ms"), sent.get("bad", False)
        if repeat not in (0, 1) or not isinstance(bad, bool) or not isinstance(ms, int) or not 0 <= ms < 2**40:
            raise Refused(400, "a vote needs repeat (0 or 1), bad (true or false) and ms (a whole number)")
        sides = assign.order(self.plan.seed, annotator, task, int(repeat))
        ranks = _ranks(sent.get("ranks"), sides)
        body = {"ranks": ranks, "bad": bad, "repeat": int(repeat), "order": list(sides), "ms": ms}
        marks = self._marks(sent.get("marks"), task, sides)
        return Event(sent["uid"], annotator, "vote", task.id, body, marks, time.time())

    def _marks(self, sent: Any, task: Task, sides: tuple[int, ...]) -> dict[int, bytes]:
        """Masks as PNG with one bit, by the picture's number in the task."""
        if sent in (None, {}):
            return {}
        if not isinstance(sent, dict) or not {*sent} <= {str(k) for k in range(len(sides))}:
            raise Refused(400, "marks are an object of PNG in base64, by the picture's number as shown")
        return {sides[int(k)]: self._mask(encoded, task.pictures[sides[int(k)]]) for k, encoded in sent.items()}

    def _mask(self, encoded: Any, picture: Picture) -> bytes:
        try:
            data = b64decode(encoded, validate=True)
            with Image.open(BytesIO(data), formats=("PNG",)) as image:
                size, wanted = image.size, decode(self.tasks.content(picture)).size
                if size != wanted or size[0] * size[1] > min(PIXELS, MARKS):
                    sizes = f"{size[0]}x{size[1]} pixels, and its picture {wanted[0]}x{wanted[1]}"
                    raise Refused(400, f"a mark has {sizes}")
                white = image.convert("L").point(lambda value: 255 if value > 127 else 0).convert("1")
        except Refused:
            raise
        except BadRow as problem:
            raise Refused(409, f"the picture cannot be read: {problem}") from None
        except Exception:  # Pillow's reader of a damaged file may raise anything
            raise Refused(400, "a mark is not a PNG in base64") from None
        buffer = BytesIO()
        white.save(buffer, "PNG")
        return buffer.getvalue()

    # ---- pictures

    def picture(self, key: str) -> tuple[str, bytes]:
        """Media type and bytes of a picture as a browser shows it: what `decode` makes of it. Raises Refused."""
        with self.lock:
            if key in self._served:
                self._served.move_to_end(key)
                return self._served[key]
        picture = self.tasks.pictures.get(key)
        if picture is None:
            raise Refused(404, "there is no such picture")
        try:
            found = _for_browser(self.tasks.content(picture))
        except BadRow as problem:
            raise Refused(409, f"the picture cannot be read: {problem}") from None
        with self.lock:
            self._served[key] = found
            while len(self._served) > CACHED:
                self._served.popitem(last=False)
        return found


def _for_browser(encoded: bytes) -> tuple[str, bytes]:
    """JPEG, PNG and WebP of plain colours as they are; everything else as the PNG that training sees."""
    with Image.open(BytesIO(encoded)) as image:
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1
        if plain and image.format in AS_THEY_ARE:
            return AS_THEY_ARE[image.format], encoded
    buffer = BytesIO()
    shown = decode(encoded)
    shown.info = {}
    shown.save(buffer, "PNG", compress_level=1)
    return "image/png", buffer.getvalue()


def _name(annotator: Any) -> str:
    if not isinstance(annotator, str) or not 0 < len(annotator.strip()) <= NAME:
        raise Refused(400, f"annotator must be a name of 1 to {NAME} characters")
    return " ".join(annotator.encode(errors="replace").decode().split())


def _ranks(sent: Any, sides: tuple[int, ...]) -> list[int] | None:
    """Ranks as shown, in the order of the task; None for a skip."""
    if sent is None:
        return None
    good = isinstance(sent, list) and len(sent) == len(sides)
    if not good or not all(type(each) is int and 1 <= each <= len(sides) for each in sent) or min(sent) != 1:
        raise Refused(400, f"ranks must be {len(sides)} whole numbers from 1 on, or null for a skip")
    found = [0] * len(sides)
    for rank, place in zip(sent, sides, strict=True):
        found[place] = rank
    return found
