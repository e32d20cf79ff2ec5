"""The oracle of the embedded world as a scorer: prompt following and appearance, apart and together."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .. import shapes
from ..common.errors import DiffpoError
from ..common.text import plain
from .careful import CannotScore

ONLY = "the shapes scorer judges prompts of the embedded world only"
# The attributes as 0/1, not as soft memberships: "80 % of the colours are right" can be read, and a membership that
# moves from 0.9993 to 0.9996 would count as a win.
KEYS = ("total", "following", "appearance", "all_right", *(f"right_{name}" for name in shapes.ATTRIBUTES))


class ShapesScorer:
    """Every number in 0..1, higher is better; ``shapes.right_relation`` is NaN for prompts without a relation."""

    names = tuple(f"shapes.{key}" for key in KEYS)
    optional = frozenset({"shapes.right_relation"})

    @classmethod
    def load(cls, source: str | None, device: str) -> ShapesScorer:
        if source is not None:
            raise DiffpoError(f"the scorer shapes takes no source: leave out ={source}")
        return cls()

    def check_prompts(self, prompts: list[str]) -> None:
        """DiffpoError if none of ``prompts`` is a caption of the embedded world, before any picture is made."""
        if not any(_is_caption(prompt) for prompt in prompts):
            example = plain(prompts[0], 100)
            raise DiffpoError(f"{ONLY}, and none of these is one, such as {example!r}. Name others with --scorers")

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        try:
            read = [shapes.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        except ValueError as error:
            raise CannotScore(f"{ONLY}: {error}") from None
        return {f"shapes.{key}": np.array([one[key] for one in read], np.float64) for key in KEYS}


def _is_caption(prompt: str) -> bool:
    try:
        shapes.parse(prompt)
    except ValueError:
        return False
    return True
