"""What `diffpo check` says of the model, kept with the caches: the next check of the same model needs no torch.

It is said again only if nothing that it follows from has changed: the settings, the data's sizes and captions, the
model's files, the versions of the libraries and this program. Data are read anew by each check, and problems are not
kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..common.files import write_atomic
from ..config import Config
from ..data.groups import Groups
from ..data.keys import content_key
from . import edits

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "peft", "accelerate", "bitsandbytes")
PACKAGE = Path(__file__).resolve().parents[1]

Say = Callable[[str], None]


def said_again(key: str | None, config: Config, say: Say, examine: Callable[[Say], list[str]]) -> list[str]:
    """What ``examine`` returns, the problems. It says its findings, or they are those of the last call with this
    ``key``; None: always anew."""
    path = None if key is None else Path(config.data.cache).expanduser() / f"check-{key}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        kept = json.loads(path.read_bytes()) if path is not None else None
        if isinstance(kept, list) and all(isinstance(line, str) for line in kept):
            for line in kept:
                say(line)
            return []
    lines: list[str] = []

    def both(line: str) -> None:
        lines.append(line)
        say(line)

    problems = examine(both)
    if path is not None and not problems:
        with contextlib.suppress(OSError):  # the cache of a run may be elsewhere, or full: train says so
            write_atomic(path, json.dumps(lines).encode(), shared=True)
    return problems


def key(config: Config, groups: Groups | None, texts: list[str], vram: float | None) -> str | None:
    """Of everything that the findings follow from. None if they also follow from something that is not known here: a
    model of the hub, whose files may change, a class of the user's own, or the machine."""
    model, train = config.model, config.train
    mine = train.optimizer.startswith("torch.optim.") and model.family is None and model.attention is None
    places = [Path(each).expanduser() for each in (model.path, model.config, model.vae) if each is not None]
    if not mine or train.precision == "fp16" or not all(each.exists() for each in places):
        return None
    sizes = None
    if groups is not None:
        images = [(target, len(groups.places(target))) for target in groups.targets]
        sizes = [groups.kind, groups.members, images, len(groups.captions), groups.rows, groups.total]
    settings = config.model_dump(mode="json", exclude={"output", "log"})
    libraries = [(name, _version(name)) for name in LIBRARIES]
    files = [list(_state(each)) for each in (PACKAGE, PACKAGE.parent / "samplers", *places)]
    read = [sorted(set(texts)), edits.most(groups, texts)]
    return content_key(settings, sizes, read, vram, libraries, sys.version, files)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _state(path: Path) -> Iterator[tuple[Any, ...]]:
    """The names, sizes and times of a file, or of all files in a folder."""
    if path.is_file():
        about = path.stat()
        yield path.name, about.st_size, about.st_mtime_ns
        return
    for base, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            with contextlib.suppress(OSError):  # a broken link
                about = os.stat(os.path.join(base, name))
                yield os.path.relpath(os.path.join(base, name), path), about.st_size, about.st_mtime_ns
