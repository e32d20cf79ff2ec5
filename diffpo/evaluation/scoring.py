"""Scores of all pictures of all arms, one scorer in memory at a time. An interrupted run goes on where it was.

OUT/.scores/<digest>.jsonl   a line for each picture that is scored; deleted once scores.parquet is written
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .. import scorers
from ..common import processes
from ..common.errors import DiffpoError
from ..common.files import writing
from ..common.images import named, remarks
from ..common.names import hint
from ..common.text import plain, whole
from ..scorers import features
from .items import Item
from .manifest import open_image

PARTS = ".scores"
BATCH = 16


@dataclass(frozen=True)
class Scoring:
    """How pictures are scored.

    Attributes:
        scorers: as for `diffpo.scorers.load`.
        train_scorer: the score that labelled the training pairs, if it is known.
        features: what diversity is measured in (`diffpo.scorers.features.load`); None: small pictures.
        device: None is each scorer's own default.
    """

    scorers: tuple[str, ...] = ("shapes",)
    train_scorer: str | None = None
    features: str | None = None
    device: str | None = None


@dataclass
class Scores:
    """Numbers by score and arm, (n,) float64 each. NaN: no picture, an unreadable one, or a prompt without this score.

    Attributes:
        unreadable: the pictures of each arm that could not be read, with the reason.
        nan: by score and arm, the pictures whose number came out as NaN or infinite.
        notes: conversions of the pictures (`common.images.decode`).
    """

    values: dict[str, dict[str, np.ndarray]]
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    nan: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def gaps(self) -> list[str]:
        """What is missing, in sentences."""
        lines = [
            f"{len(names)} pictures of the arm {arm} cannot be read and are left out: {named(names)}"
            for arm, names in self.unreadable.items()
        ]
        return lines + [
            f"the score {plain(score, 100)} is NaN for {len(names)} pictures of the arm {arm}, which are left out: "
            f"{named(names)}"
            for (score, arm), names in self.nan.items()
        ]


def check_scoring(scoring: Scoring) -> None:
    """Load every scorer once before the first picture is made, so that missing weights are reported at once."""
    if not scoring.scorers:
        raise DiffpoError("no scorer named; for example --scorers shapes")
    names = [name for spec in scoring.scorers for name in scorers.load(spec).names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DiffpoError(f"two of the scorers give the number {twice[0]!r}; compare them in two folders (--out)")
    _check_train_scorer(scoring.train_scorer, names)
    if scoring.features is not None:
        features.load(scoring.features)


def _check_train_scorer(train_scorer: str | None, names: list[str]) -> None:
    """The training scorer need not be among the scorers, but a misspelt name is an error."""
    if train_scorer is None or train_scorer in names:
        return
    name = scorers.parse(train_scorer).name
    if parts := [known for known in names if known.partition(".")[0] == name]:
        raise DiffpoError(f"unknown training scorer {train_scorer!r}: {hint(train_scorer, parts)}")


def score_items(items: Sequence[Item], arms: Sequence[str], scoring: Scoring, out: Path | None = None) -> Scores:
    """The scores of all pictures. ``out``: where to keep what is finished; None keeps nothing.

    Of several processes each scores a share, and all get all scores. DiffpoError if a scorer cannot be loaded or gives
    wrong shapes, or if no picture of an arm can be used.
    """
    ours = processes.here()
    if ours.count > 1 and out is not None:
        for _ in _rows(ours.share(items), arms, scoring, out, Scores({})):
            pass
        ours.wait()
    found = Scores({})
    for scorer, arm, rows in _rows(items, arms, scoring, out, found):
        _collect(found, scorer, arm, items, rows)
    if ours.main:
        for line in [*remarks(found.notes), *found.gaps()]:
            print(line)
    return found


def _rows(
    items: Sequence[Item], arms: Sequence[str], scoring: Scoring, out: Path | None, found: Scores
) -> Iterator[tuple[Any, str, list[dict[str, float] | None]]]:
    """For each scorer and arm a row of numbers for every item, None where there is none; kept in ``out``."""
    from tqdm.auto import tqdm

    ours, total = processes.here(), sum(len(item.pictures) for item in items)
    for number, spec in enumerate(scoring.scorers):
        scorer = scorers.load(spec, scoring.device or scorers.default_device(spec))
        about = {"desc": f"scoring by {plain(spec.partition('=')[0], 60)}", "unit": "image", "delay": 1}
        notes = found.notes if number == 0 else Counter()  # every scorer reads the same pictures
        with tqdm(total=total, disable=not ours.main, **about) as bar:
            for arm in arms:
                kept = _Kept(None if out is None else out / PARTS, spec, arm, ours.rank)
                own = [item for item in items if arm in item.pictures]
                rows = {id(item): row for item in own if (row := kept.get(item))}
                todo = [item for item in own if id(item) not in rows]
                bar.update(len(rows))
                for start in range(0, len(todo), BATCH):
                    batch = todo[start : start + BATCH]
                    for item, row in zip(batch, _scored(scorer, batch, arm, found, notes), strict=True):
                        if row is not None:
                            rows[id(item)] = row
                            kept.add(item, row)
                    bar.update(len(batch))
                yield scorer, arm, [rows.get(id(item)) for item in items]


def forget_parts(out: Path) -> None:
    """Delete what `score_items` kept, once the scores are written."""
    shutil.rmtree(out / PARTS, ignore_errors=True)


def _scored(scorer: Any, batch: Sequence[Item], arm: str, found: Scores, notes: Counter[str]) -> list[dict | None]:
    """A row of numbers for each item; None where the picture cannot be read."""
    images: list[Any] = []
    for item in batch:
        try:
            images.append(open_image(item.pictures[arm]))
            notes.update(images[-1].info["notes"])
        except DiffpoError as error:
            images.append(None)
            names = found.unreadable.setdefault(arm, [])
            if (text := f"{item.pictures[arm]} ({plain(error, 200)})") not in names:
                names.append(text)
    there = [k for k, image in enumerate(images) if image is not None]
    rows: list[dict | None] = [None] * len(batch)
    if there:
        numbers = scorer.score([images[k] for k in there], [whole(batch[k].prompt) for k in there])
        for position, k in enumerate(there):
            rows[k] = {name: float(values[position]) for name, values in numbers.items()}
    return rows


def _collect(found: Scores, scorer: Any, arm: str, items: Sequence[Item], rows: Sequence[dict | None]) -> None:
    """Put an arm's rows into the arrays; what is not a number is counted."""
    if any(arm in item.pictures for item in items) and not any(rows):
        raise DiffpoError(f"no picture of the arm {arm} can be read. {found.gaps()[0]}")
    for name in dict.fromkeys(name for row in rows if row for name in row):
        values = np.array([np.nan if row is None else row[name] for row in rows])
        for k, row in enumerate(rows):
            if row is None:
                continue
            if np.isinf(values[k]) or (np.isnan(values[k]) and name not in scorer.optional):
                text = f"{items[k].pictures[arm]} (prompt {items[k].index}, {plain(items[k].prompt, 60)!r})"
                found.nan.setdefault((name, arm), []).append(text)
                values[k] = np.nan
        if np.isnan(values).all() and name not in scorer.optional:
            raise DiffpoError(
                f"the scorer {name} gave no number for any picture of the arm {arm}; leave this scorer out"
            )
        found.values.setdefault(name, {})[arm] = values


