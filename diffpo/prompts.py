"""Where prompts come from: a file, the embedded world, or a list."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import DiffpoError


def load_prompts(source: str | Path | Sequence[str], n: int | None = None) -> list[str]:
    """The first ``n`` prompts of a text file (one per line), of a JSON-lines file (key ``prompt``), of the embedded
    world (``shapes:heldout``, ``shapes:train``, ``shapes:heldout:512``), or of a list."""
    name = str(source) if isinstance(source, (str, Path)) else "the list of prompts"
    if not isinstance(source, (str, Path)):
        prompts = list(source)
    elif name.startswith("shapes:"):
        prompts, n = _shapes_prompts(name, n)
    else:
        prompts = _file_prompts(Path(name))
    if not prompts:
        raise DiffpoError(f"{name} holds no prompt")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise DiffpoError(f"{name}: prompt {i} is {prompt!r}; every prompt must be a non-empty text")
    if n is not None and not 1 <= n <= len(prompts):
        raise DiffpoError(f"{name} holds {len(prompts)} prompts; n must be 1 to {len(prompts)}, not {n}")
    return prompts[:n]


def _shapes_prompts(name: str, n: int | None) -> tuple[list[str], int | None]:
    from . import shapes

    splits = {"heldout": shapes.heldout_captions, "train": shapes.train_captions}
    _, split, *rest = name.split(":")
    if split not in splits or len(rest) > 1 or not all(re.fullmatch("[0-9]{1,9}", r) for r in rest):
        raise DiffpoError(f"unknown prompts {name!r}; the embedded world has shapes:heldout[:N] and shapes:train[:N]")
    return splits[split](), n if n is not None else (int(rest[0]) if rest else None)


def _file_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 within a prompt
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise DiffpoError(
            f"cannot read prompts from {path}: {error}; give a text file (one prompt per line), "
            "a .jsonl file with the key 'prompt', or shapes:heldout:N"
        ) from None
    if path.suffix != ".jsonl":
        return [line.strip() for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DiffpoError(f"{path}:{number}: not a JSON object with the key 'prompt'") from None
    return prompts
