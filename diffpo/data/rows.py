"""One row -> the groups in it: a pair, a single image, a ranked list or all the pairs of one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from ..common.images import BadRow, content, decode
from ..config import Columns
from .buckets import nearest
from .columns import Kind, first_file, image_cells, image_names


@dataclass(frozen=True, slots=True)  # there may be a million
class Group:
    """Images that are compared with one another, best first; one image alone is liked or not."""

    row: int  # in the source
    images: tuple[int, ...]  # which of the row's
    pictures: tuple[str, ...]  # a hash of each image's bytes
    sizes: tuple[tuple[int, int], ...]  # width, height of each as stored
    target: tuple[int, int]  # width, height that all of them are trained at
    captions: tuple[str, ...]  # one for all images, or one for each
    preference: (
        float  # probability that the first image of a pair is the better one, that a single one is liked; else 1
    )
    scores: tuple[float, ...] | None = None  # of each image, higher is better
    user: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Of the first image as stored; of all of them, unless there are buckets."""
        return self.sizes[0]

    @property
    def digest(self) -> str:
        """A hash of all that training sees of it."""
        seen = [self.captions, self.preference, self.pictures, self.scores, self.user]
        return blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()


class Read(NamedTuple):
    """What a row holds: its groups, how many ties were met (left out if ties are dropped), how many pairs of identical
    pictures were left out, how many images it has, and what was done to them (images.decode)."""

    groups: list[Group]
    ties: int
    identical: int
    images: int
    notes: list[str]


@dataclass(frozen=True)
class RowReader:
    """How rows are read: what they hold, what becomes of them (`groups.scan`), and the options of `Data`."""

    kind: Kind
    want: Kind  # pair or list where rows hold lists
    columns: Columns
    roots: Sequence[Path]  # folders whose files rows may name
    ties: str  # drop or soft
    list_size: int
    resolution: int
    buckets: bool
    background: str

    def read(self, row: dict, index: int) -> Read | None:
        """None of a row that nobody judged. Raises BadRow.

        Ties are pairs of equal worth, single images liked with probability 1/2, and in a ranked list the pairs of
        images with equal score.
        """
        try:
            return self._read(row, index)
        except BadRow as problem:
            file = first_file(row, self.kind, self.columns)
            if problem.about or not file:
                raise
            raise BadRow(problem.reason, f"{problem.detail} ({file[:200]})".strip()) from None

    def _read(self, row: dict, index: int) -> Read | None:
        columns = self.columns
        if columns.has_label and not _truth(row[columns.has_label], columns.has_label):
            return None
        roles = (columns.caption_chosen, columns.caption_rejected) if columns.caption_chosen else (columns.caption,)
        captions = tuple(_caption(row[name], name) for name in roles)
        user = None if columns.user is None or row[columns.user] is None else str(row[columns.user])
        # read before the images, so that the cheap faults are found first
        judge = {"pair": self._pair, "single": self._single, "list": self._list}[self.kind]
        members, ties = judge(row)
        names, cells = image_names(row, self.kind, columns), image_cells(row, self.kind, columns)
        pictures, seen = [], []
        for name, cell in zip(names, cells, strict=True):
            try:
                encoded = content(cell, self.roots)
                seen.append(decode(encoded, self.background))
            except BadRow as problem:
                raise problem.of(name) from None
            pictures.append(picture_hash(encoded, seen[-1].info["altered"]))
        sizes = [image.size for image in seen]
        for name, size in zip(names[1:], sizes[1:], strict=True):
            if size != sizes[0] and not self.buckets:
                what = "chosen and rejected" if self.kind == "pair" else "images of a list"
                both = " and ".join(f"{width}x{height}" for width, height in (sizes[0], size))
                advice = "data.buckets=true takes pictures of different sizes"
                raise BadRow(f"{what} differ in size", f"{both}; {advice}", f"{names[0]} and {name}")
        # of the row's first image, whichever wins: the same latents serve under other labels
        target = nearest(sizes[0], self.resolution) if self.buckets else (self.resolution, self.resolution)
        groups, identical = [], 0
        for images, preference, scores in members:
            hashes, stored = (tuple(each[i] for i in images) for each in (pictures, sizes))
            if len(images) == 2 and hashes[0] == hashes[1]:
                identical += 1
                continue
            groups.append(Group(index, images, hashes, stored, target, captions, preference, scores, user))
        notes = [note for image in seen for note in image.info["notes"]]
        return Read(groups, ties, identical, len(seen), notes)

    def _pair(self, row: dict) -> tuple[list[tuple], int]:
        probability, columns = _first_wins(row, self.columns), self.columns
        images = (1, 0) if probability < 0.5 else (0, 1)
        preference, tie = self._hardened(max(probability, 1 - probability))
        scores = None
        if columns.score_0:
            values = [_score(row[name]) for name in (columns.score_0, columns.score_1)]
            scores = None if None in values else tuple(values[i] for i in images)
        return ([] if preference is None else [(images, preference, scores)]), tie

    def _single(self, row: dict) -> tuple[list[tuple], int]:
        probability = _probability(row[self.columns.liked], "no like")
        if not 0 <= probability <= 1:
            raise BadRow("a like is not in 0..1", f"{probability:g}")
        preference, tie = self._hardened(probability)
        return ([] if preference is None else [((0,), preference, None)]), tie

    def _hardened(self, probability: float) -> tuple[float | None, int]:
        """The probability as ``ties`` has it, None for a tie that is dropped; and 1 for a tie."""
        if self.ties == "soft":
            return probability, int(probability == 0.5)
        return (None, 1) if probability == 0.5 else (float(probability > 0.5), 0)

    def _list(self, row: dict) -> tuple[list[tuple], int]:
        cells, columns = image_cells(row, "list", self.columns), self.columns
        ranked = columns.ranks is not None
        judged = row[columns.ranks or columns.scores] or []
        if not isinstance(judged, list):
            raise BadRow("ranks or scores are not a list", repr(judged)[:100])
        values = [_number(value, "no rank or score") for value in judged]
        if len(values) != len(cells):
            raise BadRow("not a rank or score for each image", f"{len(values)} for {len(cells)} images")
        if len(cells) < 2:
            raise BadRow("a list of fewer than two images", str(len(cells)))
        worth = [-value for value in values] if ranked else values  # rank 1 is the best
        order = sorted(range(len(worth)), key=lambda i: -worth[i])  # stable: equals stay as they are in the row
        pairs = list(combinations(order, 2))
        ties = sum(worth[a] == worth[b] for a, b in pairs)

        def scores(images: tuple[int, ...]) -> tuple[float, ...] | None:
            return None if ranked else tuple(values[i] for i in images)  # a rank says nothing of how much better

        if self.want == "pair":
            kept = [(pair, 0.5 if worth[pair[0]] == worth[pair[1]] else 1.0) for pair in pairs]
            if self.ties == "drop":
                kept = [(pair, preference) for pair, preference in kept if preference != 0.5]
            return [(pair, preference, scores(pair)) for pair, preference in kept], ties
        if self.ties == "drop":  # of equals the first
            order = [b for a, b in zip([None, *order], order, strict=False) if a is None or worth[a] != worth[b]]
        if len(order) < self.list_size:
            return [], ties
        images = tuple(order[i] for i in spread(len(order), self.list_size))
        return [(images, 1.0, scores(images))], ties


