"""Rows in files: JSON, JSON lines, CSV and TSV as people save them, parquet, and Arrow.

A table has ``column_names``, a length, and rows that are found by their number: ``table[i]`` is a dict. Content alone
decides what is read: of parquet a copy is kept that can be read in any order, and its name is a hash of the file.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import io
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.files import whole_file, write_atomic, writing
from ..common.images import LFS, BadRow, open_file
from ..common.text import decoded, plain

TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
LIMIT = 2**32  # bytes of a file of rows in text
ROWS = 1000  # in a file of the copy; after an interruption at most so many are read again
AT_ONCE = 64  # rows in memory while copying: images of a thousand may be gigabytes
OPEN = 32  # files of a copy that are open at once
LARGE = 2**28  # bytes of a file from which on its hash is remembered


class Table:
    """Rows that are kept as the JSON text of an object each, and parsed when they are asked for: each value keeps its
    own kind. A row may be the BadRow that says why there is none."""

    def __init__(self, rows: Sequence[bytes | BadRow], column_names: Sequence[str]) -> None:
        self.rows, self.column_names = rows, list(column_names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if isinstance(row, BadRow):
            raise row
        found = self.parse(row)
        return {name: found.get(name) for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def parse(self, row: bytes) -> dict[str, Any]:
        return json.loads(row)

    def select(self, indices: range) -> Table:
        return self._with(self.rows[indices.start : indices.stop : indices.step], self.column_names)

    def select_columns(self, names: Sequence[str]) -> Table:
        return self._with(self.rows, names)

    def _with(self, rows: Sequence[bytes | BadRow], names: Sequence[str]) -> Table:
        return Table(rows, names)

    @classmethod
    def of(cls, rows: Iterator[dict[str, Any] | BadRow]) -> Table:
        """A table of the values themselves."""
        kept: list[bytes | BadRow] = []
        names: dict[str, None] = {}
        for row in rows:
            kept.append(row if isinstance(row, BadRow) else json.dumps(row).encode())
            names |= {} if isinstance(row, BadRow) else dict.fromkeys(row)
        return cls(kept, names)


# ---- text


def read_rows(content: bytes, suffix: str, name: str) -> Table:
    """The rows of a file of text by its suffix, one of `TEXT`; an object in .json whose values are lists of one length
    holds columns. ValueError names the file and the line of what is no row; a line that is not UTF-8 is a BadRow."""
    found: Iterable[tuple[str, Any]] = records(content, suffix, name)
    if suffix == ".json":
        found = list(found)
        whole = found[0][1] if len(found) == 1 and isinstance(found[0][1], dict) else {}
        lengths = {len(value) if isinstance(value, list) else None for value in whole.values()}
        if len(lengths) == 1 and None not in lengths:
            rows = zip(*whole.values(), strict=True)
            found = [(f"{name}, row {n}", dict(zip(whole, row, strict=True))) for n, row in enumerate(rows, 1)]
    return Table.of((row if isinstance(row, BadRow) else _object(row, place)) for place, row in found)


def records(content: bytes, suffix: str, name: str) -> Iterator[tuple[str, Any]]:
    """What a file of text lists by its suffix, one of `TEXT`, each with its place for messages, such as
    "pairs.jsonl:3".

    CSV and TSV have a header, and give objects whose values are text or None. JSON is a list, one object, or lines of
    their own. ValueError names what cannot be read.
    """
    if suffix in (".csv", ".tsv"):
        yield from _separated(_text(content, name), suffix, name)
    elif suffix == ".json":
        yield from _json(content, name)
    else:
        yield from _json_lines(content, name)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a row is an object with a key for each column, and this is {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return f"the {type(value).__name__} {plain(repr(value), 80)}"


def _text(content: bytes, name: str) -> str:
    try:
        return decoded(content)
    except ValueError as error:
        raise ValueError(f"{name} is not UTF-8, nor UTF-16 with a byte order mark: {error}") from None


def _json_lines(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):  # UTF-16, UTF-32
        content = _text(content, name).encode()
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield place, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield place, BadRow("unreadable row", f"{place}: {error}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON: {_reason(error)}") from None


def _json(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    text = _text(content, name)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(first)
            yield from _json_lines(content, name)
            return
        raise ValueError(f"{name} is not JSON: {_reason(error)}") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{name} holds {_shown(value)}; expected is a list")
    for number, each in enumerate(value, 1):
        yield f"{name}, item {number}", each


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else plain(error, 200)


def _separated(text: str, suffix: str, name: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    header = text.split("\n", 1)[0]
    mark = max(",;\t" if suffix == ".csv" else "\t", key=header.count)
    lone = mark not in header  # one column, whose texts may hold commas
    try:
        rows = _fields(io.StringIO(text, newline=""), "\x1f" if lone else mark)
        # where tabs alone separate, a quotation mark that opens a text is a mark like others
        loose = suffix == ".tsv" and len(rows) != sum(bool(line.strip()) for line in text.split("\n"))
    except csv.Error as error:
        if suffix != ".tsv":
            raise ValueError(f"{name} cannot be read as a table: {error}") from None
        loose = True
    if loose:
        rows = _fields(text.split("\n"), "\x1f" if lone else mark, quoting=csv.QUOTE_NONE)
    if not rows:
        return
    (_, names), *rows = rows
    names = [each.strip() for each in names]
    if twice := [each for each in names if names.count(each) > 1]:
        raise ValueError(f"{name} has two columns {plain(repr(twice[0]), 80)}")
    for number, row in rows:
        if len(row) > len(names):
            raise ValueError(
                f"{name}:{number}: {len(row)} fields, and the header has {len(names)}; a text that holds {mark!r} "
                "stands in quotation marks"
            )
        row += [""] * (len(names) - len(row))
        yield f"{name}:{number}", {each: value or None for each, value in zip(names, row, strict=True)}


def _fields(lines: Any, mark: str, **options: Any) -> list[tuple[int, list[str]]]:
    """The line's number and the fields of every row that is not empty; csv.Error."""
    reader = csv.reader(lines, delimiter=mark, strict=True, **options)
    try:
        return [(reader.line_num, row) for row in reader if any(value.strip() for value in row)]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None


