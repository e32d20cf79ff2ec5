"""Aspect-ratio buckets: the sizes that pictures are trained at, and the order in which groups of equal size come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from .order import permutation

Size = tuple[int, int]  # width, height


@lru_cache
def sizes(resolution: int) -> list[Size]:
    """Sizes of at most resolution^2 pixels with sides from resolution / 2 to 2 resolution, in steps of 64 px (of 16 px
    below 512), much as SDXL's (arXiv 2307.01952, appendix I). A transformer's token is 16 px wide."""
    step = 64 if resolution >= 512 else 16 if resolution >= 64 else 8  # less than 64 px: tests
    found = {(resolution, resolution)}
    for long in range(resolution - resolution % step, 2 * resolution + 1, step):
        short = resolution**2 // long // step * step
        if long > resolution and 2 * short >= resolution:
            found |= {(long, short), (short, long)}
    return sorted(found)


@lru_cache(maxsize=4096)
def nearest(size: Size, resolution: int) -> Size:
    """Of `sizes`, the one whose aspect ratio is nearest (by its logarithm), the largest of equals."""
    aspect = math.log(size[0] / size[1])

    def distance(bucket: Size) -> tuple[float, int]:
        return round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -bucket[0] * bucket[1]

    return min(sizes(resolution), key=distance)


class Buckets:
    """Groups in an order in which each update has one size, whatever it is cut into.

    An update takes the size of a group drawn from all of them, and then its groups in turn from those of that size.
    In n updates, n the number of groups, every group gives its size to one update, so every group is seen equally
    often, ``per_update`` times; a size with fewer groups than an update shows some of them twice in it.

    ``targets``: the size that each group is trained at.
    """

    def __init__(self, targets: Sequence[Size], seed: int) -> None:
        self.targets, self.seed = targets, seed
        self.groups: dict[Size, list[int]] = {}
        for index, target in enumerate(targets):
            self.groups.setdefault(target, []).append(index)
        self._round: tuple[int, list[tuple[Size, int]]] = (-1, [])
        self._epochs: dict[Size, tuple[int, list[int]]] = {}

    def index(self, position: int, per_update: int) -> int:
        """The group at ``position``, which counts the groups drawn since the start. Depends on its arguments alone."""
        update, place = divmod(position, per_update)
        number, turn = divmod(update, len(self.targets))
        target, before = self._turns(number)[turn]
        groups = self.groups[target]
        drawn = (number * len(groups) + before) * per_update + place
        epoch, place = divmod(drawn, len(groups))
        return groups[self._permutation(target, epoch)[place]]

    def _turns(self, number: int) -> list[tuple[Size, int]]:
        """Of each of the n updates of round ``number``: its size, and how often that came before in the round."""
        if self._round[0] != number:
            seen: Counter = Counter()
            turns = []
            for index in permutation(self.seed, len(self.targets), "sizes", number):
                target = self.targets[index]
                turns.append((target, seen[target]))
                seen[target] += 1
            self._round = number, turns
        return self._round[1]

    def _permutation(self, target: Size, epoch: int) -> list[int]:
        if self._epochs.get(target, (-1,))[0] != epoch:
            purpose = "order of {}x{}".format(*target)
            self._epochs[target] = epoch, permutation(self.seed, len(self.groups[target]), purpose, epoch)
        return self._epochs[target][1]
