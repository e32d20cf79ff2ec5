"""Rows in text files: JSON, JSON lines, CSV and TSV, as people save them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..common.images import BadRow
from ..common.text import decoded, plain

TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
LIMIT = 2**32  # bytes in a text file of rows


class TextTable:
    """Rows kept as JSON objects and parsed on access, so that every value keeps its type. A row that could not be read
    is kept as its BadRow, which access raises."""

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

    def select(self, indices: range) -> TextTable:
        return self._with(self.rows[indices.start : indices.stop : indices.step], self.column_names)

    def select_columns(self, names: Sequence[str]) -> TextTable:
        return self._with(self.rows, names)

    def _with(self, rows: Sequence[bytes | BadRow], names: Sequence[str]) -> TextTable:
        return TextTable(rows, names)

    @classmethod
    def of(cls, rows: Iterator[dict[str, Any] | BadRow]) -> TextTable:
        """A table of the values themselves."""
        kept: list[bytes | BadRow] = []
        names: dict[str, None] = {}
        for row in rows:
            kept.append(row if isinstance(row, BadRow) else json.dumps(row).encode())
            names |= {} if isinstance(row, BadRow) else dict.fromkeys(row)
        return cls(kept, list(names))


def read_rows(content: bytes, suffix: str, name: str) -> TextTable:
    """The rows of a text file, read by its suffix, one of `TEXT`. A .json object whose values are lists of equal length
    is a table by columns. A line that is not UTF-8 becomes a BadRow. ValueError names file and line of other faults."""
    found: Iterable[tuple[str, Any]] = records(content, suffix, name)
    if suffix == ".json":
        found = list(found)
        whole = found[0][1] if len(found) == 1 and isinstance(found[0][1], dict) else {}
        lengths = {len(value) if isinstance(value, list) else None for value in whole.values()}
        if len(lengths) == 1 and None not in lengths:
            rows = zip(*whole.values(), strict=True)
            found = [(f"{name}, row {n}", dict(zip(whole, row, strict=True))) for n, row in enumerate(rows, 1)]
    return TextTable.of((row if isinstance(row, BadRow) else _object(row, place)) for place, row in found)


def records(content: bytes, suffix: str, name: str) -> Iterator[tuple[str, Any]]:
    """The entries of a text file, read by its suffix, one of `TEXT`, each with its place for messages, such as
    "pairs.jsonl:3".

    CSV and TSV need a header; their entries are dicts of text or None. A .json file is a list, one object, or JSON
    lines. ValueError names the file and the line that cannot be read.
    """
    if suffix in (".csv", ".tsv"):
        yield from _separated(_text(content, name), suffix, name)
    elif suffix == ".json":
        yield from _json(content, name)
    else:
        yield from _json_lines(content, name)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object with a key for each column, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return f"the {type(value).__name__} {plain(repr(value), 80)}"


def _text(content: bytes, name: str) -> str:
    try:
        return decoded(content)
    except ValueError as error:
        raise ValueError(f"{name} is neither UTF-8 nor UTF-16 with a byte order mark: {error}") from None


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
        raise ValueError(f"{name}: expected a list, not {_shown(value)}")
    for number, each in enumerate(value, 1):
        yield f"{name}, item {number}", each


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else plain(error, 200)


def _separated(text: str, suffix: str, name: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    header = text.split("\n", 1)[0]
    mark = max(",;\t" if suffix == ".csv" else "\t", key=header.count)
    lone = mark not in header  # a single column, whose texts may contain commas
    try:
        rows = _fields(io.StringIO(text, newline=""), "\x1f" if lone else mark)
        # with tabs as the separator, an opening quotation mark may be part of the text
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
        raise ValueError(f"{name} has two columns named {plain(repr(twice[0]), 80)}")
    for number, row in rows:
        if len(row) > len(names):
            raise ValueError(
                f"{name}:{number}: {len(row)} fields, but the header has {len(names)}; put a text that contains "
                f"{mark!r} in quotation marks"
            )
        row += [""] * (len(names) - len(row))
        yield f"{name}:{number}", {each: value or None for each, value in zip(names, row, strict=True)}


def _fields(lines: Iterable[str], mark: str, **options: Any) -> list[tuple[int, list[str]]]:
    """Line number and fields of every row that is not empty. Raises csv.Error."""
    reader = csv.reader(lines, delimiter=mark, strict=True, **options)
    try:
        return [(reader.line_num, row) for row in reader if any(value.strip() for value in row)]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None
