"""Aspect-ratio buckets: the sizes that images are trained at, and an order in which each update has one size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from .order import permutation

Size = tuple[int, int]  # width, height


@lru_cache
def sizes(resolution: int) -> list[Size]:
    """Sizes (width, height) of at most resolution^2 pixels with sides from resolution / 2 to 2 resolution, much as
    SDXL's (arXiv 2307.01952, appendix I). Sides are multiples of 64 px, or of 16 px (the width of a transformer's
    token) where resolution is below 512."""
    step = 64 if resolution >= 512 else 16 if resolution >= 64 else 8  # below 64 px: tests only
    found = {(resolution, resolution)}
    for long in range(resolution - resolution % step, 2 * resolution + 1, step):
        short = resolution**2 // long // step * step
        if long > resolution and 2 * short >= resolution:
            found |= {(long, short), (short, long)}
    return sorted(found)


@lru_cache(maxsize=4096)
def nearest(size: Size, resolution: int) -> Size:
    """The size of `sizes` with the nearest aspect ratio (by its logarithm); the largest if several are equally near."""
    aspect = math.log(size[0] / size[1])

    def distance(bucket: Size) -> tuple[float, int]:
        return round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -bucket[0] * bucket[1]

    return min(sizes(resolution), key=distance)


class Buckets:
    """An order of groups in which every update has a single size, however the update is split over processes.

    Each update draws one of the n groups, without replacement within n updates, and takes its size. The update's groups
    are then drawn from those of that size. Over n updates every group is seen ``per_update`` times. If a size has fewer
    groups than an update needs, some of them occur twice in that update.

    ``targets``: the size (width, height) that each group is trained at.
    """

    def __init__(self, targets: Sequence[Size], seed: int) -> None:
        self.targets, self.seed = targets, seed
        self.groups: dict[Size, list[int]] = {}
        for index, target in enumerate(targets):
            self.groups.setdefault(target, []).append(index)
        self._round: tuple[int, list[tuple[Size, int]]] = (-1, [])
        self._epochs: dict[Size, tuple[int, Sequence[int]]] = {}

    def index(self, position: int, per_update: int) -> int:
        """The group drawn at ``position``, counted from the start of training. Depends on its arguments alone."""
        update, place = divmod(position, per_update)
        number, turn = divmod(update, len(self.targets))
        target, before = self._turns(number)[turn]
        groups = self.groups[target]
        drawn = (number * len(groups) + before) * per_update + place
        epoch, place = divmod(drawn, len(groups))
        return groups[self._permutation(target, epoch)[place]]

    def _turns(self, number: int) -> list[tuple[Size, int]]:
        """For each of the n updates of round ``number``: its size, and how many updates of the round had it before."""
        if self._round[0] != number:
            seen: Counter[Size] = Counter()
            turns = []
            for index in permutation(self.seed, len(self.targets), "sizes", number):
                target = self.targets[index]
                turns.append((target, seen[target]))
                seen[target] += 1
            self._round = number, turns
        return self._round[1]

    def _permutation(self, target: Size, epoch: int) -> Sequence[int]:
        if self._epochs.get(target, (-1,))[0] != epoch:
            purpose = "order of {}x{}".format(*target)
            self._epochs[target] = epoch, permutation(self.seed, len(self.groups[target]), purpose, epoch)
        return self._epochs[target][1]
