"""What the bench keeps between runs: small files, each written whole, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np

from samplers import Plan, Statistics


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


KINDS = ("uncalibrated", "calibrated")


def write_entry(folder: Path, kind: str, family: str, about: dict, where: dict) -> None:
    """One method of a cell. It has a file of its own, so that runs which share a cell do not overwrite each other."""
    path = folder / f"{kind}-{family.replace(' ', '-')}.json"
    write_json(path, {"kind": kind, "family": family, "about": about, "where": where})


def read_entries(folder: Path) -> dict:
    """What `write_entry` wrote: {"uncalibrated": {family: about}, "calibrated": {method: about}, **where}."""
    found: dict = {kind: {} for kind in KINDS}
    for path in sorted(folder.glob("*.json")):
        entry = read_json(path)
        found |= entry["where"]
        found[entry["kind"]][entry["family"]] = entry["about"]
    return found


def digest(*parts: object) -> str:
    """16 characters that depend on every part: bytes as they are, all else as its repr."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def content_of(table: Plan | Statistics) -> str:
    """The digest of its numbers. A plan that changes gets new measurements; one that is renamed keeps them."""
    parts: list[object] = [type(table).__name__]
    for field in fields(table):
        value = getattr(table, field.name)
        if field.name.startswith("_") or field.name in ("name", "origin"):
            continue
        parts += [field.name, value.tobytes() if isinstance(value, np.ndarray) else value]
    return digest(*parts)
