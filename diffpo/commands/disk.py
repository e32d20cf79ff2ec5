"""The content and size of the caches that training will build, for `diffpo check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Data
from ..data.groups import Groups

if TYPE_CHECKING:  # `diffpo check` reads the data before it imports torch
    import torch

    from ..models.family import Family


def contents(groups: Groups, data: Data) -> str:
    """What the caches will contain, in words."""
    captions = f"text embeddings of {len(groups.captions)} captions and of the empty one"
    if data.crop == "random" or data.flip:
        return f"{captions}; no latents, because a random crop or flip changes the image at each step"
    if not data.cache_latents:
        return f"{captions}; no latents (data.cache_latents=false)"
    images = sum(len(groups.places(target)) for target in groups.targets)
    sizes = f"{data.resolution} px" if len(groups.targets) < 2 else f"{len(groups.targets)} sizes"
    return f"{captions}; latents of {images} images at {sizes} at most"


def caption_bytes(family: Family, network: torch.nn.Module, sources: int = 1) -> int:
    """The most bytes that the embeddings of one caption take, in the run's precision; ``sources``: with so many
    pictures, if the encoder sees them. ``network`` may be on the meta device."""
    cond = family.meta_edits(network, 1, sources) if family.reads_source else family.meta_cond(network, 1)
    width = family.dtype.itemsize
    return sum(value.numel() * (width if value.is_floating_point() else value.itemsize) for value in cond.values())


def image_bytes(family: Family, network: torch.nn.Module, target: tuple[int, int]) -> int:
    """The bytes of one image's latents at a size (width, height): mean and log-variance, float32."""
    width, height = (side // family.vae_factor() for side in target)
    return 2 * 4 * family.latent_channels(network.config) * width * height


def size(family: Family, network: torch.nn.Module, groups: Groups, cached: bool) -> tuple[int, int]:
    """The bytes of the text embeddings and of the latents (0 unless they are ``cached``) of a source. ``groups`` may be
    a sample of it."""
    share = groups.total / groups.rows
    texts = len(groups.captions) + 1
    if family.reads_source:  # one for each caption and picture, and an absent caption for each picture
        texts = len({(caption, group.source) for group in groups.groups for caption in (*group.captions, None)})
    sources = max((len(group.sources) for group in groups.groups), default=1)
    text = caption_bytes(family, network, sources) * texts
    latents = sum(
        len(groups.places(target)) * image_bytes(family, network, target) for target in groups.targets if cached
    )
    return round(text * share), round(latents * share)
