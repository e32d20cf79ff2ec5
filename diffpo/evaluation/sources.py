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
from ..config import Model

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "sources"


def about(prompt: str) -> dict[str, Any]:
    """The entries of a manifest row that name the picture that ``prompt`` is about; none for a text alone."""
    key = key_of(prompt)
    return {} if key is None else {"source": f"{FOLDER}/{key}.png", "source_hash": key}


def prompt_of(folder: Path, row: Mapping[str, Any]) -> str:
    """The prompt of a manifest row in ``folder``, with its picture if it has one. DiffpoError if that is missing."""
    if isinstance(row["prompt"], Instruction) or row.get("source") is None:
        return row["prompt"]
    return Instruction(row["prompt"], folder / row["source"], row.get("source_hash"))


def write(out: Path, prompts: Sequence[str]) -> None:
    """Put the pictures of the prompts into ``out``."""
    from .manifest import save

    for prompt in prompts:
        if isinstance(prompt, Instruction) and not (path := out / about(prompt)["source"]).exists():
            buffer = BytesIO()
            prompt.open().save(buffer, "PNG")
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
    if not edits and family.reads_source:
        raise DiffpoError(
            f"{model.path} edits pictures: give --prompts a table, and name its column of pictures with --source COLUMN"
        )


def shown_at(prompt: Instruction, size: tuple[int, int]) -> Image.Image:
    """The picture that is edited into one of that size (width, height): resized, and cut at the middle, as in
    training."""
    from ..data.transforms import centred, shown

    picture = prompt.open()
    (seen,) = centred([picture.size], size)
    return shown(picture, seen)
