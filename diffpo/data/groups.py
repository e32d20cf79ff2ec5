"""Rows -> groups of images to compare: pairs, single images or ranked lists, and a look at every row before training
starts."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from ..common.errors import DiffpoError
from ..common.images import BadRow, content, decode, remarks
from ..config import Columns, Data
from .columns import NOUN, Kind, find_columns, image_cells, image_columns, image_names, serves
from .files import undecoded
from .rows import Group, Read, RowReader, picture_hash
from .source import THREADS, open_source, reading


@dataclass
class Groups:
    """The usable groups of one source and the account of the others.

    Attributes:
        data: what the rows hold. kind: what the groups are; lists may have become pairs.
        members: images in each group.
    """

    source: str
    dataset: Any
    data: Kind
    columns: Columns
    roots: list[Path]  # folders whose files rows may name
    kind: Kind
    members: int
    soft: bool  # ties are kept
    background: str  # behind transparent pixels
    groups: list[Group] = field(default_factory=list)
    rows: int = 0  # rows looked at
    total: int = 0  # rows there are
    ties: int = 0
    unlabelled: int = 0  # rows that nobody judged
    identical: int = 0  # pairs of one picture twice
    short: int = 0  # lists with too few images
    lengths: Counter = field(default_factory=Counter)  # images in a usable row
    bad: list[tuple[int, BadRow]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what else the source holds, in words
    notes: Counter = field(default_factory=Counter)  # what was done to pictures: images.decode

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def data_hash(self) -> str:
        digest = blake2b(digest_size=16)
        for group in self.groups:
            digest.update(group.digest.encode())
        return digest.hexdigest()

    @property
    def captions(self) -> list[str]:
        return sorted({caption for group in self.groups for caption in group.captions})

    @property
    def bad_reasons(self) -> Counter:
        return Counter(problem.reason for _, problem in self.bad)

    @property
    def scored(self) -> bool:
        """Does every image have a score?"""
        return bool(self.groups) and all(group.scores is not None for group in self.groups)

    @property
    def targets(self) -> list[tuple[int, int]]:
        """The sizes that groups are trained at."""
        return sorted({group.target for group in self.groups})

    def pictures(self, target: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Every different image that is trained at the size ``target`` once, by its hash: (group, member) where it is
        found. In the order of the source, whatever the labels say, so that caches outlive other labels, groupings and
        objectives."""
        places = {}
        for number, group in enumerate(self.groups):
            if group.target != target:
                continue
            for member, (image, picture) in enumerate(zip(group.images, group.pictures, strict=True)):
                places.setdefault(picture, (group.row, image, number, member))
        return {picture: place[2:] for picture, place in sorted(places.items(), key=lambda item: item[1])}

    def images(self, index: int) -> tuple[Image.Image, ...]:
        """The images of group ``index``, best first, RGB."""
        return tuple(self._read(self.groups[index], range(self.members)))

    def image(self, index: int, member: int) -> Image.Image:
        """One of them."""
        return self._read(self.groups[index], [member])[0]

    def _read(self, group: Group, members: Any) -> list[Image.Image]:
        found, name = [], self.columns.caption or ""
        try:
            row = self.dataset[group.row]
            names, cells = image_names(row, self.data, self.columns), image_cells(row, self.data, self.columns)
            for number in (group.images[member] for member in members):
                name = names[number]
                encoded = content(cells[number], self.roots)
                found.append(decode(encoded, self.background))
                # caches are keyed by the hashes that were taken when the row was first read
                if picture_hash(encoded, found[-1].info["altered"]) != group.pictures[group.images.index(number)]:
                    raise BadRow("another image is there")
            return found
        except (BadRow, IndexError) as problem:
            problem = problem.of(name) if isinstance(problem, BadRow) else "there are fewer images"
            raise DiffpoError(
                f"{self.source}: row {group.row} could be read at the start of the run and now it cannot: {problem}"
            ) from None

    def by_gap(self, parts: int) -> list[int]:
        """Indices of the groups by score gap, the largest (easiest) first, to be cut into ``parts``. DiffpoError if
        there are no scores, or fewer groups than parts.

        The gap is the score of a group's first image minus that of its last: negative, so last of all, where the label
        and the scores disagree.
        """
        if self.kind == "single":
            raise DiffpoError(
                f"data.curriculum orders pairs or lists by score gap, and {self.source} holds single images"
            )
        self.require_scores("data.curriculum orders by score gap")
        if len(self) < parts:
            raise DiffpoError(f"data.curriculum={parts} parts, and {self.source} has {self.describe()}")
        gaps = [group.scores[0] - group.scores[-1] for group in self.groups]
        return sorted(range(len(gaps)), key=lambda i: -gaps[i])

    def require_scores(self, reason: str) -> None:
        if self.scored:
            return
        without = [group.row for group in self.groups if group.scores is None]
        what = "has no scores"
        if len(without) < len(self.groups):
            what = f"lacks scores in {len(without)} of {len(self.groups)} {NOUN[self.kind]}, first in row {without[0]}"
        hint = "data.columns.score_0=NAME data.columns.score_1=NAME names the columns of scores"
        if self.data == "list":
            hint = "data.columns.scores=NAME names the column of scores (ranks do not say how much better an image is)"
        raise DiffpoError(f"{reason}, and {self.source} {what}; {hint}")

    @property
    def fate_of_ties(self) -> str:
        if not self.soft:
            return "left out"
        return "in the order of the row" if self.kind == "list" else "kept as soft labels"

    def describe(self) -> str:
        """What there is, in one line: "33,600 pairs from 1,200 ranked lists of 8, 12 ties left out"."""
        parts = [f"{len(self):,} {NOUN[self.kind]}" + (f" of {self.members}" if self.kind == "list" else "")]
        if self.data == "list":
            least, most = min(self.lengths, default=0), max(self.lengths, default=0)
            parts[0] += (
                f" from {self.lengths.total():,} ranked lists of {least if least == most else f'{least} to {most}'}"
            )
        if self.ties:
            parts.append(f"{self.ties:,} {'tie' if self.ties == 1 else 'ties'} {self.fate_of_ties}")
        if self.unlabelled:
            parts.append(f"{self.unlabelled:,} without a label left out")
        if self.identical:
            parts.append(f"{self.identical:,} of identical pictures left out")
        if self.short:
            parts.append(f"{self.short:,} lists of fewer than {self.members} different images left out")
        return ", ".join(parts)

    def remarks(self) -> list[str]:
        """What else there is to know, a line each: what was not read, and what was done to pictures."""
        return [*self.left, *remarks(self.notes, f"{self.background} (data.background)")]

    def describe_bad(self) -> str:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.bad_reasons.most_common())
        row, problem = self.bad[0]
        return f"{len(self.bad)} of {self.rows} rows cannot be used ({reasons}); the first is row {row}: {problem}"

    def problem(self, bad_rows: str) -> str | None:
        """Why nothing can be trained on this, or None."""
        if self.bad and bad_rows == "error":
            return f"{self.describe_bad()}. Mend them, or leave them out with data.bad_rows=skip"
        if self.kind == "list" and not self.groups and self.short:
            return f"no usable list: all {self.short} have fewer than data.list_size={self.members} different images"
        if all(group.preference == 0.5 for group in self.groups):
            noun = "pairs" if self.kind == "pair" else NOUN[self.kind]
            if self.identical and not self.bad:
                return f"there is nothing to learn from: {self.describe()}"
            if self.ties:
                which = " (label_0 == 0.5)" if self.data == "pair" else ""
                return f"all {self.ties} usable {noun} are ties{which}, so there is nothing to learn from"
            if self.unlabelled and not self.bad:
                return f"no usable {noun.removesuffix('s')}: {self.columns.has_label} is false in all {self.rows} rows"
            return f"no usable {noun.removesuffix('s')}: {self.describe_bad() if self.bad else 'it has no rows'}"
        return None


