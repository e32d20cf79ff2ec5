"""What the manifest.jsonl of `diffpo generate` says of the pictures in a folder, for those who score them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.text import plain, read_text


@dataclass(frozen=True)
class Said:
    """What manifest.jsonl says of a picture: its prompt, and the files of what it is an edit of, with their key."""

    prompt: str
    sources: tuple[str, ...] = ()
    key: str | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """All of it, as texts."""
        return (self.prompt, *([self.key or ""] if self.sources else []), *self.sources)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Said:
        """ValueError if an entry is of another type."""
        source, key = row.get("source"), row.get("source_hash")
        sources = tuple(source) if isinstance(source, list) else () if source is None else (source,)
        if not all(isinstance(each, str) for each in (row["prompt"], *sources, key or "")):
            raise ValueError
        if key is not None and sources and len(key.split("+")) != len(sources):
            raise ValueError
        return cls(row["prompt"], sources, key)


def of(folder: Path) -> tuple[Path, dict[str, Said]]:
    """The folder that has the manifest.jsonl, and what that says by the file in ``folder``: this one's, or that of the
    folder whose images/ARM this is. Without one ``folder``, and nothing."""
    if found := _read(folder):
        return folder, found
    home, inside = folder.parent.parent, f"images/{folder.name}/"
    if folder.parent.name != "images":
        return folder, {}
    found = {file.removeprefix(inside): said for file, said in _read(home).items() if file.startswith(inside)}
    return (home, found) if found else (folder, {})


def _read(folder: Path) -> dict[str, Said]:
    """What manifest.jsonl says by the file, the last line of each; a half-written last line is left out."""
    path = folder / "manifest.jsonl"
    if not path.is_file():
        return {}
    found = {}
    try:
        *lines, last = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise DiffpoError(f"cannot read {path}: {plain(error, 200)}") from None
    for number, line in enumerate([*lines, last], 1):
        try:
            row = json.loads(line)
            file, said = row["file"], Said.of(row)
            good = isinstance(file, str)
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if good:
            found[file] = said
        elif line.strip() and number <= len(lines):
            raise DiffpoError(f"{path}:{number} is not a line with a file and its prompt: correct or remove it")
    return found
