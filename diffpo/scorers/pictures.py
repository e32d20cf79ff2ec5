"""Pictures to score, wherever they lie: a picture, a folder, tables, webdataset shards, a data set of the hub.

| source | key of a picture | where its prompt lies |
| --- | --- | --- |
| folder of `diffpo generate`, or an arm's in it | the file, relative to the folder | manifest.jsonl, with sources |
| folder of pictures | the same | NAME.txt beside NAME.png |
| .parquet, .jsonl, .csv, a folder of them, a hub id | FILE:ROW:COLUMN | a column |
| .tar shards | SHARD:MEMBER | KEY.txt, or a key of KEY.json |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from ..common.errors import DiffpoError
from ..common.images import BadRow, ShardMember, content, decode, is_picture
from ..common.instruction import Instruction, encodable
from ..common.names import hint
from ..common.text import plain, read_text, text_beside, whole
from ..config import Data
from ..data.columns import source_cells
from ..data.files import Shards
from ..data.prompts import NAMES
from ..data.source import METADATA, SAVED, SAVED_SPLITS, SIDES, open_source
from ..data.tables import Parquet
from . import manifest

IMAGES = (
    *("image", "file_name", "jpg_0", "jpg_1", "image_0", "image_1", "chosen", "rejected"),
    *("chosen_file_name", "rejected_file_name", "path1", "path2", "images", "image_path", "file_path"),
)
ROWS = (".parquet", ".tar")
SCORES = "scores.parquet"  # written by `diffpo score` and eval, no source of pictures
LONGEST = 2**20  # bytes of a prompt's file
OUTSIDE = "outside the data's folder"  # the reason of `common.images.locate`


@dataclass(frozen=True)
class Where:
    """Where pictures and prompts lie in a source.

    Attributes:
        images: columns of the pictures; by default every column with a usual name (`IMAGES`).
        prompt: column of the prompts; by default the first with a usual name.
        source: column of the pictures that the others are edits of, one or a list in a cell. The prompts are then an
            `Instruction` each, as those of a folder of edits always are.
        split: of a source that has several.
        n: only the first n pictures or rows.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    split: str = "train"
    n: int | None = None
    source: str | None = None

    @property
    def part(self) -> bool:
        """Whether it means a part of the source's pictures."""
        return self.n is not None or bool(self.images) or self.split != "train"


@dataclass(frozen=True)
class Listed:
    """A picture that can be read later. ``state`` changes when the file, its prompt's file or its column does."""

    key: str
    state: str
    place: Any


class Pictures:
    """The pictures of a source. ``has_prompts``: whether any prompts lie there; ``lacking``: a sentence on where they
    are looked for."""

    has_prompts: bool
    lacking: str

    def __len__(self) -> int:
        raise NotImplementedError

    def items(self, start: int, step: int) -> Iterator[Listed]:
        """Every ``step``-th picture from the one with number ``start`` on."""
        raise NotImplementedError

    def read(self, item: Listed) -> tuple[Image.Image, str | None]:
        """RGB picture and prompt (None: it has none). BadRow if the picture cannot be read."""
        raise NotImplementedError


def find(source: str, where: Where, quiet: bool = True) -> Pictures:
    """The pictures of ``source``. DiffpoError if it cannot be read, has no pictures, or lacks a column."""
    path = Path(source).expanduser()
    if path.is_dir() and not holds_rows(path):
        if where.images or where.prompt or where.source:
            raise DiffpoError(
                f"{source} is a folder of pictures without columns: leave out --image, --prompt and --source"
            )
        return _Folder(path, where.n)
    if path.is_file() and is_picture(path.name):
        if where.source:
            raise DiffpoError(f"{source} is one picture and has no column {where.source!r}: leave out --source")
        return _Folder(path.parent, None, [path.name])
    return _Table(source, where, quiet)


def holds_rows(folder: Path) -> bool:
    """Whether a folder has rows (tables, shards, chosen/ and rejected/) rather than pictures alone."""
    if (folder / "manifest.jsonl").is_file():
        return False
    names = [each.name for each in folder.iterdir() if each.name != SCORES]
    known = {*METADATA, *SAVED, SAVED_SPLITS}
    if any(name in known or name.lower().endswith(ROWS) for name in names) or set(SIDES) <= set(names):
        return True
    return any(each.is_dir() and any(each.glob(f"*{suffix}")) for each in folder.iterdir() for suffix in ROWS)


class _Folder(Pictures):
    """Pictures in a folder and below. Links to folders are not followed, and hidden files are not read."""

    def __init__(self, folder: Path, n: int | None, only: list[str] | None = None) -> None:
        self.folder = folder
        self.lacking = f"Put the prompt of NAME.png into NAME.txt beside it in {folder}"
        self.home, self.prompts = manifest.of(folder) if not only else (folder, {})
        names = only or list(self.prompts) or sorted(_names(folder))
        self.names = names[:n]
        if not names:
            raise DiffpoError(f"{folder} has no pictures, tables or shards: name another folder or file")
        self.has_prompts = bool(self.prompts) or any(self._text(name).is_file() for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def items(self, start: int, step: int) -> Iterator[Listed]:
        for name in self.names[start::step]:
            said = self.prompts[name].said if self.prompts else (_stat(self._text(name)),)
            yield Listed(whole(name), _digest(_stat(self.folder / name), *said), name)

    def read(self, item: Listed) -> tuple[Image.Image, str | None]:
        image = decode(content(item.place, [self.folder.resolve()]))
        if self.prompts:
            said = self.prompts[item.place]
            sources = [_before(name, lambda name: content(name, [self.home.resolve()])) for name in said.sources]
            return image, Instruction(said.prompt, sources, said.key) if sources else said.prompt
        try:
            return image, read_text(self._text(item.place), LONGEST).strip() or None
        except FileNotFoundError:
            return image, None
        except (OSError, ValueError) as error:
            raise BadRow("cannot read the prompt", getattr(error, "strerror", None) or error) from None

    def _text(self, name: str) -> Path:
        return text_beside(self.folder / name)


def _names(folder: Path) -> Iterator[str]:
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and not os.path.islink(os.path.join(base, name))]
        for name in names:
            if name[0] != "." and is_picture(name):
                yield (Path(base) / name).relative_to(folder).as_posix()


