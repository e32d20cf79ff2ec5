"""What is shown: tasks of two or more pictures of one prompt, and where their bytes lie.

FOLDER/tasks.jsonl   a header {"source", "split", "show", "ask"}, then a line for each task

A picture's name on the page is a hash of its bytes: it says nothing of files, folders or arms. A picture that has
changed since is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from ..common.errors import DiffpoError
from ..common.files import write_atomic, writing
from ..common.images import ENCODED, BadRow, content, read_file
from ..common.text import plain
from ..config import Data
from ..data.source import THREADS, Source, open_source

FILE = "tasks.jsonl"
MOST = 9  # pictures at once: keys 1 to 9
Show = Literal["pairs", "sets"]
Place = str | tuple[int, str, int]  # a file, or row, column and number in the cell (-1: the cell is the picture)


@dataclass(frozen=True)
class Picture:
    """``key``: a hash of its bytes. ``name``: what made it, such as an arm; it is not sent to the page."""

    key: str
    place: Place
    name: str = ""


@dataclass(frozen=True)
class Group:
    """Pictures of one prompt, to be shown in pairs or at once.

    ``expected``: of each picture a number that is higher for a better one, such as a score; None: nothing is known.
    ``sources``: what the pictures are edits of.
    """

    prompt: str
    pictures: tuple[Picture, ...]
    expected: tuple[float, ...] | None = None
    sources: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Task:
    """What one vote is about. ``prior``: the probability, before any vote, that the first of two pictures is better.
    ``sources``: what the pictures are edits of, shown beside the prompt."""

    id: str
    prompt: str
    pictures: tuple[Picture, ...]
    prior: float = 0.5
    sources: tuple[Picture, ...] = ()


@dataclass
class Tasks:
    """The tasks of a folder.

    Attributes:
        source, split: of rows; None where pictures are files.
        show: pairs, or sets of all pictures of a prompt. ask: of a set the best picture, or a ranking.
        left: sentences on what was left out.
    """

    all: list[Task]
    source: str | None = None
    split: str = "train"
    show: Show = "pairs"
    ask: Literal["best", "ranking"] = "best"
    left: list[str] = field(default_factory=list)

    @cached_property
    def by_id(self) -> dict[str, Task]:
        return {task.id: task for task in self.all}

    @cached_property
    def pictures(self) -> dict[str, Picture]:
        return {picture.key: picture for task in self.all for picture in (*task.sources, *task.pictures)}

    @cached_property
    def _rows(self) -> Source:
        assert self.source is not None  # noqa: S101 (places in rows come from `of_rows`)
        return open_source(self.source, self.split, Data(train=self.source, resolution=8))

    @cached_property
    def _cells(self) -> Any:
        columns = {picture.place[1] for picture in self.pictures.values() if not isinstance(picture.place, str)}
        return self._rows.rows.select_columns(sorted(columns))

    def content(self, picture: Picture) -> bytes:
        """The bytes of a picture. BadRow if it cannot be read, or is not the one that was listed."""
        found = read(picture.place, self._cells, self._rows.roots) if self.source else read(picture.place)
        if digest(found) != picture.key:
            raise BadRow("the picture has changed since the tasks were made", about=str(picture.place))
        return found

    def file(self, picture: Picture) -> str:
        """The name of a picture's file, as the source has it. DiffpoError if it is not in a file of its own."""
        if isinstance(picture.place, str):
            return picture.place
        row, column, number = picture.place
        cell = self._cells[row][column]
        cell = cell if number < 0 else cell[number]
        cell = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
        if not isinstance(cell, str):
            raise DiffpoError(f"the pictures of {self.source} are not files of their own: write a .parquet file")
        return cell

    # ---- the file

    def save(self, folder: Path) -> None:
        head: dict[str, Any] = {"source": self.source, "split": self.split, "show": self.show, "ask": self.ask}
        lines: list[dict[str, Any]] = [head]
        for task in self.all:
            pictures, sources = (
                [[each.key, each.place, each.name] for each in some] for some in (task.pictures, task.sources)
            )
            line = {"id": task.id, "prompt": task.prompt, "pictures": pictures, "prior": task.prior}
            lines.append(line | ({"sources": sources} if sources else {}))
        with writing(folder / FILE):
            write_atomic(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())

    @classmethod
    def load(cls, folder: Path) -> Tasks:
        """The tasks of a folder of `diffpo annotate`. DiffpoError if it holds none, or they cannot be read."""
        path, number = folder / FILE, 0
        try:
            lines = read_file(path, ENCODED).decode().split("\n")
            found = cls([], **json.loads(lines[0]))
            for number, line in enumerate(lines[1:], 2):  # noqa: B007 (named in the error)
                if line:
                    row = json.loads(line)
                    pictures, sources = (
                        tuple(
                            Picture(key, place if isinstance(place, str) else tuple(place), name)
                            for key, place, name in row.get(each, [])
                        )
                        for each in ("pictures", "sources")
                    )
                    found.all.append(Task(row["id"], row["prompt"], pictures, row["prior"], sources))
            return found
        except FileNotFoundError:
            raise DiffpoError(f"{folder} is not a folder of `diffpo annotate`: it holds no {FILE}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DiffpoError(
                f"cannot read {path}, line {number or 1}: {plain(error, 200)}. The same `diffpo annotate` writes it "
                "again"
            ) from None


