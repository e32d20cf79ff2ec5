"""What scorers do to a picture before their network sees it, on tensors and with gradients.

PIL resizes 8-bit pictures and rounds after each direction. Here nothing is rounded, so that a prepared picture differs
from the one that PIL prepares by about a level of 255, most at single pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize
from torchvision.transforms.functional import InterpolationMode, normalize, pad, resize

from ..common.errors import DiffpoError

FROM_PIL = ("ToTensor", "MaybeToTensor", "MaybeConvertMode", "_convert_to_rgb")  # stages that make an RGB tensor
MODES = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}  # by PIL's numbers


def by_transform(pixels: Tensor, transform: Any, scorer: str) -> Tensor:
    """(n, 3, H, W) in [0, 1] through a torchvision ``transform`` that was made for PIL pictures, as open_clip's.

    DiffpoError that names the ``scorer`` if the transform has a stage that is not known here.
    """
    for stage in transform.transforms if isinstance(transform, Compose) else [transform]:
        if isinstance(stage, Resize):
            pixels = Resize(stage.size, stage.interpolation, antialias=True)(pixels).clamp(0, 1)
        elif isinstance(stage, (CenterCrop, Normalize)):
            pixels = stage(pixels)
        elif (name := getattr(stage, "__name__", type(stage).__name__)) not in FROM_PIL:
            raise DiffpoError(f"the scorer {scorer} has no gradient: {name} prepares its pictures")
    return pixels


def by_processor(pixels: Tensor, processor: Any) -> Tensor:
    """(n, 3, H, W) in [0, 1] through a CLIPImageProcessor's steps: to the shorter side, centre crop, normalised.

    DiffpoError for a way of resizing that is not known here.
    """
    if processor.do_resize:
        size = dict(processor.size)
        shorter = size.get("shortest_edge")
        wanted = [size["height"], size["width"]] if shorter is None else shorter
        resample = int(getattr(processor, "resample", 3))
        if resample not in MODES:
            raise DiffpoError(
                f"a scorer has no gradient: its {type(processor).__name__} has resample={resample}, and only 2 "
                "(bilinear) and 3 (bicubic) are known here. Choose another scorer"
            )
        pixels = resize(pixels, wanted, MODES[resample], antialias=True).clamp(0, 1)
    if processor.do_center_crop:
        crop = dict(processor.crop_size)
        pixels = centre(pixels, crop["height"], crop["width"])
    if not processor.do_normalize:
        return pixels
    return normalize(pixels, list(processor.image_mean), list(processor.image_std))


def centre(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle (height, width) of pictures that are at least as large."""
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def whole(pixels: Tensor, size: int) -> Tensor:
    """(..., 3, H, W) -> (..., 3, size, size): the whole picture, its shorter side padded with black."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return pad(pixels, [left, top, size - width - left, size - height - top], fill=0)