def _before(cell: Any, read: Callable[[Any], bytes]) -> bytes:
    """The encoded picture to edit of a cell. BadRow if it cannot be read."""
    try:
        encoded = read(cell)
        decode(encoded)
    except BadRow as problem:
        raise BadRow(f"the picture to edit cannot be read ({problem.reason})", problem.detail) from None
    return encoded


class _Table(Pictures):
    """Rows with pictures in one or more columns."""

    def __init__(self, source: str, where: Where, quiet: bool) -> None:
        try:
            found = open_source(source, where.split, Data(train=source, resolution=8, limit=where.n), quiet)
        except DiffpoError as error:
            advice = "data.train_split=NAME or data.validation_split=NAME"
            raise DiffpoError(str(error).replace(advice, "--split NAME")) from None
        names = list(found.rows.column_names)
        lower = {name.lower(): name for name in reversed(names)}
        usual = tuple(lower[name] for name in IMAGES if name in lower) or _encoded(found.rows)
        self.images = where.images or tuple(name for name in usual if name != where.source)
        self.source = where.source
        sources = (where.source,) if where.source else ()
        self.prompts = (where.prompt,) if where.prompt else tuple(lower[name] for name in NAMES if name in lower)
        if not isinstance(found.rows, Shards):
            self.prompts = self.prompts[:1]  # samples of shards may differ in their fields, rows of a table do not
        there = plain(", ".join(names), 1000)
        for name in (*self.images, *self.prompts, *sources):
            if name not in names:
                raise DiffpoError(f"{source} has no column {name!r}: {hint(name, names)}")
        if not self.images:
            raise DiffpoError(f"{source} has no column of pictures among {there}; name it with --image NAME")
        self.has_prompts = bool(self.prompts)
        self.lacking = f"{source} has the columns {there}: name that of the prompts with --prompt NAME"
        used = list(dict.fromkeys([*self.images, *self.prompts, *sources]))
        self.rows, self.roots = found.rows.select_columns(used), found.roots
        path = Path(source).expanduser()
        self.name = path.name if path.exists() else source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        # a change of any file of rows, or another choice of prompts or sources, makes all pictures new
        read = (*self.prompts, *(f"source {name}" for name in sources))
        self.state = _digest(where.split, *read, *(_stat(each) for each in files if not is_picture(each.name)))

    def __len__(self) -> int:
        return len(self.rows) * len(self.images)

    def items(self, start: int, step: int) -> Iterator[Listed]:
        for number in range(start, len(self), step):
            row, place = divmod(number, len(self.images))
            column, key = self.images[place], ""
            if isinstance(self.rows, Shards):
                cell = self.rows[row][column]
                key = f"{cell.shard.name}:{cell.name}" if isinstance(cell, ShardMember) else ""
            yield Listed(key or f"{self.name}:{row}:{column}", self.state, (row, column))

    def read(self, item: Listed) -> tuple[Image.Image, str | None]:
        row, column = item.place
        values = self.rows[row]
        image = decode(self._content(values[column]))
        prompt = next((values[name] for name in self.prompts if values[name] not in (None, "")), None)
        if prompt is not None and not isinstance(prompt, str):
            raise BadRow("the prompt is not text", repr(prompt)[:100])
        text = prompt.strip() or None if prompt else None
        if text is None or self.source is None:
            return image, text
        cells = source_cells(values[self.source], self.source)
        return image, Instruction(text, [_before(cell, self._content) for cell in cells])

    def _content(self, cell: Any) -> bytes:
        """The encoded picture of a cell."""
        if isinstance(cell, list):
            if len(cell) != 1:
                raise BadRow("not one picture but a list in one cell", f"{len(cell)} pictures")
            cell = cell[0]
        try:
            return content(cell, self.roots)
        except BadRow as problem:
            if problem.reason != OUTSIDE:
                raise
            raise BadRow(OUTSIDE, f"{plain(cell, 100)}: put table and pictures into one folder") from None


def _encoded(rows: Any) -> tuple[str, ...]:
    """The columns that hold encoded pictures by their type: bytes, or `datasets`' {bytes, path}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = getattr(getattr(rows, "features", None), "arrow_schema", None)
    if isinstance(rows, Parquet) and rows.files:
        schema = pq.read_schema(rows.files[0][0])
    found = []
    for each in schema or ():
        kind = each.type
        struct = pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(k).name for k in range(kind.num_fields)}
        if struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            found.append(each.name)
    return tuple(found)


def _stat(path: Path) -> str:
    try:
        about = path.stat()
    except OSError:
        return "none"
    return f"{about.st_size} {about.st_mtime_ns}"


def _digest(*parts: object) -> str:
    return blake2b("\0".join(map(str, parts)).encode(errors="replace"), digest_size=8).hexdigest()


def texts(prompts: Sequence[str | None]) -> list[str]:
    """Prompts as scorers take them: none is empty, and half characters are replaced."""
    return [encodable(prompt or "") for prompt in prompts]
