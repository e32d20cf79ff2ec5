"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from hashlib import blake2b
from pathlib import Path


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk afterwards."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def beside(path: Path, ending: str) -> Path:
    """The hidden name beside ``path`` for what it is made of: .NAME.ENDING, with a hash for a name that is too long."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > 255:
        name = f".{blake2b(os.fsencode(path.name), digest_size=16).hexdigest()}.{ending}"
    return path.with_name(name)


def write_atomic(path: Path, content: bytes, shared: bool = False) -> None:
    """All of ``content`` or nothing. ``shared``: another run may be writing the same file now."""
    part = beside(path, f"{secrets.token_hex(8)}.part" if shared else "part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
