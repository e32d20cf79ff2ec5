"""Prompts from a file, from a published set, from the embedded world, or from a list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.instruction import Instruction
from ..common.names import hint
from ..common.text import LIMIT, plain, read_text
from . import prompt_sets
from .columns import source_cells

# of the prompts' column or key, in upper or lower case; the first match is taken
NAMES = ("prompt", "caption", "text", "prompts", "captions", "texts")
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
READ = (
    "give a text file with one prompt per line, a .json, .jsonl, .csv, .tsv or .parquet file with a column prompt, "
    "caption or text (or FILE:COLUMN), the name of a set, or shapes:heldout:N"
)


def load_prompts(source: str | Path | Sequence[str], n: int | None = None, pictures: str | None = None) -> list[str]:
    """The first ``n`` (default: all) prompts of a file, of a published set (`prompt_sets.NAMES`, or NAME=PATH), of the
    embedded world (``shapes:heldout``, ``shapes:train``, ``shapes:heldout:512``), or of a list.

    A text file has one prompt per line. ``.json`` is a list of texts, a list of objects with a key of `NAMES`, or an
    object of such lists (HPSv2's styles). ``.jsonl`` has a text or an object per line; ``.csv``, ``.tsv`` and
    ``.parquet`` have a column. ``FILE:COLUMN`` names the key or column. DiffpoError names the file and the line or item
    that is not a prompt.

    ``pictures``: the key or column of a table with the picture that each prompt is about, a file beside the table or
    its bytes, or with a list of them. The prompts are then an `Instruction` each.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the list of prompts"
    table = isinstance(source, (str, Path)) and _split(name)[0].suffix.lower() in TABLES
    if pictures is not None and not table:
        raise DiffpoError(
            f"{name} has no column {pictures!r} with pictures to edit: give a table ({', '.join(TABLES)}), with a row "
            f"for each prompt and its picture"
        )
    if not isinstance(source, (str, Path)):
        prompts = list(source)
    elif name.startswith("shapes:"):
        prompts, n = _shapes_prompts(name, n)
    elif prompt_sets.named(name) and not _exists(Path(name)):
        prompts = list(prompt_sets.prompts(name))
    else:
        prompts = _file_prompts(name, pictures)
    if not prompts:
        raise DiffpoError(f"{name} has no prompts: add at least one")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise DiffpoError(
                f"{name}: prompt {i} is {plain(repr(prompt), 200)}; every prompt must be a non-empty text"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise DiffpoError(f"{name}: prompt {i} contains a lone surrogate (half a character): {plain(prompt, 200)}")
    if n is not None and not 1 <= n <= len(prompts):
        raise DiffpoError(f"{name} has {len(prompts)} prompts; use 1 to {len(prompts)} of them, not {n}")
    return prompts[:n]


def _shapes_prompts(name: str, n: int | None) -> tuple[list[str], int | None]:
    from .. import shapes

    splits = {"heldout": shapes.heldout_captions, "train": shapes.train_captions}
    _, split, *rest = name.split(":")
    if split not in splits or len(rest) > 1 or not all(re.fullmatch("[0-9]{1,9}", r) for r in rest):
        raise DiffpoError(f"unknown prompts {name!r}; the embedded world has shapes:heldout[:N] and shapes:train[:N]")
    return splits[split](), n if n is not None else (int(rest[0]) if rest else None)


def _file_prompts(name: str, pictures: str | None) -> list[Any]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise DiffpoError(f"cannot read prompts from the URL {name}; download it first, then {READ}")
    path, column = _split(name)
    try:
        path = path.expanduser()
        if path.is_dir():
            raise ValueError("it is a folder")
        if path.suffix.lower() in TABLES:
            return list(_table_prompts(path, column, pictures))
        # not splitlines, which would also cut at U+2028 within a prompt
        return [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, NUL in the name, unknown ~user
        reason = getattr(error, "strerror", None) or plain(error, 300)
        word = name.partition("=")[0]
        if re.fullmatch(r"[\w-]+", word):  # as a set is named
            reason += f", and no set of prompts has that name: {hint(word, prompt_sets.NAMES)}"
        raise DiffpoError(f"cannot read prompts from {name}: {reason}; {READ}") from None


def _split(name: str) -> tuple[Path, str | None]:
    """FILE or FILE:COLUMN. An existing file is a file, even with a colon in its name. A column is only recognised after
    the suffix of a table, so that C:\\prompts.csv is a file."""
    path = Path(name)
    file, colon, column = name.rpartition(":")
    if colon and column and Path(file).suffix.lower() in TABLES and not _exists(path):
        return Path(file), column
    return path, None


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL in the name, unknown ~user
        return False


def _table_prompts(path: Path, column: str | None, pictures: str | None) -> Iterator[Any]:
    from ..common.images import BadRow
    from . import text_tables

    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_prompts(path, column, pictures)
        return
    with open(path, "rb") as file:  # a pipe works too
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise ValueError(f"it has more than {LIMIT} bytes")
    found = list(text_tables.records(content, suffix, path.name))
    if suffix == ".json" and len(found) == 1 and isinstance(found[0][1], dict):
        found = list(_of_object(found[0][1], column, path))
    key = column
    for place, value in found:
        if isinstance(value, BadRow):
            raise ValueError(str(value))
        row = value
        if isinstance(value, dict):
            key = key or _column(list(value), place)
            if key not in value:
                raise ValueError(f"{place} has no key {key!r}; it has {_shown(value)}")
            value = value[key]
        elif column is not None or not isinstance(value, str):
            raise ValueError(f"{place}: expected a prompt, not {plain(repr(value), 100)}")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: expected a non-empty text, not {plain(repr(value), 100)}")
        if pictures is None:
            yield value
        elif isinstance(row, dict) and pictures in row:
            yield _instruction(value, row[pictures], path, place, pictures)
        else:
            raise ValueError(f"{place} has no key {pictures!r} with a picture to edit")


def _instruction(text: str, cell: Any, path: Path, place: str, pictures: str) -> Instruction:
    """``cell``: a file in the folder of the table ``path``, or the encoded picture, or a list of these. ValueError if
    it is none of them."""
    from ..common.images import BadRow, content, decode, locate

    roots = [path.parent.resolve()]
    found: list[Any] = []
    try:
        for each in source_cells(cell, pictures):
            try:
                encoded = content(each, roots)
                decode(encoded)
                file = each.get("path") if isinstance(each, dict) and not each.get("bytes") else each
                found.append(locate(file, roots) if isinstance(file, str) else encoded)
            except BadRow as problem:
                raise problem.of(each) if isinstance(each, str) else problem from None
    except BadRow as problem:
        raise ValueError(f"{place}: {problem}") from None
    return Instruction(text, found)


def _of_object(whole: dict, column: str | None, path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON object. They are the object itself if it has the key, the items of its lists (such as
    HPSv2's styles), or its values, each an object."""
    names = [column] if column else [name for name in whole if name.lower() in NAMES]
    if names and names[0] in whole:
        value = whole[names[0]]
        each = value if isinstance(value, list) else [{names[0]: value}]
        yield from ((f"{path.name}, {names[0]}, item {number}", item) for number, item in enumerate(each, 1))
    elif whole and all(isinstance(value, list) for value in whole.values()):
        for style, value in whole.items():
            yield from (
                (f"{path.name}, {plain(style, 80)}, item {number}", item) for number, item in enumerate(value, 1)
            )
    elif whole and all(isinstance(value, dict) for value in whole.values()):
        yield from ((f"{path.name}, {plain(name, 80)}", value) for name, value in whole.items())
    else:
        raise ValueError(f"none of its keys lists prompts; it has {_shown(whole)}")


def _column(names: Sequence[str], place: str) -> str:
    known = {name.strip().lower(): name for name in reversed(names)}
    found = next((known[name] for name in NAMES if name in known), None)
    if found is None:
        shown = plain(", ".join(names), 500)
        raise ValueError(
            f"{place} has no column {', '.join(NAMES[:3])}; it has {shown}. Name the column as FILE:COLUMN"
        )
    return found


def _shown(value: dict) -> str:
    return plain(", ".join(map(str, value)), 300)


def _parquet_prompts(path: Path, column: str | None, pictures: str | None) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            for each in (column, pictures):
                if each is not None and each not in names:
                    raise ValueError(f"there is no column {each!r} among {plain(', '.join(names), 500)}")
            column = column or _column(names, path.name)
            texts = parquet.read([column])[column].to_pylist()
            if pictures is None:
                return texts
            cells = parquet.read([pictures])[pictures].to_pylist()
            rows = enumerate(zip(texts, cells, strict=True), 1)
            return [
                _instruction(str(text), cell, path, f"{path.name}, row {row}", pictures) for row, (text, cell) in rows
            ]
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