# ---- Arrow and parquet


class Arrow:
    """Rows of Arrow files, which are mapped into memory and never held there.

    ``files``: each with its number of rows, of which it may hold more. ``trusted``: written here; others are checked
    whole before their first value is read.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], column_names: Sequence[str], trusted: bool = False) -> None:
        self.files, self.column_names, self.trusted = [each for each in files if each[1]], list(column_names), trusted
        self._ends = []
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
        there = [name for name in self.column_names if name in table.column_names]
        if not there:
            return [dict.fromkeys(self.column_names)] * len(table)
        return [{name: row.get(name) for name in self.column_names} for row in table.select(there).to_pylist()]

    def _table(self, number: int) -> Any:
        with self._lock:
            if number not in self._open:
                self._open[number] = read_arrow(self.files[number][0], self.trusted)
            self._open.move_to_end(number)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return self._open[number]


def read_arrow(path: Path, trusted: bool = False) -> Any:
    """The table of an Arrow file or stream, mapped into memory; DiffpoError if it is none."""
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
        advice = "; delete its folder, and the next run copies it again" if trusted else ""
        raise DiffpoError(f"cannot read the rows of {path}: {plain(error, 200)}{advice}") from None


class Parquet:
    """Rows of parquet files. `select_columns` makes the copy that rows are read from, in ``folder``; what is copied is
    not copied again, an interrupted copy goes on, and so does one of fewer rows."""

    def __init__(self, paths: Sequence[Path], folder: Path, setting: str, quiet: bool = True) -> None:
        """``setting`` chooses the folder, for a message."""
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
        """DiffpoError: a file is torn, or the copy cannot be written."""
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
                raise ValueError(f"{path.name} is a pointer of git LFS, not the file: `git lfs pull` fetches it")
            about = pq.ParquetFile(file)
            return about.metadata.num_rows, about.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name}: {getattr(error, 'strerror', None) or error}") from None


def _copied(path: Path, rows: int, names: Sequence[str], folder: Path, bar: Any) -> list[tuple[Path, int]]:
    """The files of the copy that hold the first ``rows`` rows, and how many of them each holds."""
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
            raise DiffpoError(f"cannot read the rows of {path}: it says that it has more of them than it has")
        with whole_file(part) as file, pa.ipc.new_stream(file, batch.schema) as writer:
            while batch is not None and left:
                writer.write_batch(batch.slice(0, left))
                taken = min(left, len(batch))
                bar.update(taken)
                left -= taken
                batch = batch.slice(taken) if taken < len(batch) else next(batches, None)


def _batches(path: Path, names: Sequence[str], start: int) -> Iterator[Any]:
    """Of the rows from ``start`` on."""
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
    """Of all bytes of a file. That of a large one is remembered in ``folder`` for as long as the file system says that
    nobody wrote to the file: its change time cannot be set, as its modification time can."""
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
    if remember and about.st_ctime_ns < began - 2 * 10**9:  # no write since then can have the same time
        with contextlib.suppress(OSError):
            write_atomic(known, json.dumps({"state": state, "hash": found}).encode(), shared=True)
    return found
