"""From rows to groups of images to compare: pairs, single images or ranked lists. Every row is checked before training
starts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from ..common.errors import DiffpoError
from ..common.images import BadRow, content, decode, remarks
from ..config import Columns, Data
from .columns import NOUN, Kind, find_columns, image_cells, image_names, read_columns, serves, source_cells
from .rows import Group, Read, RowReader, image_hash
from .source import THREADS, open_source, reading
from .tables import Rows

SOURCE = -1  # stands for the first picture that a group's images are edits of, in place of a member's number; then -2


@dataclass
class Groups:
    """The usable groups of one source, and counts of the rows that gave none.

    Attributes:
        data: the kind of the rows. kind: the kind of the groups; lists may have become pairs.
        members: number of images in each group.
    """

    source: str
    dataset: Rows
    data: Kind
    columns: Columns
    roots: list[Path]  # folders whose files rows may name
    kind: Kind
    members: int
    soft: bool  # ties are kept, with preference 1/2
    background: str  # behind transparent pixels
    groups: list[Group] = field(default_factory=list)
    rows: int = 0  # rows that were read
    total: int = 0  # rows of the source
    ties: int = 0
    unlabelled: int = 0  # rows without a label
    identical: int = 0  # pairs of two identical images
    short: int = 0  # lists with too few images
    lengths: Counter[int] = field(default_factory=Counter)  # of usable rows, by their number of images
    bad: list[tuple[int, BadRow]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # lines of text: what else the source has
    notes: Counter[str] = field(default_factory=Counter)  # conversions of images, by the notes of images.decode

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def data_hash(self) -> str:
        """A hash of everything that training depends on."""
        digest = blake2b(digest_size=16)
        for group in self.groups:
            digest.update(group.digest.encode())
        return digest.hexdigest()

    @property
    def captions(self) -> list[str]:
        return sorted({caption for group in self.groups for caption in group.captions})

    @property
    def bad_reasons(self) -> Counter[str]:
        return Counter(problem.reason for _, problem in self.bad)

    @property
    def scored(self) -> bool:
        """Whether every image has a score."""
        return bool(self.groups) and all(group.scores is not None for group in self.groups)

    @property
    def targets(self) -> list[tuple[int, int]]:
        """The sizes (width, height) that groups are trained at."""
        return sorted({group.target for group in self.groups})

    def places(self, target: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Every distinct image that is trained at the size ``target``: {hash: (group, member) of one occurrence}. They
        are in the order of the source, so that caches stay valid under other labels, groupings and objectives."""
        found: dict[str, tuple[int, int, int, int]] = {}
        for number, group in enumerate(self.groups):
            if group.target != target:
                continue
            for member, (image, key) in enumerate(zip(group.images, group.hashes, strict=True)):
                found.setdefault(key, (group.row, image, number, member))
            for k, key in enumerate(group.sources):  # after the row's images
                found.setdefault(key, (group.row, 2**31 + k, number, SOURCE - k))
        return {key: place[2:] for key, place in sorted(found.items(), key=lambda item: item[1])}

    def images(self, index: int) -> tuple[Image.Image, ...]:
        """The RGB images of group ``index``, best first."""
        return tuple(self._read(self.groups[index], range(self.members)))

    def image(self, index: int, member: int) -> Image.Image:
        """Image ``member`` of group ``index``, or one of its sources (`SOURCE`)."""
        return self.some(index, [member])[0][1]

    def some(self, index: int, members: Sequence[int]) -> list[tuple[int, Image.Image]]:
        """The images ``members`` of group ``index``, some of which may be its sources, each with its number."""
        group, own = self.groups[index], [member for member in members if member >= 0]
        found = list(zip(own, self._read(group, own), strict=True)) if own else []
        for member in members:
            if member <= SOURCE:
                place = SOURCE - member
                source = self._beside(group, (self.columns.source or "", place), group.sources[place], self.background)
                found.append((member, source.convert("RGB")))
        return found

    def mask(self, index: int) -> Image.Image | None:
        """The mask of group ``index`` in grey; white is what the preference is about."""
        group, name = self.groups[index], self.columns.mask
        if group.mask is None or name is None:
            return None
        return self._beside(group, (name, 0), group.mask, "black").convert("L")

    def _beside(self, group: Group, where: tuple[str, int], key: str, background: str) -> Image.Image:
        """The picture in a column of the group's row, with its place there, whose hash was ``key``."""
        name, place = where
        try:
            encoded = content(source_cells(self.dataset[group.row][name], name)[place], self.roots)
            found = decode(encoded, background)
            if image_hash(encoded, found.info["altered"]) != key:
                raise BadRow("the picture has changed")
            return found
        except (BadRow, IndexError) as problem:
            raise DiffpoError(
                f"{self.source}: {name} of row {group.row} could be read at the start of the run, but not now: "
                f"{problem}. Run the same command again to read the data anew"
            ) from None

    def _read(self, group: Group, members: Sequence[int]) -> list[Image.Image]:
        found: list[Image.Image] = []
        name = self.columns.caption or ""
        try:
            row = self.dataset[group.row]
            names, cells = image_names(row, self.data, self.columns), image_cells(row, self.data, self.columns)
            for number in (group.images[member] for member in members):
                name = names[number]
                encoded = content(cells[number], self.roots)
                found.append(decode(encoded, self.background))
                # the caches use the hashes of the first reading
                if image_hash(encoded, found[-1].info["altered"]) != group.hashes[group.images.index(number)]:
                    raise BadRow("the image has changed")
            return found
        except (BadRow, IndexError) as problem:
            reason = problem.of(name) if isinstance(problem, BadRow) else "there are fewer images"
            raise DiffpoError(
                f"{self.source}: row {group.row} could be read at the start of the run, but not now: {reason}. Run the "
                "same command again to read the data anew"
            ) from None

    def by_gap(self, parts: int) -> list[int]:
        """Indices of the groups sorted by score gap, the largest (easiest) first. DiffpoError if there are no scores,
        or fewer groups than ``parts``.

        The gap is the score of a group's first image minus that of its last. Where the label and the scores disagree it
        is negative, so these groups come last.
        """
        if self.kind == "single":
            raise DiffpoError(
                f"data.curriculum sorts pairs or lists by score gap, but {self.source} has single images: set it to 1"
            )
        self.require_scores("data.curriculum sorts by score gap")
        if len(self) < parts:
            raise DiffpoError(
                f"data.curriculum={parts} is too many parts for {self.source}, which has {self.describe()}: lower it"
            )
        gaps = self.gaps
        return sorted(range(len(gaps)), key=lambda i: -gaps[i])

    @property
    def gaps(self) -> list[float]:
        """Score of the first image minus score of the last, of each group with scores."""
        return [group.scores[0] - group.scores[-1] for group in self.groups if group.scores is not None]

    def require_scores(self, reason: str) -> None:
        """DiffpoError, beginning with ``reason``, unless every image has a score."""
        if self.scored:
            return
        without = [group.row for group in self.groups if group.scores is None]
        what = "has no scores"
        if len(without) < len(self.groups):
            what = f"has none for {len(without)} of {len(self.groups)} {NOUN[self.kind]}, first in row {without[0]}"
        hint = "name the columns of scores with data.columns.score_0=NAME data.columns.score_1=NAME"
        if self.data == "list":
            hint = "name the column of scores with data.columns.scores=NAME (ranks are not scores)"
        raise DiffpoError(f"{reason}, but {self.source} {what}; {hint}")

    @property
    def fate_of_ties(self) -> str:
        """In words, how ties are used."""
        if not self.soft:
            return "left out"
        return "in the order of the row" if self.kind == "list" else "kept as soft labels"

    def describe(self) -> str:
        """A summary in one line, e.g. "33,600 pairs from 1,200 ranked lists of 8, 12 ties left out"."""
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
            parts.append(f"{self.identical:,} of identical images left out")
        if self.short:
            parts.append(f"{self.short:,} lists of fewer than {self.members} distinct images left out")
        return ", ".join(parts)

    def remarks(self) -> list[str]:
        """Lines of text: what was not read, and how images were converted."""
        return [*self.left, *remarks(self.notes, f"{self.background} (data.background)")]

    def describe_bad(self) -> str:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.bad_reasons.most_common())
        row, problem = self.bad[0]
        return f"{len(self.bad)} of {self.rows} rows cannot be used ({reasons}); the first is row {row}: {problem}"

    def problem(self, bad_rows: str) -> str | None:
        """Why training cannot use this source, or None. ``bad_rows``: error or skip (`Data.bad_rows`)."""
        if self.bad and bad_rows == "error":
            return f"{self.describe_bad()}. Correct these rows, or skip them with data.bad_rows=skip"
        if self.kind == "list" and not self.groups and self.short:
            return f"no usable list: all {self.short} have fewer than data.list_size={self.members} distinct images"
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
    """All usable groups of a source. DiffpoError if the source cannot be read, has rows of another kind, has bad rows
    (unless they are skipped), or has nothing to learn from."""
    groups = scan(data, source, split, want, quiet=quiet)
    if problem := groups.problem(data.bad_rows):
        raise DiffpoError(f"{source}: {problem}")
    return groups


