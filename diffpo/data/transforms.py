"""Resize, flip and crop: one draw for each group, and the micro-conditioning that tells SDXL the truth about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps


@dataclass(frozen=True)
class View:
    """How an image is brought to the target's size: flip, resize, then crop at (top, left)."""

    original: tuple[int, int]  # width, height
    resized: tuple[int, int]  # width, height
    flip: bool
    top: int
    left: int
    target: tuple[int, int]  # width, height

    @property
    def micro_conditioning(self) -> tuple[int, ...]:
        """SDXL's time ids (arXiv 2307.01952, section 2.2): original h, w, crop top, left, target h, w."""
        (width, height), (target_width, target_height) = self.original, self.target
        return (height, width, self.top, self.left, target_height, target_width)


def views(
    sizes: Sequence[tuple[int, int]], target: tuple[int, int], crop: str, flip: bool, generator: torch.Generator
) -> list[View]:
    """One of each image of a group, from one draw. ``sizes`` and ``target`` are (width, height); the generator is asked
    for the same numbers whatever the options are."""
    chance, vertical, horizontal = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    found = []
    for size in sizes:
        scale = max(wanted / side for wanted, side in zip(target, size, strict=True))
        resized = tuple(max(wanted, round(side * scale)) for wanted, side in zip(target, size, strict=True))
        spare_width, spare_height = (side - wanted for wanted, side in zip(target, resized, strict=True))
        top, left = spare_height // 2, spare_width // 2
        if crop == "random":
            top, left = int(vertical * (spare_height + 1)), int(horizontal * (spare_width + 1))
        found.append(View(size, resized, flip and chance < 0.5, top, left, target))
    return found


def view(size: tuple[int, int], resolution: int, crop: str, flip: bool, generator: torch.Generator) -> View:
    """Of one image, brought to resolution x resolution."""
    return views([size], (resolution, resolution), crop, flip, generator)[0]


def shown(image: Image.Image, view: View) -> Image.Image:
    """What of ``image`` the view shows, of the target's size."""
    if view.flip:
        image = ImageOps.mirror(image)
    if image.size != view.resized:
        image = image.resize(view.resized, Image.Resampling.LANCZOS)
    width, height = view.target
    return image.crop((view.left, view.top, view.left + width, view.top + height))


def pixels(image: Image.Image, view: View) -> torch.Tensor:
    """(3, height, width) of the target, float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(shown(image, view)).copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)
