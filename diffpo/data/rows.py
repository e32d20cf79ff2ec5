"""From a row to its groups: a pair, a single image, a ranked list, or all pairs of a ranked list."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from ..common.images import BadRow, content, decode
from ..common.instruction import joined
from ..config import Columns, Data
from .columns import Kind, first_file, image_cells, image_names, source_cells
from .sizes import nearest


@dataclass(frozen=True, slots=True)  # there may be a million
class Group:
    """Images that are compared with each other, best first; or a single image that is liked or disliked."""

    row: int  # in the source
    images: tuple[int, ...]  # numbers of the images in the row
    hashes: tuple[str, ...]  # a hash of each image's bytes
    sizes: tuple[tuple[int, int], ...]  # width, height of each image as stored
    target: tuple[int, int]  # width, height that all of them are trained at
    captions: tuple[str, ...]  # one for all images, or one for each
    preference: float  # probability that a pair's first image is better, or a single image is liked; 1 for lists
    scores: tuple[float, ...] | None = None  # of each image, higher is better
    user: str | None = None
    mask: str | None = None  # a hash of the mask's bytes
    rewards: tuple[tuple[float, ...], ...] | None = None  # several scores of each image, by data.columns.rewards
    sources: tuple[str, ...] = ()  # a hash of the bytes of each picture that the images are edits of
    source_sizes: tuple[tuple[int, int], ...] = ()  # width, height of each of them as stored
    times: tuple[int, int] | None = None  # the lowest and the highest timestep that the preference is about

    @property
    def size(self) -> tuple[int, int]:
        """Width, height of the first image as stored; without buckets all images of a group have this size."""
        return self.sizes[0]

    @property
    def pictures(self) -> tuple[str, ...]:
        """The hashes of all pictures that the network sees."""
        return (*self.hashes, *self.sources)

    @property
    def source(self) -> str | None:
        """The key of the pictures that the images are edits of; None if there are none."""
        return joined(self.sources) or None

    @property
    def digest(self) -> str:
        """A hash of everything that training depends on."""
        seen: list[Any] = [self.captions, self.preference, self.hashes, self.scores, self.user]
        new = [self.mask, self.times, self.rewards]
        seen += [] if new == [None] * 3 else new  # as before without them
        seen += self.sources
        return blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()


Judged = tuple[tuple[int, ...], float, tuple[float, ...] | None]  # images, preference and scores of a Group


class Read(NamedTuple):
    """The groups of a row, and what else was counted in it."""

    groups: list[Group]
    ties: int  # also if ties are dropped
    identical: int  # pairs of two identical images, which are dropped
    images: int
    notes: list[str]  # conversions of the images, by the notes of images.decode


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one kind as groups of another (see `groups.scan`)."""

    kind: Kind  # of the rows
    want: Kind  # of the groups: pair or list if rows have lists
    columns: Columns
    roots: Sequence[Path]  # folders whose files rows may name
    data: Data

    def read(self, row: dict[str, Any], index: int) -> Read | None:
        """The groups of row number ``index``; None if the row has no label. Raises BadRow.

        Ties are pairs with preference 1/2, single images liked with probability 1/2, and pairs of a ranked list with
        equal scores.
        """
        try:
            return self._read(row, index)
        except BadRow as problem:
            file = first_file(row, self.kind, self.columns)
            if problem.about or not file:
                raise
            raise BadRow(problem.reason, f"{problem.detail} ({file[:200]})".strip()) from None

    def _read(self, row: dict[str, Any], index: int) -> Read | None:
        columns = self.columns
        if columns.has_label and not _truth(row[columns.has_label], columns.has_label):
            return None
        own = columns.caption_0 is not None  # captions in the order of the images, not of the preference
        dual = (columns.caption_0, columns.caption_1) if own else (columns.caption_chosen, columns.caption_rejected)
        roles: tuple[str | None, ...] = dual if dual[0] else (columns.caption,)
        captions = tuple(_caption(row[name], name) for name in roles if name is not None)
        user = None if columns.user is None or row[columns.user] is None else str(row[columns.user])
        # labels before images, because their faults are found faster
        judge = {"pair": self._pair, "single": self._single, "list": self._list}[self.kind]
        members, ties = judge(row)
        names, cells = image_names(row, self.kind, columns), image_cells(row, self.kind, columns)
        keys, seen = [], []
        for name, cell in zip(names, cells, strict=True):
            try:
                encoded = content(cell, self.roots)
                seen.append(decode(encoded, self.data.background))
            except BadRow as problem:
                raise problem.of(name) from None
            keys.append(image_hash(encoded, seen[-1].info["altered"]))
        sizes = [image.size for image in seen]
        for name, size in zip(names[1:], sizes[1:], strict=True):
            if size != sizes[0] and not self.data.buckets:
                what = "chosen and rejected" if self.kind == "pair" else "images of a list"
                both = " and ".join(f"{width}x{height}" for width, height in (sizes[0], size))
                advice = "data.buckets=true allows images of different sizes"
                raise BadRow(f"{what} differ in size", f"{both}; {advice}", f"{names[0]} and {name}")
        # by the row's first image, whichever is better, so that cached latents do not depend on labels
        resolution = self.data.resolution
        target = _shared(nearest(sizes[0], resolution) if self.data.buckets else (resolution, resolution))
        mask, (sources, source_sizes) = self._mask(row, sizes[0]), self._sources(row, sizes[0])
        times, rewards = _times(row, columns), self._rewards(row)
        groups, identical = [], 0
        for images, preference, scores in members:
            hashes, stored = tuple(keys[i] for i in images), _shared(tuple(sizes[i] for i in images))
            if len(images) == 2 and hashes[0] == hashes[1]:
                identical += 1
                continue
            texts = tuple(captions[i] for i in images) if own else captions
            judged = (texts, preference, scores, user)
            own_rewards = rewards and tuple(rewards[i] for i in images)
            more = (own_rewards, sources, source_sizes, times)
            groups.append(Group(index, images, hashes, stored, target, *judged, mask, *more))
        notes = [note for image in seen for note in image.info["notes"]]
        return Read(groups, ties, identical, len(seen), notes)

    def _mask(self, row: dict[str, Any], size: tuple[int, int]) -> str | None:
        """A hash of the row's mask; None if there is none."""
        name = self.columns.mask
        if name is None or row[name] is None:
            return None
        mask, key = self._beside(row[name], name, "black", size)
        if not mask.convert("L").getbbox():
            raise BadRow("the mask is black, so the preference is about nothing", "", name)
        return key

    def _sources(
        self, row: dict[str, Any], size: tuple[int, int]
    ) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
        """A hash of each picture that the row's images are edits of, and their sizes. A single one has the size of the
        images, because it is cut as they are; of several each has its own."""
        name = self.columns.source
        if name is None:
            return (), ()
        cells = source_cells(row[name], name)
        named = [(name, size)] if len(cells) == 1 else [(f"{name}[{place}]", None) for place in range(len(cells))]
        found = [
            self._beside(cell, about, self.data.background, wanted)
            for cell, (about, wanted) in zip(cells, named, strict=True)
        ]
        return tuple(key for _, key in found), _shared(tuple(picture.size for picture, _ in found))

    def _beside(self, cell: Any, name: str, background: str, size: tuple[int, int] | None) -> tuple[Any, str]:
        """A picture, which must have that size (None: any), and a hash of it."""
        try:
            encoded = content(cell, self.roots)
            found = decode(encoded, background)
        except BadRow as problem:
            raise problem.of(name) from None
        if size is not None and found.size != size:
            both = " and ".join(f"{width}x{height}" for width, height in (found.size, size))
            what = "mask" if name == self.columns.mask else "source"
            raise BadRow(f"the {what} differs in size from the images", both, name)
        return found, image_hash(encoded, found.info["altered"])

    def _rewards(self, row: dict[str, Any]) -> tuple[tuple[float, ...], ...] | None:
        """The rewards of the row's two images."""
        names = self.columns.rewards
        if not names:
            return None
        return tuple(tuple(_number(row[f"{name}_{i}"], f"no {name}_{i}") for name in names) for i in "01")

    def _pair(self, row: dict[str, Any]) -> tuple[list[Judged], int]:
        probability, columns = _first_wins(row, self.columns), self.columns
        images = (1, 0) if probability < 0.5 else (0, 1)
        preference, tie = self._hardened(max(probability, 1 - probability))
        scores = None
        if columns.score_0 and columns.score_1:
            values = [_score(row[name]) for name in (columns.score_0, columns.score_1)]
            known = [value for value in values if value is not None]
            scores = tuple(known[i] for i in images) if len(known) == 2 else None
        return ([] if preference is None else [(images, preference, scores)]), tie

    def _single(self, row: dict[str, Any]) -> tuple[list[Judged], int]:
        probability = _probability(row[self.columns.liked or ""], "no like")
        if not 0 <= probability <= 1:
            raise BadRow("a like is not between 0 and 1", f"{probability:g}")
        preference, tie = self._hardened(probability)
        return ([] if preference is None else [((0,), preference, None)]), tie

    def _hardened(self, probability: float) -> tuple[float | None, int]:
        """The probability to train on, None for a tie that is dropped; and the number of ties, 0 or 1."""
        if self.data.ties == "soft":
            return probability, int(probability == 0.5)
        return (None, 1) if probability == 0.5 else (float(probability > 0.5), 0)

    def _list(self, row: dict[str, Any]) -> tuple[list[Judged], int]:
        cells, columns = image_cells(row, "list", self.columns), self.columns
        ranked = columns.ranks is not None
        judged = row[columns.ranks or columns.scores or ""] or []
        if not isinstance(judged, list):
            raise BadRow("the ranks or scores are not a list", repr(judged)[:100])
        values = [_number(value, "no rank or score") for value in judged]
        if len(values) != len(cells):
            raise BadRow("not one rank or score per image", f"{len(values)} for {len(cells)} images")
        if len(cells) < 2:
            raise BadRow("the list has fewer than two images", str(len(cells)))
        worth = [-value for value in values] if ranked else values  # rank 1 is the best
        order = sorted(range(len(worth)), key=lambda i: -worth[i])  # stable: ties keep the order of the row
        pairs = list(combinations(order, 2))
        ties = sum(worth[a] == worth[b] for a, b in pairs)

        def scores(images: tuple[int, ...]) -> tuple[float, ...] | None:
            return None if ranked else tuple(values[i] for i in images)  # ranks are not scores

        if self.want == "pair":
            kept = [(pair, 0.5 if worth[pair[0]] == worth[pair[1]] else 1.0) for pair in pairs]
            if self.data.ties == "drop":
                kept = [(pair, preference) for pair, preference in kept if preference != 0.5]
            return [(pair, preference, scores(pair)) for pair, preference in kept], ties
        if self.data.ties == "drop":  # keep the first of equal images
            order = [b for k, b in enumerate(order) if k == 0 or worth[order[k - 1]] != worth[b]]
        if len(order) < self.data.list_size:
            return [], ties
        images = tuple(order[i] for i in spread(len(order), self.data.list_size))
        return [(images, 1.0, scores(images))], ties


