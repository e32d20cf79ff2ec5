"""Resize, flip and crop images with one random draw per group, and SDXL's micro-conditioning of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:  # `diffpo check` draws pictures without torch
    import torch


@dataclass(frozen=True)
class View:
    """How an image becomes one of the target size: flip, resize, then crop at (top, left). All sizes in pixels."""

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
    """A view of each image of a group, from one random draw. ``sizes`` and ``target`` are (width, height); the options
    do not change how many numbers are drawn."""
    import torch

    return _views(sizes, target, crop, flip, torch.rand(3, generator=generator, dtype=torch.float64).tolist())


def centred(sizes: Sequence[tuple[int, int]], target: tuple[int, int]) -> list[View]:
    """`views` where nothing is random: neither a random crop nor a flip."""
    return _views(sizes, target, "center", False, (0, 0, 0))


def _views(
    sizes: Sequence[tuple[int, int]], target: tuple[int, int], crop: str, flip: bool, drawn: Sequence[float]
) -> list[View]:
    found, (chance, vertical, horizontal) = [], drawn
    for size in sizes:
        scale = max(wanted / side for wanted, side in zip(target, size, strict=True))
        resized = max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))
        spare_width, spare_height = resized[0] - target[0], resized[1] - target[1]
        top, left = spare_height // 2, spare_width // 2
        if crop == "random":
            top, left = int(vertical * (spare_height + 1)), int(horizontal * (spare_width + 1))
        found.append(View(size, resized, flip and chance < 0.5, top, left, target))
    return found


def view(size: tuple[int, int], resolution: int, crop: str, flip: bool, generator: torch.Generator) -> View:
    """A view of a single image, (width, height), at resolution x resolution."""
    return views([size], (resolution, resolution), crop, flip, generator)[0]


def shown(image: Image.Image, view: View) -> Image.Image:
    """``image``, flipped, resized and cropped as the view says."""
    if view.flip:
        image = ImageOps.mirror(image)
    if image.size != view.resized:
        image = image.resize(view.resized, Image.Resampling.LANCZOS)
    width, height = view.target
    return image.crop((view.left, view.top, view.left + width, view.top + height))


def pixels(image: Image.Image, view: View) -> torch.Tensor:
    """The view of ``image`` as (3, height, width), float32 in [-1, 1]."""
    return stacked([image], [view])[0]


def stacked(images: Sequence[Image.Image], seen: Sequence[View]) -> torch.Tensor:
    """The views of n images of one target size as (n, 3, height, width), float32 in [-1, 1]."""
    import torch

    levels = np.stack([np.asarray(shown(image, view)) for image, view in zip(images, seen, strict=True)])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float().contiguous().div_(127.5).sub_(1)