def read(place: Place, rows: Any = None, roots: Sequence[Path] = ()) -> bytes:
    """The bytes at a place. BadRow if there are none."""
    if isinstance(place, str):
        path = Path(place)
        return content(path.name, [path.parent.resolve(), *roots])
    row, column, number = place
    cell = rows[row][column]
    return content(cell if number < 0 else cell[number], roots)


def digest(encoded: bytes) -> str:
    return blake2b(encoded, digest_size=16).hexdigest()


def make(groups: Iterable[Group], show: Show) -> tuple[list[Task], list[str]]:
    """The tasks of groups, and sentences on what was left out: pairs of identical pictures, and tasks that are there
    twice. DiffpoError for sets of more than `MOST` pictures."""
    tasks: dict[str, Task] = {}
    same = twice = 0
    for group in groups:
        if show == "sets" and len(group.pictures) > MOST:
            raise DiffpoError(
                f"{len(group.pictures)} pictures of the prompt {plain(group.prompt, 100)!r} are too many to be shown "
                f"at once (at most {MOST}): use --show pairs"
            )
        numbers = range(len(group.pictures))
        for chosen in combinations(numbers, 2) if show == "pairs" else [tuple(numbers)]:
            pictures = tuple(group.pictures[k] for k in chosen)
            if len({picture.key for picture in pictures}) < max(2, len(pictures)):
                same += 1
                continue
            keys = [picture.key for picture in (*group.sources, *pictures)]
            name = digest("\0".join([group.prompt, *keys]).encode())[:16]
            twice += name in tasks
            tasks.setdefault(name, Task(name, group.prompt, pictures, _prior(group, chosen), group.sources))
    left = [f"{same} of identical pictures"] if same else []
    return list(tasks.values()), left + ([f"{twice} that are there twice"] if twice else [])


def _prior(group: Group, chosen: Sequence[int]) -> float:
    if group.expected is None or len(chosen) != 2:
        return 0.5
    first, second = (group.expected[k] for k in chosen)
    return first / (first + second) if first + second > 0 else 0.5


def hashed(groups: Iterable[Group], rows: Any = None, roots: Sequence[Path] = (), quiet: bool = True) -> list[Group]:
    """The groups with the hashes of their pictures, which are read for it. DiffpoError that names a picture that cannot
    be read."""
    from tqdm.auto import tqdm

    groups = list(groups)

    def key(picture: Picture) -> Picture:
        try:
            return replace(picture, key=digest(read(picture.place, rows, roots)))
        except BadRow as problem:
            place = picture.place if isinstance(picture.place, str) else f"row {picture.place[0]}, {picture.place[1]}"
            raise DiffpoError(
                f"{place}: {problem}. Repair it or leave it out, and run the same command again"
            ) from None

    bar = tqdm(total=len(groups), desc="reading pictures", unit="prompt", delay=1, disable=quiet)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        for start in range(0, len(groups), 256):
            part = groups[start : start + 256]
            flat = iter(list(pool.map(key, [each for group in part for each in (*group.pictures, *group.sources)])))
            for number, group in enumerate(part, start):
                pictures, sources = (tuple(next(flat) for _ in each) for each in (group.pictures, group.sources))
                groups[number] = replace(group, pictures=pictures, sources=sources)
            bar.update(len(part))
    return groups
