"""A set of pictures as people keep them: a folder, parquet files or webdataset shards; read in a fixed order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ...common.errors import DiffpoError
from ...common.images import BadRow, content, is_picture
from ...common.text import plain

IMAGE = ("image", "jpg", "png", "jpeg", "webp", "img", "picture")  # columns of a table that hold the picture
PROMPT = ("prompt", "caption", "text")
OWN_NAME = re.compile(r"([0-9]{1,9})_[0-9]{1,18}")  # <prompt index>_<seed>, as `diffpo generate` names pictures


@dataclass(frozen=True)
class Pictures:
    """``cells``: what `common.images.content` reads, one for each picture; ``roots``: folders that cells may name.

    ``groups``: equal for pictures of one prompt; None if that is not known. ``digest``: a hash of the files' names,
    sizes and times, so that features that were computed before can be found again.
    """

    name: str
    cells: Sequence[Any]
    roots: tuple[Path, ...]
    groups: list[str] | None
    digest: str

    def __len__(self) -> int:
        return len(self.cells)

    def encoded(self, start: int) -> Iterator[tuple[int, bytes | BadRow]]:
        """The bytes of each picture from number ``start`` on, or why there are none."""
        for number in range(start, len(self.cells)):
            try:
                yield number, content(self.cells[number], self.roots)
            except BadRow as problem:
                yield number, problem


class _Column(Sequence):
    """The cells of a column of parquet files, read one row group at a time: fast in order, slow otherwise."""

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        import pyarrow.parquet as pq

        self.column = column
        self.groups: list[tuple[Path, int, int, int]] = []  # file, row group, first row, rows
        self.rows, self.at = 0, -1
        self.cells: list[Any] = []
        for path in paths:
            about = pq.ParquetFile(path).metadata
            for number in range(about.num_row_groups):
                rows = about.row_group(number).num_rows
                self.groups.append((path, number, self.rows, rows))
                self.rows += rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index):
        import pyarrow.parquet as pq

        at = next(k for k, (_, _, first, rows) in enumerate(self.groups) if first <= index < first + rows)
        if at != self.at:
            path, number, _, _ = self.groups[at]
            self.cells = pq.ParquetFile(path).read_row_group(number, columns=[self.column])[self.column].to_pylist()
            self.at = at
        return self.cells[index - self.groups[at][2]]


def read(source: str | Path) -> Pictures:
    """The pictures of ``source``: a folder with pictures at any depth, with .parquet or with .tar files; one such file;
    or ``FILE.parquet:COLUMN``. DiffpoError if there are none."""
    name = str(source)
    path, column = Path(name).expanduser(), None
    file, colon, rest = name.rpartition(":")
    if colon and file.endswith(".parquet") and not path.exists():
        path, column = Path(file).expanduser(), rest
    if not path.exists():
        raise DiffpoError(f"there is no folder or file {name} with pictures (relative paths start from {Path.cwd()})")
    files = _walk(path) if path.is_dir() else [path]
    for kind, reader in ((".parquet", _parquet), (".tar", _shards)):
        if found := [each for each in files if each.suffix.lower() == kind]:
            return reader(name, found, column)
    found = [each for each in files if is_picture(each.name)]
    if not found:
        raise DiffpoError(f"{name} holds no pictures and no .parquet or .tar files")
    if path.is_file():
        raise DiffpoError(f"{name} is one picture; name the folder with all of the set")
    if (path / "manifest.jsonl").is_file() and (path / "images").is_dir():
        arms = sorted(each.name for each in (path / "images").iterdir() if each.is_dir())
        if len(arms) > 1:
            raise DiffpoError(f"{name} holds several arms ({', '.join(arms)}); name one: {name}/images/{arms[0]}")
    cells = [each.relative_to(path).as_posix() for each in found]
    matches = [OWN_NAME.fullmatch(each.stem) for each in found]
    own = sum(match is not None for match in matches) > len(found) / 2
    groups = [match[1] if match else cell for match, cell in zip(matches, cells, strict=True)] if own else None
    return Pictures(name, cells, (path.resolve(),), groups, _digest(path, found))


def _walk(folder: Path) -> list[Path]:
    """All files below, sorted; hidden ones and links to folders are left out."""
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(base) / name for name in sorted(names) if not name.startswith(".")]
    return found


def _digest(root: Path, files: Sequence[Path]) -> str:
    total = blake2b(digest_size=16)
    for path in files:
        about = path.stat()
        relative = path.relative_to(root) if root.is_dir() else Path(path.name)
        total.update(f"{relative.as_posix()}\0{about.st_size}\0{about.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def _parquet(name: str, files: Sequence[Path], column: str | None) -> Pictures:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.ParquetFile(files[0]).schema_arrow.names
        chosen = column or next((each for each in IMAGE if each in names), None)
        if chosen is None or chosen not in names:
            shown = plain(", ".join(names), 300)
            lacks = f"{name} has no column {chosen or 'image'}; it has {shown}"
            raise DiffpoError(f"{lacks}. Name it as FILE.parquet:COLUMN")
        prompt = next((each for each in PROMPT if each in names), None)
        groups = None
        if prompt:
            tables = [pq.read_table(path, columns=[prompt])[prompt] for path in files]
            groups = [str(value) for table in tables for value in table.to_pylist()]
        cells = _Column(files, chosen)
    except (pa.ArrowException, OSError) as error:
        raise DiffpoError(f"cannot read {name}: {plain(error, 200)}") from None
    digest = _digest(files[0].parent, files) + chosen
    return Pictures(name, cells, (files[0].parent.resolve(),), groups, digest)


def _shards(name: str, files: Sequence[Path], column: str | None) -> Pictures:
    from ...data.files import shards

    table, _ = shards(files)
    image = next((each for each in IMAGE if each in table.column_names), None)
    if image is None:
        shown = plain(", ".join(table.column_names), 300)
        raise DiffpoError(f"{name} has no member KEY.png or KEY.jpg in its samples; its fields are {shown}")
    prompt = next((each for each in PROMPT if each in table.column_names), None)
    rows = [row for row in table if row[image] is not None]
    groups = [str(row[prompt]) for row in rows] if prompt else None
    return Pictures(name, [row[image] for row in rows], (), groups, _digest(files[0].parent, files))