def load_groups(data: Data, source: str, split: str, want: Kind = "pair", quiet: bool = True) -> Groups:
    """All usable groups of a source. Raises DiffpoError: unreadable source, rows of another kind, bad rows (unless
    skipped), nothing to learn."""
    groups = scan(data, source, split, want, quiet=quiet)
    if problem := groups.problem(data.bad_rows):
        raise DiffpoError(f"{source}: {problem}")
    return groups


def scan(
    data: Data, source: str, split: str, want: Kind = "pair", limit: int | None = None, quiet: bool = True
) -> Groups:
    """Look at every row (or at ``limit`` evenly spaced ones): decode its images, check captions, labels and sizes.

    ``want`` is what the objective compares. Pairs serve all: they fall apart into liked and disliked images later
    (states.as_singles), and are lists of two. Ranked lists serve as lists of ``data.list_size`` images or as all their
    pairs of different score. Single images serve only as such. Anything else is a DiffpoError, like a source or column
    that is not there; bad rows are collected in ``bad`` and never raise.
    """
    from tqdm.auto import tqdm

    found = open_source(source, split, data, quiet)
    dataset, roots = found.rows, found.roots
    holds, columns = find_columns(source, dataset.column_names, data.columns)
    kind = serves(source, holds, want, data.ties)
    with reading(source):
        if hasattr(dataset, "features"):  # of the hub
            dataset = undecoded(dataset, image_columns(holds, columns))
        dataset = dataset.select_columns([name for name in columns.model_dump().values() if name])
    members = {"pair": 2, "single": 1, "list": data.list_size}[kind]
    soft, ways = data.ties == "soft", (data.ties, data.list_size, data.resolution, data.buckets, data.background)
    result = Groups(source, dataset, holds, columns, roots, kind, members, soft, data.background, left=found.left)
    result.total = len(dataset)
    reader = RowReader(holds, kind, columns, roots, *ways)

    def inspect(index: int) -> Read | BadRow | None:
        try:
            return reader.read(dataset[index], index)
        except BadRow as problem:
            return problem
        except DiffpoError:  # of the copy that rows are read from
            raise
        except Exception as error:  # text that is not UTF-8, a date of no year: met when Arrow makes Python's values
            return BadRow("unreadable row", error)

    indices = range(len(dataset))
    if limit is not None and limit < len(dataset):
        indices = [i * len(dataset) // limit for i in range(limit)]
    bar = tqdm(total=len(indices), desc=f"reading {NOUN[holds]}", unit="row", delay=1, disable=quiet)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        for start in range(0, len(indices), 256):  # in portions: images of a whole data set do not fit in memory
            part = list(indices[start : start + 256])
            for index, found in zip(part, pool.map(inspect, part), strict=True):
                result.rows += 1
                if isinstance(found, BadRow):
                    result.bad.append((index, found))
                    continue
                if found is None:
                    result.unlabelled += 1
                    continue
                result.groups += found.groups
                result.ties += found.ties
                result.identical += found.identical
                result.short += kind == "list" and not found.groups
                result.lengths[found.images] += 1
                result.notes.update(found.notes)
            bar.update(len(part))
    return result