@lru_cache(4096)
def _shared(value: Any) -> Any:
    """An equal value that was seen before, so that a million groups of few sizes do not keep a million tuples."""
    return value


def image_hash(encoded: bytes, altered: str) -> str:
    """A hash of an image's bytes, and of the conversion that its pixels depend on (images.decode)."""
    return blake2b(encoded + altered.encode(), digest_size=16).hexdigest()


def spread(total: int, number: int) -> list[int]:
    """``number`` evenly spaced indices of 0..total-1, with the first and the last."""
    return [(2 * i * (total - 1) + number - 1) // (2 * (number - 1)) for i in range(number)]


def _caption(value: Any, column: str) -> str:
    if value is not None and not isinstance(value, str):  # e.g. a text that `datasets` reads as a date
        raise BadRow("the caption is not text", repr(value)[:200])
    if not value or not value.strip():
        raise BadRow("empty caption", column)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("the caption contains a lone surrogate (half a character)", value) from None
    return sys.intern(value.strip())  # many rows have the same


def _first_wins(row: dict[str, Any], columns: Columns) -> float:
    """Probability that the first image of a pair is the better one."""
    if columns.label_0 is None:
        return 1.0
    labels = [_probability(row[name], "no label") for name in (columns.label_0, columns.label_1) if name]
    if not 0 <= labels[0] <= 1 or (len(labels) == 2 and abs(sum(labels) - 1) > 1e-6):
        raise BadRow("not a preference", f"{labels}; label_0 and label_1 must be between 0 and 1 and add up to 1")
    return labels[0]


def _times(row: dict[str, Any], columns: Columns) -> tuple[int, int] | None:
    """The timesteps that the row's preference is about."""
    if columns.t_low is None and columns.t_high is None:
        return None
    values = [row[name] if name else None for name in (columns.t_low, columns.t_high)]
    low, high = (
        edge if value is None else _number(value, "no timestep") for edge, value in zip((0, LAST), values, strict=True)
    )
    if not 0 <= low <= high or low % 1 or high % 1:
        raise BadRow("no range of timesteps", f"{low:g} to {high:g}")
    return int(low), int(high)


LAST = 10**9  # stands for the model's highest timestep
TRUE, FALSE = {"true", "t", "yes", "y", "on", "1"}, {"false", "f", "no", "n", "off", "0"}
NONE = {"", "none", "null", "nan", "na", "n/a"}


def _truth(value: Any, column: str) -> bool:
    """The truth value of a bool, number or text; a missing value is false. BadRow for other values."""
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
    """A finite number, where a truth value as text counts as 0 or 1."""
    word = value.strip().lower() if isinstance(value, str) else None
    return float(word in TRUE) if word in TRUE | FALSE else _number(value, missing)


def _score(value: Any) -> float | None:
    """A score, or None if it is missing: `Groups.require_scores` checks that where scores are needed."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return _number(value, "no score")


def _number(value: Any, missing: str) -> float:
    """A finite number; BadRow with the reason ``missing`` for other values."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow(missing, "" if value is None else repr(value)[:100]) from None
    if not math.isfinite(number):
        raise BadRow(missing, "" if math.isnan(number) else str(number))
    return number
