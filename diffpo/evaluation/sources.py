"""The pictures that are edited: beside the pictures that were made of them, and in the rows of a manifest.

OUT/sources/<hash>.png     each of them once, as it was given
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import models
from ..common.errors import DiffpoError
from ..common.instruction import Instruction, key_of
from ..common.text import plain
from ..config import Model

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "sources"


def files(out: Path, prompt: Instruction) -> list[Path]:
    """Where the pictures of a prompt are, in the folder ``out``."""
    return [out / FOLDER / f"{key}.png" for key in prompt.keys]


def about(prompt: str) -> dict[str, Any]:
    """The entries of a manifest row that name the picture that ``prompt`` is about, or the list of them; none for a
    text alone."""
    if not isinstance(prompt, Instruction):
        return {}
    names = [path.as_posix() for path in files(Path(), prompt)]
    return {"source": names[0] if len(names) == 1 else names, "source_hash": prompt.key}


def prompt_of(folder: Path, row: Mapping[str, Any]) -> str:
    """The prompt of a manifest row in ``folder``, with its pictures if it has some. DiffpoError if one is missing."""
    if isinstance(row["prompt"], Instruction) or row.get("source") is None:
        return row["prompt"]
    names = [row["source"]] if isinstance(row["source"], str) else row["source"]
    return Instruction(row["prompt"], [folder / each for each in names], row.get("source_hash"))


def write(out: Path, prompts: Sequence[str]) -> None:
    """Put the pictures of the prompts into ``out``."""
    from .manifest import save

    for prompt in prompts:
        if not isinstance(prompt, Instruction):
            continue
        paths = files(out, prompt)
        if all(path.exists() for path in paths):
            continue
        for path, picture in zip(paths, prompt.pictures(), strict=True):
            if not path.exists():
                buffer = BytesIO()
                picture.save(buffer, "PNG")
                save(path, buffer.getvalue())


def require(pipe: Any, model: Model, rows: Sequence[Mapping[str, Any]]) -> None:
    """DiffpoError if a model that edits has no pictures in ``rows``, or another model has."""
    family = models.family_class(model, type(pipe).__name__)
    edits = any(key_of(row["prompt"]) for row in rows)
    if edits and not family.edits:
        raise DiffpoError(
            f"{model.path} makes pictures from texts alone, and --source names pictures to edit: leave it out, or use "
            f"a model that edits (docs/models.md)"
        )
    if not edits and family.needs_source:
        raise DiffpoError(
            f"{model.path} edits pictures: give --prompts a table, and name its column of pictures with --source COLUMN"
        )
    for row in rows if not family.several else ():
        if isinstance(row["prompt"], Instruction) and len(row["prompt"].keys) > 1:
            raise DiffpoError(
                f"{model.path} edits one picture, and prompt {row['index']} ({plain(row['prompt'], 100)!r}) has "
                f"{len(row['prompt'].keys)}: leave one, or use a model that takes several (docs/models.md)"
            )


def shown_at(prompt: Instruction, size: tuple[int, int]) -> list[Image.Image]:
    """The pictures that are edited into one of that size (width, height): resized, and cut at the middle, as in
    training."""
    from ..data.transforms import centred, shown

    pictures = prompt.pictures()
    return [shown(each, seen) for each, seen in zip(pictures, centred([p.size for p in pictures], size), strict=True)]


def in_a_row(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture as it is; several side by side, as high as the first one."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0]
    height = pictures[0].height
    scaled = [each.resize((max(1, round(each.width * height / each.height)), height)) for each in pictures]
    found = Image.new("RGB", (sum(each.width for each in scaled), height))
    for k, each in enumerate(scaled):
        found.paste(each, (sum(before.width for before in scaled[:k]), 0))
    return found
