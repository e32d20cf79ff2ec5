"""What is finished of a long piece of work: lines that any process can add to, and that a killed run leaves whole."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from .files import writing


class Parts:
    """Finished values by key, in FOLDER/<digest of the name>-<rank>.jsonl. Every process adds to a file of its own and
    reads those of all; a half-written line is left out, so that its work is done again.

    Attributes:
        rows: {key: value}, values as JSON gives them back.
    """

    def __init__(self, folder: Path | None, name: str, rank: int = 0) -> None:
        """``folder`` None keeps nothing."""
        self.path: Path | None = None
        self.rows: dict[str, Any] = {}
        if folder is None:
            return
        digest = sha256(name.encode()).hexdigest()[:16]
        self.path = folder / f"{digest}-{rank}.jsonl"
        for path in sorted(folder.glob(f"{digest}-*.jsonl")):
            *lines, last = path.read_bytes().split(b"\n")
            for line in lines:
                try:
                    key, value = json.loads(line)
                    self.rows[str(key)] = value
                except (ValueError, TypeError):
                    continue
            if last and path == self.path:
                self._append(b"\n")

    def add(self, key: str, value: Any) -> None:
        """``value`` is on the disk afterwards."""
        self.rows[key] = value
        if self.path is not None:
            self._append(json.dumps([key, value]).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        assert self.path is not None  # noqa: S101 (asked by both callers)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(data)


def file_key(path: Path, *more: object) -> str:
    """A key that changes when the file at ``path`` does, or what it is used with. OSError if there is no such file."""
    about = path.stat()
    further = " ".join(map(str, more))
    return sha256(f"{path} {about.st_size} {about.st_mtime_ns} {further}".encode(errors="replace")).hexdigest()