class _Kept:
    """The finished scores of one scorer and arm: a line for each picture, known by its file and its prompt. Every
    process adds to a file of its own and reads those of all."""

    def __init__(self, folder: Path | None, spec: str, arm: str, rank: int) -> None:
        self.arm, self.path = arm, None
        self.rows: dict[str, dict[str, float]] = {}
        if folder is None:
            return
        name = sha256(f"{spec} {arm}".encode()).hexdigest()[:16]
        self.path = folder / f"{name}-{rank}.jsonl"
        for path in sorted(folder.glob(f"{name}-*.jsonl")):
            *lines, last = path.read_bytes().split(b"\n")
            for line in lines:
                try:
                    key, row = json.loads(line)
                    self.rows[key] = {name: float(value) for name, value in row.items()}
                except (ValueError, TypeError, AttributeError):  # half written; that picture is scored again
                    continue
            if last and path == self.path:
                self._append(b"\n")

    def get(self, item: Item) -> dict[str, float] | None:
        return self.rows.get(self._key(item)) if self.rows else None

    def add(self, item: Item, row: dict[str, float]) -> None:
        if self.path is not None:
            self._append(json.dumps([self._key(item), row]).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        assert self.path is not None  # noqa: S101 (asked by both callers)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(data)

    def _key(self, item: Item) -> str:
        path = item.pictures[self.arm]
        about = path.stat()
        return sha256(f"{path} {about.st_size} {about.st_mtime_ns} {item.prompt}".encode(errors="replace")).hexdigest()