def scan(
    data: Data, source: str, split: str, want: Kind = "pair", limit: int | None = None, quiet: bool = True
) -> Groups:
    """Read every row (or ``limit`` evenly spaced ones): decode its images and check captions, labels and sizes.

    ``want`` is the kind that the objective compares. Pairs serve every objective: they are lists of two, and the
    objective may split them into liked and disliked images. Ranked lists become lists of ``data.list_size`` images, or
    all their pairs of different score. Single images serve as single images only. DiffpoError for any other
    combination, and for a source or column that does not exist. Bad rows are collected in ``bad``.
    """
    from tqdm.auto import tqdm

    opened = open_source(source, split, data, quiet)
    holds, columns = find_columns(source, opened.rows.column_names, data.columns)
    kind = serves(source, holds, want, data.ties)
    with reading(source):
        rows = opened.rows.select_columns(list(dict.fromkeys(read_columns(columns))))
    result = Groups(
        source=source,
        dataset=rows,
        data=holds,
        columns=columns,
        roots=opened.roots,
        kind=kind,
        members={"pair": 2, "single": 1, "list": data.list_size}[kind],
        soft=data.ties == "soft",
        background=data.background,
        total=len(rows),
        left=opened.left,
    )
    reader = RowReader(holds, kind, columns, opened.roots, data)

    def read(index: int) -> Read | BadRow | None:
        try:
            return reader.read(rows[index], index)
        except BadRow as problem:
            return problem
        except DiffpoError:  # about the copy that rows are read from
            raise
        except Exception as error:  # Arrow raises various errors, e.g. for text that is not UTF-8 or an invalid date
            return BadRow("unreadable row", error)

    indices: Sequence[int] = range(len(rows))
    if limit is not None and limit < len(rows):
        indices = [i * len(rows) // limit for i in range(limit)]
    bar = tqdm(total=len(indices), desc=f"reading {NOUN[holds]}", unit="row", delay=1, disable=quiet)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        for start in range(0, len(indices), 256):  # in portions, which the decoded images fit in memory
            part = indices[start : start + 256]
            few = [part[k : k + 16] for k in range(0, len(part), 16)]  # a small picture is read sooner than handed over
            reads = itertools.chain.from_iterable(pool.map(lambda few: [read(index) for index in few], few))
            for index, found in zip(part, reads, strict=True):
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
