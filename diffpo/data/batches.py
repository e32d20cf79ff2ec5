"""Pairs -> batches: latents and conditions on the device, from the caches, with one stateless draw per pair."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Data
from ..errors import DiffpoError
from ..rng import generator
from .cache import Cache, content_key
from .pairs import THREADS, Pairs
from .transforms import View, pixels, view

PIXELS = 2**20  # that go through the VAE at once


@dataclass(frozen=True)
class PairBatch:
    """n pairs: x_0 (2n, C, h, w) float32 and cond with 2n rows, chosen first; preference (n,).

    ``seed``, ``purpose`` and ``positions`` (n) address the randomness; ``timesteps`` are [low, high) per pair, or None.
    """

    x_0: Tensor
    cond: dict[str, Tensor]
    preference: Tensor
    seed: int
    purpose: str
    positions: list[int]
    timesteps: list[tuple[int, int]] | None = None


class Batches:
    """Batches of one source. Building it fills the caches, so the family's encoders must be loaded; they may go
    afterwards (the VAE only if ``cached``)."""

    def __init__(
        self, pairs: Pairs, data: Data, family: Any, seed: int, device: Any, process: int = 0, processes: int = 1
    ) -> None:
        self.pairs, self.data, self.family, self.seed, self.device = pairs, data, family, seed, device
        self.cached = latents_can_be_cached(data)
        share = {"process": process, "processes": processes, "quiet": process > 0}
        self.captions = sorted({pair.caption for pair in pairs.pairs})
        self._caption_row = {caption: row for row, caption in enumerate(self.captions)}
        key = content_key(family.text_hash(), self.captions)
        self.text = Cache(data.cache, "text", key, len(self.captions) + 1)  # the last row: the unconditional embedding
        self.text.build(self._encode_captions, 16, **share)
        if self.cached:
            key = content_key(family.vae_hash(), data.resolution, pairs.data_hash)
            self.latents = Cache(data.cache, "latents", key, len(pairs))
            self.latents.build(self._encode_pairs, 32, **share)

    def check(self) -> None:
        """Once every process has built its share: are the caches whole?"""
        for cache in (self.text, *((self.latents,) if self.cached else ())):
            if cache.missing():
                raise DiffpoError(
                    f"the cache {cache.folder} is incomplete: {cache.path(cache.missing()[0])} is not there"
                )

    def batch(
        self,
        indices: Sequence[int],
        positions: Sequence[int],
        purpose: str = "train",
        timesteps: list[tuple[int, int]] | None = None,
    ) -> PairBatch:
        """The pairs ``indices``; ``positions`` address their draws of posterior noise, view and caption dropout."""
        train = purpose == "train"
        draws = [generator(self.seed, f"{purpose} data", position) for position in positions]
        # every draw asks for its numbers in the same order, so that switching one option on leaves the others' draws
        # alone
        dropped = [train and torch.rand((), generator=draw).item() < self.data.caption_dropout for draw in draws]
        views = [self._view(index, draw, train) for index, draw in zip(indices, draws, strict=True)]
        if self.cached:
            posterior = self.latents.read(indices)
        else:
            posterior = self._encode_views(indices, views)
        mean, logvar = posterior["mean"].to(self.device), posterior["logvar"].to(self.device)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=draw) for draw in draws]).to(self.device)
        x_0 = self.family.scale_latents(mean + (0.5 * logvar).exp() * noise).transpose(0, 1).flatten(0, 1)

        rows = [
            len(self.captions) if drop else self._caption_row[self.pairs.pairs[index].caption]
            for index, drop in zip(indices, dropped, strict=True)
        ]
        text = {name: value.to(self.device) for name, value in self.text.read(rows).items()}
        sizes = torch.tensor([view.micro_conditioning for view in views], dtype=torch.float32, device=self.device)
        cond = {
            name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in self.family.condition(text, sizes).items()
        }
        preference = torch.tensor([self.pairs.pairs[index].preference for index in indices], device=self.device)
        return PairBatch(x_0, cond, preference, self.seed, purpose, list(positions), timesteps)

    def _view(self, index: int, draw: torch.Generator, train: bool) -> View:
        crop, flip = (self.data.crop, self.data.flip) if train else ("center", False)
        return view(self.pairs.pairs[index].size, self.data.resolution, crop, flip, draw)

    def _encode_captions(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.family.encode_text([self.captions[row] if row < len(self.captions) else None for row in rows])

    def _encode_pairs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        center = [self._view(index, torch.Generator(), train=False) for index in indices]
        return self._encode_views(indices, center)

    def _encode_views(self, indices: Sequence[int], views: Sequence[View]) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` (n, 2, C, h, w), chosen before rejected."""
        with ThreadPoolExecutor(THREADS) as pool:
            images = list(pool.map(self.pairs.images, indices))
        flat = torch.stack([pixels(image, view) for pair, view in zip(images, views, strict=True) for image in pair])
        # a float32 VAE at 1024 px takes some gigabytes for each image
        portions = flat.split(max(1, min(64, PIXELS // flat[0, 0].numel())))
        parts = [self.family.encode_image(portion) for portion in portions]
        return {name: torch.cat([part[name] for part in parts]).unflatten(0, (len(indices), 2)) for name in parts[0]}


def latents_can_be_cached(data: Data) -> bool:
    """A random crop or flip shows another picture at each step, so there is nothing to keep."""
    return data.cache_latents and data.crop == "center" and not data.flip


def order(seed: int, size: int, position: int) -> int:
    """Which pair is drawn at ``position``: epoch after epoch, each in a new order that depends on (seed, epoch)
    alone."""
    epoch, place = divmod(position, size)
    return _permutation(seed, size, epoch)[place]


@functools.lru_cache(maxsize=2)  # an update may reach over the end of an epoch
def _permutation(seed: int, size: int, epoch: int) -> list[int]:
    return torch.randperm(size, generator=generator(seed, "order", epoch)).tolist()
