"""Groups of pictures from rows, as the data room reads them: pairs, lists, or one picture a row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..common.errors import DiffpoError
from ..common.images import BadRow
from ..common.text import plain
from ..config import Data
from ..data.columns import USUAL_NAMES
from ..data.source import open_source
from .tasks import Group, Picture, Place, Show, Tasks, hashed, make

PAIRS = (("image_0", "image_1"), ("chosen", "rejected"))
CAPTIONS = ("caption", "caption_0", "caption_chosen")
SURE = 0.05  # a label of 0 or 1 that is there already counts as this probability of the other one


def of_rows(source: str, split: str, show: Show | None, quiet: bool = True, before: str | None = None) -> Tasks:
    """The tasks of a source that `diffpo train` reads; labels need not be there. ``before``: the column of what the
    pictures are edits of.

    Pairs are shown as pairs, and lists at once unless ``show`` is pairs. Rows of one picture each are grouped by their
    prompt. Labels and scores that are there say which pairs are uncertain before any vote: a label is a probability,
    and of scores it is a logistic function of the difference in units of the median one.
    """
    opened = open_source(source, split, Data(train=source, resolution=8), quiet)
    rows: Any = opened.rows
    names = list(rows.column_names)
    found = {role: next((name for name in usual if name in names), None) for role, usual in USUAL_NAMES.items()}
    caption = next((found[role] for role in CAPTIONS if found[role]), None)
    pair = next((pair for pair in PAIRS if all(found[role] for role in pair)), None)
    columns = [found[role] for role in pair] if pair else [found["images"] or found["image"]]
    if caption is None or None in columns:
        what = "of pictures" if caption else "of prompts"
        raise DiffpoError(
            f"{source} has no column {what} among {plain(', '.join(names), 1000)}: rename it as docs/data.md says"
        )
    known = [found[role] for role in ("label_0", "score_0", "score_1", "scores")]
    if before is not None and before not in names:
        raise DiffpoError(f"{source} has no column {before!r} with what the pictures are edits of (--source)")
    needed = [name for name in dict.fromkeys([caption, *columns, *known, before]) if name]
    rows = rows.select_columns(needed)
    groups: list[Group] = []
    singles: dict[tuple[str, tuple[str, ...]], Group] = {}
    raw: list[tuple[float, ...] | None] = []
    for number in range(len(rows)):
        row = _row(rows, number, source)
        prompt = row[caption]
        if not isinstance(prompt, str) or not prompt.strip():
            raise DiffpoError(f"{source}: row {number} has no prompt in {caption}; correct it, or leave the row out")
        places = list(_places(row, number, [name for name in columns if name], source))
        pictures = tuple(Picture("", place) for place in places)
        sources = tuple(Picture("", place) for place in _places(row, number, [before] if before else [], source))
        if pair is None and not found["images"]:
            (own,) = hashed([Group(prompt.strip(), (), None, sources)], rows, opened.roots)
            key = (own.prompt, tuple(each.key for each in own.sources))
            earlier = singles.setdefault(key, own)
            singles[key] = replace(earlier, pictures=(*earlier.pictures, *pictures))
            continue
        raw.append(_known(row, found, len(pictures)))
        groups.append(Group(prompt.strip(), pictures, None, sources))
    groups = [*_expecting(groups, raw), *singles.values()]
    alone = [group for group in groups if len(group.pictures) < 2]
    groups = hashed([group for group in groups if len(group.pictures) > 1], rows, opened.roots, quiet)
    show = show or ("pairs" if pair or not found["images"] else "sets")
    tasks, left = make(groups, show)
    if alone:
        left.append(f"{len(alone)} prompts with one picture")
    return Tasks(tasks, source, split, show, left=left)


def _row(rows: Any, number: int, source: str) -> dict[str, Any]:
    try:
        return rows[number]
    except BadRow as problem:
        raise DiffpoError(f"{source}: row {number}: {problem}; correct it, or leave the row out") from None


def _places(row: dict[str, Any], number: int, columns: list[str], source: str) -> Iterator[Place]:
    for name in columns:
        if not isinstance(row[name], list):
            yield (number, name, -1)
            continue
        for k in range(len(row[name])):
            yield (number, name, k)


def _known(row: dict[str, Any], found: dict[str, str | None], pictures: int) -> tuple[float, ...] | None:
    """What the row says of its pictures: scores, or the label of a pair as (label, 1 - label)."""

    def number(value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if good else math.nan

    values: list[float] = []
    if found["score_0"] and found["score_1"]:
        values = [number(row[name]) for name in (found["score_0"], found["score_1"]) if name]
    elif found["scores"] and isinstance(row[found["scores"]], list):
        values = [number(each) for each in row[found["scores"]]]
    elif found["label_0"]:
        values = [number(row[found["label_0"]])]
        values.append(1 - values[0])
    return tuple(values) if len(values) == pictures and np.isfinite(values).all() else None


def _expecting(groups: list[Group], raw: list[tuple[float, ...] | None]) -> list[Group]:
    """The groups with the odds of each picture: exp of its score in units of the median difference."""
    spread = [abs(a - b) for each in raw if each for a, b in pairwise(each)]
    scale = float(np.median(spread)) if spread else 0.0
    shares = all(0 <= value <= 1 for each in raw if each for value in each) and all(
        abs(sum(each) - 1) < 1e-9 for each in raw if each
    )
    made = []
    for group, each in zip(groups, raw, strict=True):
        expected = None
        if each and shares and len(each) == 2:
            expected = tuple(min(1 - SURE, max(SURE, value)) for value in each)
        elif each and scale > 0:
            top = max(each)
            expected = tuple(math.exp(max(-20.0, (value - top) / scale)) for value in each)
        made.append(replace(group, expected=expected))
    return made