def picture_hash(encoded: bytes, altered: str) -> str:
    """Of a picture's bytes, and of what else its pixels depend on (images.decode)."""
    return blake2b(encoded + altered.encode(), digest_size=16).hexdigest()


def spread(total: int, number: int) -> list[int]:
    """``number`` of the places 0..total-1, evenly spaced, the first and the last among them."""
    return [(2 * i * (total - 1) + number - 1) // (2 * (number - 1)) for i in range(number)]


def _caption(value: Any, column: str) -> str:
    if value is not None and not isinstance(value, str):  # also what `datasets` takes for a date
        raise BadRow("caption is not text", repr(value)[:200])
    if not value or not value.strip():
        raise BadRow("empty caption", column)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("caption holds half a character", value) from None
    return value.strip()


def _first_wins(row: dict, columns: Columns) -> float:
    """Probability that the first image of a pair is the better one."""
    if columns.label_0 is None:
        return 1.0
    labels = [_probability(row[name], "no label") for name in (columns.label_0, columns.label_1) if name]
    if not 0 <= labels[0] <= 1 or (len(labels) == 2 and abs(sum(labels) - 1) > 1e-6):
        raise BadRow("labels are not a preference", f"{labels}; label_0 and label_1 must lie in 0..1 and add up to 1")
    return labels[0]


TRUE, FALSE = {"true", "t", "yes", "y", "on", "1"}, {"false", "f", "no", "n", "off", "0"}
NONE = {"", "none", "null", "nan", "na", "n/a"}


def _truth(value: Any, column: str) -> bool:
    """Of a truth value, a number or text; nothing is false. BadRow if it is no truth value."""
    if isinstance(value, str):
        word = value.strip().lower().removesuffix(".0")
        if word not in TRUE | FALSE | NONE:
            raise BadRow("not a truth value", f"{column} is {value!r}"[:200])
        return word in TRUE
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise BadRow("not a truth value", f"{column} is {value!r}"[:200])
    return bool(value)


def _probability(value: Any, missing: str) -> float:
    """A finite number, or a truth value as text."""
    word = value.strip().lower() if isinstance(value, str) else None
    return float(word in TRUE) if word in TRUE | FALSE else _number(value, missing)


def _score(value: Any) -> float | None:
    """None where there is none: whoever needs scores asks `Groups.require_scores`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return _number(value, "no score")


def _number(value: Any, missing: str) -> float:
    """A finite number; BadRow(``missing``) if there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow(missing, "" if value is None else repr(value)[:100]) from None
    if not math.isfinite(number):
        raise BadRow(missing, "" if math.isnan(number) else str(number))
    return number
