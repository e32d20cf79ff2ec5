"""Features of a set of pictures, kept on the disk as they are computed, so that an interrupted run continues."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import DiffpoError
from ...common.files import write_atomic, writing
from ...common.images import BadRow, decode
from ...common.text import plain
from .pictures import Pictures

BATCH = 32
SAVE_EVERY = 60.0  # seconds


@dataclass
class Embedded:
    """``vectors`` (n, d) float32 of the pictures with the numbers ``rows`` (n,); ``bad``: why others have none."""

    vectors: np.ndarray
    rows: np.ndarray
    bad: dict[str, str]

    def groups(self, pictures: Pictures) -> list[str] | None:
        return None if pictures.groups is None else [pictures.groups[row] for row in self.rows]


def embed(pictures: Pictures, features: Any, cache: Path) -> Embedded:
    """The features of all readable pictures, from ``cache`` as far as they are there.

    ``features``: see `diffpo.scorers.features.Features`. DiffpoError if no picture can be read, or one gets a vector
    that is not finite.
    """
    from tqdm.auto import tqdm

    key = blake2b(json.dumps([features.name, pictures.digest]).encode(), digest_size=16).hexdigest()
    path = cache.expanduser() / f"features-{key}.safetensors"
    vectors, rows, bad, start = _kept(path)
    todo = pictures.encoded(start)
    saved, fresh = time.monotonic(), False
    what = f"{plain(features.name, 60)} of {plain(pictures.name, 60)}"
    with tqdm(total=len(pictures), initial=start, desc=what, unit="image", delay=1) as bar:
        try:
            while batch := list(islice(todo, BATCH)):
                good = list(_decoded(batch, bad))
                if good:
                    found = np.asarray(features.embed([image for _, image in good]), np.float32)
                    if not np.isfinite(found).all():
                        row = good[int((~np.isfinite(found)).any(1).argmax())][0]
                        raise DiffpoError(
                            f"{features.name} gave a vector that is not finite for {_name(pictures, row)}; check that "
                            "picture, or remove it"
                        )
                    vectors.append(found)
                    rows += [row for row, _ in good]
                start, fresh = start + len(batch), True
                bar.update(len(batch))
                if time.monotonic() - saved > SAVE_EVERY:
                    _keep(path, vectors, rows, bad, start)
                    saved, fresh = time.monotonic(), False
        finally:  # after Ctrl-C too
            if fresh and rows:
                _keep(path, vectors, rows, bad, start)
    if not rows:
        reason = next(iter(bad.values()), "there are none")
        raise DiffpoError(f"no picture of {pictures.name} can be read: {reason}")
    return Embedded(np.concatenate(vectors), np.array(rows), {_name(pictures, int(row)): bad[row] for row in bad})


def _name(pictures: Pictures, row: int) -> str:
    cell = pictures.cells[row]
    return plain(cell, 200) if isinstance(cell, (str, tuple)) else f"picture {row}"


def _decoded(batch: list[tuple[int, bytes | BadRow]], bad: dict[str, str]) -> Iterator[tuple[int, Any]]:
    for number, found in batch:
        try:
            if isinstance(found, BadRow):
                raise found
            yield number, decode(found)
        except BadRow as problem:
            bad[str(number)] = str(problem)


def _kept(path: Path) -> tuple[list[np.ndarray], list[int], dict[str, str], int]:
    """What a run before this one left: vectors, rows, bad pictures, and the number of pictures that were seen."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            return [file.get_tensor("vectors")], file.get_tensor("rows").tolist(), about["bad"], int(about["seen"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # not there, or not ours: computed again
        return [], [], {}, 0


def _keep(path: Path, vectors: list[np.ndarray], rows: list[int], bad: dict[str, str], seen: int) -> None:
    from safetensors.numpy import save

    vectors[:] = [np.concatenate(vectors)]
    about = {"about": json.dumps({"bad": bad, "seen": seen})}
    with writing(f"the features in {path}", "--cache"):
        write_atomic(path, save({"vectors": vectors[0], "rows": np.array(rows)}, about), shared=True)
