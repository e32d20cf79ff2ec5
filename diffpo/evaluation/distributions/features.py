"""Features of a set of pictures, kept on the disk as they are computed, so that an interrupted run continues."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import DiffpoError
from ...common.files import write_atomic, writing
from ...common.images import BadRow
from ...common.text import plain
from ...scorers import pictures
from ...scorers.pictures import Listed, Pictures

BATCH = 32
SAVE_EVERY = 60.0  # seconds
OWN_NAME = re.compile(
    r"(?:.*/)?([0-9]{1,9})_[0-9]{1,18}\.\w+"
)  # <prompt index>_<seed>, as `diffpo generate` names them


@dataclass(frozen=True)
class Set:
    """Pictures that are compared as one: ``items`` of ``source``, called ``name``. ``digest``: a hash of their names,
    sizes and times, so that features that were computed before can be found again."""

    name: str
    source: Pictures
    items: Sequence[Listed]
    digest: str


@dataclass
class Embedded:
    """``vectors`` (n, d) float32 of the readable pictures; ``prompts`` (n): their prompt, else their prompt's index in
    the file's name, else ""; ``bad``: names of the others, and why."""

    vectors: list[np.ndarray] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    seen: int = 0

    @property
    def groups(self) -> list[str] | None:
        """Equal for pictures of one prompt; None if no prompts are known."""
        named = [prompt or f"\0{number}" for number, prompt in enumerate(self.prompts)]
        return named if any(self.prompts) else None


def find(source: str | Path) -> Set:
    """The pictures of ``source``, as `diffpo.scorers.pictures.find` finds them, or of one arm of an evaluation,
    OUT/images/ARM. DiffpoError if there are none."""
    path = Path(source).expanduser()
    if not path.exists() and str(source).count("/") != 1:
        raise DiffpoError(f"there is no folder or file {source} with pictures (relative paths start from {Path.cwd()})")
    arm = ""
    if path.is_dir() and path.parent.name == "images" and (path.parents[1] / "manifest.jsonl").is_file():
        path, arm = path.parents[1], f"images/{path.name}/"  # its manifest has the prompts
    found = pictures.find(str(path) if path.exists() else str(source), pictures.Where())
    items = [item for item in found.items(0, 1) if item.key.startswith(arm)]
    arms = {item.key.split("/")[1] for item in items if item.key.startswith("images/") and item.key.count("/") > 1}
    if (path / "manifest.jsonl").is_file() and len(arms) > 1:
        raise DiffpoError(f"{source} holds the arms {', '.join(sorted(arms))}; name one: {source}/images/{min(arms)}")
    if not items:
        raise DiffpoError(f"{source} has no pictures")
    total = blake2b(digest_size=16)
    for item in items:
        total.update(f"{item.key.removeprefix(arm)}\0{item.state}\n".encode(errors="replace"))
    return Set(str(source), found, items, total.hexdigest())


def embed(chosen: Set, features: Any, cache: Path) -> Embedded:
    """The features of all readable pictures, from ``cache`` as far as they are there.

    ``features``: see `diffpo.scorers.features.Features`. DiffpoError if no picture can be read, or one gets a vector
    that is not finite.
    """
    from tqdm.auto import tqdm

    key = blake2b(json.dumps([features.name, chosen.digest]).encode(), digest_size=16).hexdigest()
    path = cache.expanduser() / f"features-{key}.safetensors"
    found = _kept(path)
    saved, fresh = time.monotonic(), False
    what = f"{plain(features.name, 60)} of {plain(chosen.name, 60)}"
    with tqdm(total=len(chosen.items), initial=found.seen, desc=what, unit="image", delay=1) as bar:
        try:
            while batch := chosen.items[found.seen : found.seen + BATCH]:
                images, prompts, bad = _read(chosen, batch)
                if images:
                    vectors = np.asarray(features.embed(images), np.float32)
                    if not np.isfinite(vectors).all():
                        good = [item.key for item in batch if item.key not in bad]
                        wrong = good[int((~np.isfinite(vectors)).any(1).argmax())]
                        raise DiffpoError(
                            f"{features.name} gave a vector that is not finite for {plain(wrong, 200)}; check that "
                            "picture, or remove it"
                        )
                    found.vectors.append(vectors)
                found.prompts += prompts
                found.bad |= bad
                found.seen, fresh = found.seen + len(batch), True
                bar.update(len(batch))
                if time.monotonic() - saved > SAVE_EVERY:
                    _keep(path, found)
                    saved, fresh = time.monotonic(), False
        finally:  # after Ctrl-C too
            if fresh and found.vectors:
                _keep(path, found)
    if not found.vectors:
        name, reason = next(iter(found.bad.items()))
        raise DiffpoError(f"no picture of {chosen.name} can be read; the first is {name}: {reason}")
    return found


def _read(chosen: Set, batch: Sequence[Listed]) -> tuple[list[Any], list[str], dict[str, str]]:
    """Pictures and prompts of those that can be read, and {name: reason} of the others."""
    images, prompts, bad = [], [], {}
    for item in batch:
        try:
            image, prompt = chosen.source.read(item)
        except BadRow as problem:
            bad[item.key] = str(problem)
            continue
        own = OWN_NAME.fullmatch(item.key)
        images.append(image)
        prompts.append(prompt or (own[1] if own else ""))
    return images, prompts, bad


def _kept(path: Path) -> Embedded:
    """What a run before this one left."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            return Embedded([file.get_tensor("vectors")], about["prompts"], about["bad"], int(about["seen"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # not there, or not ours: computed again
        return Embedded()


def _keep(path: Path, found: Embedded) -> None:
    from safetensors.numpy import save

    found.vectors = [np.concatenate(found.vectors)]
    about = json.dumps({"prompts": found.prompts, "bad": found.bad, "seen": found.seen})
    with writing(f"the features in {path}", "--cache"):
        write_atomic(path, save({"vectors": found.vectors[0]}, {"about": about}), shared=True)
