"""What the caches will hold and take, for `diffpo check`."""

from __future__ import annotations

from typing import Any

from ..config import Data
from ..data.groups import Groups


def contents(groups: Groups, data: Data) -> str:
    captions = f"text embeddings of {len(groups.captions)} captions and of none"
    if data.crop == "random" or data.flip:
        return f"{captions}; no latents, because a random crop or flip shows another picture at each step"
    if not data.cache_latents:
        return f"{captions}; no latents (data.cache_latents=false)"
    images = sum(len(groups.pictures(target)) for target in groups.targets)
    sizes = f"{data.resolution} px" if len(groups.targets) < 2 else f"{len(groups.targets)} sizes"
    return f"{captions}; latents of {images} images at {sizes}"


def caption_bytes(family: Any, network: Any) -> int:
    """Of one caption's embeddings, at most: in the run's precision, as the encoders return them. ``network`` may be on
    the meta device."""
    _, _, cond = family.meta_inputs(network, 1, 64)
    width = family.dtype.itemsize
    return sum(value.numel() * (width if value.is_floating_point() else value.itemsize) for value in cond.values())


def picture_bytes(family: Any, network: Any, target: tuple[int, int]) -> int:
    """Of one picture's latents at a size (width, height): mean and log-variance, float32."""
    width, height = (side // family.vae_factor() for side in target)
    return 2 * 4 * family.latent_channels(network.config) * width * height


def size(family: Any, network: Any, groups: Groups, cached: bool) -> tuple[int, int]:
    """Bytes of the text embeddings and of the latents (if they are ``cached``) of a whole source, of which ``groups``
    may be a sample."""
    share = groups.total / groups.rows
    text = caption_bytes(family, network) * (len(groups.captions) + 1)
    latents = sum(
        len(groups.pictures(target)) * picture_bytes(family, network, target) for target in groups.targets if cached
    )
    return round(text * share), round(latents * share)
