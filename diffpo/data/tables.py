"""Rows in Arrow and parquet files, and copies of rows that can be read in any order.

The name of a copy is a hash of the file that it was made from, so other content is never read from it.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, Protocol

from ..common.errors import DiffpoError
from ..common.files import whole_file, write_atomic, writing
from ..common.images import LFS, open_file
from ..common.text import plain

ROWS = 1000  # rows per file of a copy; an interrupted copy repeats at most this many
AT_ONCE = 64  # rows in memory while copying: a thousand rows of images may be gigabytes
OPEN = 32  # files of a copy that are open at once
LARGE = 2**28  # bytes; the hash of a larger file is remembered


class RowSource(Protocol):
    """A source whose columns are known and selected before rows are read."""

    column_names: list[str]

    def select_columns(self, names: Sequence[str]) -> Rows: ...


class Rows(RowSource, Protocol):
    """Rows that are read by their number; ``rows[i]`` is a dict of the columns."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class Arrow:
    """Rows of Arrow files, which are memory-mapped.

    ``files``: each with the number of its rows to use, counted from the first. ``trusted``: written by this program;
    other files are validated in full before the first value is read.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], column_names: Sequence[str], trusted: bool = False) -> None:
        self.files, self.column_names, self.trusted = [each for each in files if each[1]], list(column_names), trusted
        self._ends: list[int] = []
        for _, rows in self.files:
            self._ends.append((self._ends[-1] if self._ends else 0) + rows)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number] - self.files[number][1]
        return self._rows(self._table(number).slice(index - start, 1))[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, (_, rows) in enumerate(self.files):
            table = self._table(number).slice(0, rows)
            for start in range(0, rows, AT_ONCE):
                yield from self._rows(table.slice(start, AT_ONCE))

    def select(self, indices: range) -> Arrow:
        """The first rows only."""
        files, left = [], len(indices)
        for path, rows in self.files:
            files.append((path, min(rows, left)))
            left -= files[-1][1]
        return Arrow(files, self.column_names, self.trusted)

    def select_columns(self, names: Sequence[str]) -> Arrow:
        return Arrow(self.files, names, self.trusted)

    def _rows(self, table: Any) -> list[dict[str, Any]]:
        if not table.num_columns:
            return [dict.fromkeys(self.column_names)] * len(table)
        nothing = dict.fromkeys(self.column_names)
        return [nothing | row for row in table.to_pylist()]

    def _table(self, number: int) -> Any:
        with self._lock:
            if number not in self._open:
                table = read_arrow(self.files[number][0], self.trusted)
                there = set(table.column_names)
                self._open[number] = table.select([name for name in self.column_names if name in there])
            self._open.move_to_end(number)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return self._open[number]


def read_arrow(path: Path, trusted: bool = False) -> Any:
    """The table of an Arrow file or stream, memory-mapped. DiffpoError if it cannot be read."""
    import pyarrow as pa

    try:
        source = pa.memory_map(str(path))
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        table = (pa.ipc.open_file if whole else pa.ipc.open_stream)(source).read_all()
        if not trusted:
            table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        advice = "; delete its folder, then run again to make a new copy" if trusted else ""
        raise DiffpoError(f"cannot read the rows of {path}: {plain(error, 200)}{advice}") from None


class Parquet:
    """Rows of parquet files. `select_columns` copies them into ``folder``, where they can be read in any order. Rows
    that were copied before are not copied again, so an interrupted or shorter copy is continued."""

    def __init__(self, paths: Sequence[Path], folder: Path, setting: str, quiet: bool = True) -> None:
        """``setting``: the setting that chooses the folder, named in messages."""
        self.folder, self.setting, self.quiet = folder, setting, quiet
        self.files: list[tuple[Path, int]] = []
        names: dict[str, None] = {}
        for path in paths:
            rows, columns = _about(path)
            if rows:
                self.files.append((path, rows))
                names |= dict.fromkeys(columns)
        self.column_names = list(names)

    def __len__(self) -> int:
        return sum(rows for _, rows in self.files)

    def select(self, indices: range) -> Parquet:
        """The first rows only."""
        first = Parquet([], self.folder, self.setting, self.quiet)
        first.column_names, left = self.column_names, len(indices)
        for path, rows in self.files:
            if left > 0:
                first.files.append((path, min(rows, left)))
                left -= rows
        return first

    def select_columns(self, names: Sequence[str]) -> Arrow:
        """Make the copy. DiffpoError if a file is damaged, or the copy cannot be written."""
        import pyarrow as pa
        from tqdm.auto import tqdm

        parts: list[tuple[Path, int]] = []
        with tqdm(total=len(self), desc="copying rows", unit="row", delay=1, disable=self.quiet) as bar:
            for path, rows in self.files:
                copy = f"the copy of the rows of {path} into {self.folder}"
                with writing(copy, f"{self.setting}=FOLDER"):
                    try:
                        parts += _copied(path, rows, sorted(set(names)), self.folder, bar)
                    except pa.ArrowException as error:
                        raise DiffpoError(f"cannot read the rows of {path}: {plain(error, 200)}") from None
        return Arrow(parts, names, trusted=True)


def _about(path: Path) -> tuple[int, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(path) as file:
            if file.peek(len(LFS)).startswith(LFS):
                raise ValueError(f"{path.name} is a git LFS pointer, not the file: run `git lfs pull`")
            about = pq.ParquetFile(file)
            return about.metadata.num_rows, about.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name}: {getattr(error, 'strerror', None) or error}") from None


def _copied(path: Path, rows: int, names: Sequence[str], folder: Path, bar: Any) -> list[tuple[Path, int]]:
    """The files of the copy that have the first ``rows`` rows, and how many of these each has."""
    from filelock import FileLock

    key = blake2b(json.dumps([content_hash(path, folder), names]).encode(), digest_size=16).hexdigest()
    target = folder / f"rows-{key}"
    wanted = [(target / f"{start // ROWS:05d}.arrow", min(ROWS, rows - start)) for start in range(0, rows, ROWS)]
    if not all(part.exists() for part, _ in wanted):
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / ".lock"):
            first = next((number for number, (part, _) in enumerate(wanted) if not part.exists()), len(wanted))
            bar.update(min(first * ROWS, rows))
            _copy(path, names, target, range(first, len(wanted)), bar)
    return wanted


def _copy(path: Path, names: Sequence[str], target: Path, numbers: range, bar: Any) -> None:
    import pyarrow as pa

    if not numbers:
        return
    batches = _batches(path, names, numbers.start * ROWS)
    batch = next(batches, None)
    for number in numbers:
        part, left = target / f"{number:05d}.arrow", ROWS
        if batch is None:
            raise DiffpoError(
                f"cannot read the rows of {path}: it has fewer rows than its header states. Download it again"
            )
        with whole_file(part) as file, pa.ipc.new_stream(file, batch.schema) as writer:
            while batch is not None and left:
                writer.write_batch(batch.slice(0, left))
                taken = min(left, len(batch))
                bar.update(taken)
                left -= taken
                batch = batch.slice(taken) if taken < len(batch) else next(batches, None)


def _batches(path: Path, names: Sequence[str], start: int) -> Iterator[Any]:
    """Record batches of the rows from ``start`` on."""
    import pyarrow.parquet as pq

    with open_file(path) as file:
        parquet = pq.ParquetFile(file)
        groups = list(range(parquet.num_row_groups))
        while groups and start >= parquet.metadata.row_group(groups[0]).num_rows:
            start -= parquet.metadata.row_group(groups.pop(0)).num_rows
        columns = parquet.schema_arrow.names
        there = [name for name in names if name in columns] or columns[:1]
        for batch in parquet.iter_batches(AT_ONCE, groups, there):
            if start < len(batch):
                yield batch.slice(start).select(there)
            start = max(0, start - len(batch))


def content_hash(path: Path, folder: Path) -> str:
    """A hash of a file's bytes. For a large file it is kept in ``folder`` and used again while the file's size and
    times stay the same. The change time, unlike the modification time, cannot be set by a program."""
    about = path.stat()
    known = folder / f"hash-{blake2b(os.fsencode(path), digest_size=16).hexdigest()}.json"
    state = [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    remember = about.st_size >= LARGE and os.name == "posix"
    if remember:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(known.read_bytes())
            if kept["state"] == state and re.fullmatch("[0-9a-f]{64}", kept["hash"]):
                return kept["hash"]
    began = time.time_ns()
    with open_file(path) as file:
        found = file_digest(file, lambda: blake2b(digest_size=32)).hexdigest()
    if remember and about.st_ctime_ns < began - 2 * 10**9:  # a later write gets a later time
        with contextlib.suppress(OSError):
            write_atomic(known, json.dumps({"state": state, "hash": found}).encode(), shared=True)
    return found
