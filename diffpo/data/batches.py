"""From groups to batches: latents and conditions on the device, from the caches, with one stateless draw per group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common.errors import DiffpoError
from ..common.rng import Draws
from ..common.worker import ALONE, Worker
from ..config import Data
from .cache import Cache, content_key
from .captions import Captions, require_numbers, require_pictures
from .encoders import Encoders, source_condition
from .groups import SOURCE, Groups
from .judgement import Judgement
from .rows import Group
from .source import THREADS
from .transforms import View, shown, stacked, views

PIXELS, IMAGES = 2**20, 16  # in one call of the VAE, at most


@dataclass(frozen=True)
class Batch:
    """n groups of m images: x_0 (m n, C, h, w) float32 and cond with m n rows, laid out as ``judgement`` says.

    ``indices`` (n): which groups of the data set. ``draws`` address the randomness. ``mask`` (m n, 1, h, w) weighs the
    errors, with mean 1 over h, w; None: all alike.
    """

    x_0: Tensor
    cond: dict[str, Tensor]
    judgement: Judgement
    indices: list[int]
    draws: Draws
    mask: Tensor | None = None


class Batches:
    """Batches of one source. Its constructor fills the caches, for which the family's encoders must be loaded. They can
    be freed afterwards; the VAE only if ``cached``. The latents of an image that occurs in several groups are cached
    once."""

    def __init__(
        self,
        groups: Groups,
        data: Data,
        family: Encoders,
        seed: int = 0,
        worker: Worker = ALONE,
        needed: Collection[int] | None = None,
    ) -> None:
        """``needed``: the groups that batches will be asked for, so that nothing else is encoded; None is all."""
        self.groups, self.data, self.family, self.seed, self.device = groups, data, family, seed, worker.device
        self.cached = latents_can_be_cached(data)
        # gives further conditions, e.g. of users, for the groups at (indices, draws): n rows for each member
        self.further: Callable[[Sequence[int], Draws], dict[str, Tensor]] | None = None
        # gives P(the first image is better) (n,) in place of the labels, for the groups at (indices, draws)
        self.judge: Callable[[Sequence[int], Draws], Tensor] | None = None
        self.captions = groups.captions
        # captions per group: one for all its images, or one for each
        self._captions = max(len(group.captions) for group in groups.groups)
        family.require_sizes(groups.targets)
        self._check_source()
        about = ((caption, group.source) for group in groups.groups for caption in group.captions)
        self._sources_at = {group.source: number for number, group in enumerate(groups.groups)}
        self._texts = Captions(data.cache, family, about, self._sources_of, groups.targets)
        self.text = self._texts.cache
        asked = groups.groups if needed is None else [groups.groups[index] for index in sorted(needed)]
        rows = {self._texts.row(caption, group.source) for group in asked for caption in (*group.captions, None)}
        self._needed = {self.text: rows}
        self._texts.build(worker, rows)
        self._latents: dict[tuple[int, int], Cache] = {}  # one for each size
        self._image_row: dict[tuple[int, int], dict[str, int]] = {}  # rows of these caches by the images' hashes
        for target in groups.targets if self.cached else ():
            places = groups.places(target)
            self._image_row[target] = {each: row for row, each in enumerate(places)}
            square = target == (data.resolution, data.resolution)
            key = content_key(family.vae_hash(), data.resolution if square else target, list(places))
            cache = self._latents[target] = Cache(data.cache, "latents", key, len(places))
            load = functools.partial(self._load_images, list(places.values()))
            row = self._image_row[target]
            self._needed[cache] = {row[each] for group in asked if group.target == target for each in group.pictures}
            cache.build(family.encode_image, portion(*target), worker, self._needed[cache], load)

    def _check_source(self) -> None:
        """DiffpoError for pictures to edit that the model does not take, that it lacks, or that it sees in two ways."""
        require_pictures(self.family, self.groups.columns.source, self.groups.source)
        numbers = ((f"row {group.row}", len(group.sources)) for group in self.groups.groups)
        require_numbers(self.family, numbers, self.groups.source)
        if not self.family.reads_source or self.groups.columns.source is None:
            return
        if self.data.flip or self.data.crop != "center":
            raise DiffpoError(
                "data.flip=true and data.crop=random show the network another picture than the text encoder of this "
                "model has seen: set data.flip=false and data.crop=center"
            )

    def _sources_of(self, key: str) -> list[Image.Image]:
        """The pictures to edit with this key, as the network sees them without a random crop."""
        index = self._sources_at[key]
        found = self.groups.some(index, [SOURCE - k for k in range(len(self.groups.groups[index].sources))])
        seen = self._views(index, torch.Generator(), train=False)[self.groups.members :]
        return [shown(picture, view) for (_, picture), view in zip(found, seen, strict=True)]

    def check(self) -> None:
        """DiffpoError unless the caches have all that is needed, when every process has built its part."""
        for cache, rows in self._needed.items():
            if lacking := cache.missing(rows):
                raise DiffpoError(
                    f"the cache {cache.folder} is incomplete: {cache.path(min(lacking))} is missing or lacks rows. If "
                    "it was deleted, run the same command again. If processes run on several machines, set data.cache "
                    "to a folder that all of them share"
                )

    def batch(
        self,
        indices: Sequence[int],
        positions: Sequence[int],
        purpose: str = "train",
        timesteps: list[tuple[int, int]] | None = None,
    ) -> Batch:
        """A batch of the groups ``indices``, which must have one target size. ``positions`` address their draws of
        posterior noise, view and caption dropout."""
        train, groups = purpose == "train", [self.groups.groups[index] for index in indices]
        if timesteps is None and any(group.times for group in groups):
            timesteps = [self._times(group) for group in groups]
        addresses = Draws(self.seed, purpose, list(positions), timesteps)
        draws = addresses.generators("data")
        # every group draws its numbers in the same order, so that one option does not change the draws of others
        dropped = [train and torch.rand((), generator=draw).item() < self.data.caption_dropout for draw in draws]
        seen = [self._views(index, draw, train) for index, draw in zip(indices, draws, strict=True)]
        if self.cached:
            posterior = self._read(indices)
        else:
            posterior = self._encode_views(indices, seen)
        members = self.groups.members
        mean, logvar = (
            posterior[name].unflatten(0, (len(groups), members)).to(self.device) for name in ("mean", "logvar")
        )
        noise = torch.stack([torch.randn(mean.shape[1:], generator=draw) for draw in draws]).to(self.device)
        x_0 = self.family.scale_latents(mean + (0.5 * logvar).exp() * noise).transpose(0, 1).flatten(0, 1)

        cond = self._condition(groups, seen, dropped)
        if self.groups.columns.source:
            source = self._sources(indices, seen)
            cond["source"] = source.repeat(members, *[1] * (source.ndim - 1))
        if self.further is not None:
            more = self.further(indices, addresses)
            cond |= {name: value.repeat(members, 1).to(self.device) for name, value in more.items()}
        mask = None
        if any(group.mask for group in groups):
            height, width = x_0.shape[-2:]
            rows = [self._mask(index, each[0], (height, width)) for index, each in zip(indices, seen, strict=True)]
            mask = torch.stack(rows).repeat(members, 1, 1, 1).to(self.device)
        judgement = Judgement.of(groups, members, self.device)
        if self.judge is not None:
            judgement = replace(judgement, preference=self.judge(indices, addresses).to(self.device))
        return Batch(x_0, cond, judgement, list(indices), addresses, mask)

    def _sources(self, indices: Sequence[int], seen: Sequence[Sequence[View]]) -> Tensor:
        """The latents of what the groups' images are edits of, without noise, as the pipelines have them."""
        groups, members = [self.groups.groups[index] for index in indices], self.groups.members
        latents = []
        for k in range(len(groups[0].sources)):
            if self.cached:
                row = self._image_row[groups[0].target]
                mean = self._latents[groups[0].target].read([row[group.sources[k]] for group in groups])["mean"]
            else:
                images = [self.groups.image(index, SOURCE - k) for index in indices]
                mean = self._encode(images, [each[members + k] for each in seen])["mean"]
            latents.append(self.family.scale_latents(mean.to(self.device)))
        return source_condition(latents)

    def _times(self, group: Group) -> tuple[int, int]:
        """The timesteps [low, high) of the model that a group's preference is about."""
        last = self.family.train_timesteps
        low, high = group.times or (0, last)
        if low >= last:
            raise DiffpoError(
                f"{self.groups.source}: row {group.row} is about timesteps from {low}, and this model's highest is "
                f"{last - 1} (data.columns.t_low)"
            )
        return low, min(high + 1, last)

    def _mask(self, index: int, view: View, shape: tuple[int, int]) -> Tensor:
        """The mask of a group at the latents' ``shape`` (h, w), with mean 1: (1, h, w). Ones without a mask."""
        mask = self.groups.mask(index)
        if mask is None:
            return torch.ones(1, *shape)
        seen = torch.from_numpy(np.asarray(shown(mask, view), np.float32))[None, None]
        pooled = torch.nn.functional.adaptive_avg_pool2d(seen, shape)[0]
        if not pooled.any():
            raise DiffpoError(
                f"{self.groups.source}: the crop of row {self.groups.groups[index].row} leaves nothing of its mask; "
                f"set data.crop=center and a data.resolution that keeps it"
            )
        return pooled / pooled.mean()

    def unconditional(self, cond: dict[str, Tensor], indices: Sequence[int]) -> dict[str, Tensor]:
        """``cond`` of the groups ``indices``, m n rows, with the text embeddings of the empty prompt."""
        rows = [self._texts.row(None, self.groups.groups[index].source) for index in indices]
        empty = self.text.read(rows * (len(next(iter(cond.values()))) // len(rows)))
        return {**cond, **{name: value.to(cond[name]) for name, value in empty.items()}}

    def portions(self, items: Iterable[int], index: Callable[[int], int], rows: int) -> Iterator[list[int]]:
        """``items`` in lists of at most ``rows``, so that the groups ``index(item)`` of a list have one size and can be
        a batch. Within a size, items keep their order."""
        found: dict[tuple[int, int], list[int]] = {}
        for item in items:
            found.setdefault(self.groups.groups[index(item)].target, []).append(item)
        for alike in found.values():
            for start in range(0, len(alike), rows):
                yield alike[start : start + rows]

    def means(self, indices: Sequence[int]) -> Tensor:
        """x_0 (m n, C, h, w) of the groups ``indices`` without posterior noise. Only if ``cached``."""
        mean = self._read(indices)["mean"].unflatten(0, (len(indices), -1))
        return self.family.scale_latents(mean.to(self.device)).transpose(0, 1).flatten(0, 1)

    @property
    def latents(self) -> Cache:
        """The cache of latents, if all groups have one size."""
        (cache,) = self._latents.values()
        return cache

    def _read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        groups = [self.groups.groups[index] for index in indices]
        row = self._image_row[groups[0].target]
        return self._latents[groups[0].target].read([row[each] for group in groups for each in group.hashes])

    def _condition(
        self, groups: Sequence[Group], seen: Sequence[Sequence[View]], dropped: Sequence[bool]
    ) -> dict[str, Tensor]:
        """The conditions of all members, with their group's caption or their own. Captions of a group are dropped
        together."""
        rows = [
            self._texts.row(None if drop else group.captions[which], group.source)
            for which in range(self._captions)
            for group, drop in zip(groups, dropped, strict=True)
        ]
        repeats = self.groups.members // self._captions
        text = {
            name: value.to(self.device).repeat(repeats, *[1] * (value.ndim - 1))
            for name, value in self.text.read(rows).items()
        }
        each = zip(*(views[: self.groups.members] for views in seen), strict=True)
        by_member = [view.micro_conditioning for member in each for view in member]
        return self.family.condition(text, torch.tensor(by_member, dtype=torch.float32, device=self.device))

    def _views(self, index: int, draw: torch.Generator, train: bool) -> list[View]:
        """Of the group's images, and after them of what they are edits of."""
        crop, flip = (self.data.crop, self.data.flip) if train else ("center", False)
        group = self.groups.groups[index]
        return views((*group.sizes, *group.source_sizes), group.target, crop, flip, draw)

    def _load_images(self, found: Sequence[tuple[int, int]], rows: Sequence[int]) -> Tensor:
        """The pixels (n, 3, H, W) of the images at ``rows`` of ``found``, a list of (group, member)."""
        places = [found[row] for row in rows]
        wanted: dict[int, dict[int, None]] = {}  # the members of a group, which one reading of its row gives
        for index, member in places:
            wanted.setdefault(index, {})[member] = None
        images: dict[tuple[int, int], Image.Image] = {}

        def read(indices: Sequence[int]) -> None:
            for index in indices:
                images.update(
                    ((index, member), image) for member, image in self.groups.some(index, list(wanted[index]))
                )

        parts = [list(wanted)[start::THREADS] for start in range(min(THREADS, len(wanted)))]
        with ThreadPoolExecutor(len(parts)) as pool:  # one task for each thread: a small picture is read sooner
            list(pool.map(read, parts))
        seen = {index: self._views(index, torch.Generator(), train=False) for index in wanted}
        first = self.groups.members
        at = [member if member >= 0 else first + SOURCE - member for _, member in places]
        return stacked([images[place] for place in places], [seen[i][k] for (i, _), k in zip(places, at, strict=True)])

    def _encode_views(self, indices: Sequence[int], seen: Sequence[Sequence[View]]) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` (n m, C, h, w) of whole groups, ordered by group."""
        with ThreadPoolExecutor(THREADS) as pool:
            images = [image for group in pool.map(self.groups.images, indices) for image in group]
        return self._encode(images, [view for group in seen for view in group[: self.groups.members]])

    def _encode(self, images: Sequence[Image.Image], seen: Sequence[View]) -> dict[str, Tensor]:
        flat = stacked(images, seen)
        parts = [self.family.encode_image(part) for part in flat.split(portion(*flat.shape[-2:]))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def portion(width: int, height: int) -> int:
    """How many images of a size the VAE encodes at once: in float32 it needs several gigabytes for one of 1024 px."""
    return max(1, min(IMAGES, PIXELS // (width * height)))


def latents_can_be_cached(data: Data) -> bool:
    """Whether images have fixed latents: a random crop or flip changes the image at each step."""
    return data.cache_latents and data.crop == "center" and not data.flip
