"""What the bench keeps between runs: small files, each written whole, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np

from samplers import Plan


def write(path: Path, content: bytes) -> None:
    """Whole or not at all, also if another process writes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    write(path, content.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Empty if the file is not there."""
    if not path.exists():
        return {}
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def write_json(path: Path, value: dict) -> None:
    write(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict:
    """Empty if the file is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def digest(*parts: object) -> str:
    """16 characters that depend on every part: bytes as they are, all else as its repr."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def content_of(plan: Plan) -> str:
    """The digest of a plan's numbers. A plan that changes gets new measurements; one that is renamed keeps them."""
    parts: list[object] = [type(plan).__name__]
    for field in fields(plan):
        value = getattr(plan, field.name)
        if field.name.startswith("_") or field.name in ("name", "origin"):
            continue
        parts += [field.name, value.tobytes() if isinstance(value, np.ndarray) else value]
    return digest(*parts)
