"""The order of groups with aspect-ratio buckets: every update has a single size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .order import permutation
from .sizes import Size


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
        return self.visit(position, per_update)[0]

    def visit(self, position: int, per_update: int) -> tuple[int, int]:
        """`index`, and how often its size's groups have all been drawn before."""
        update, place = divmod(position, per_update)
        number, turn = divmod(update, len(self.targets))
        target, before = self._turns(number)[turn]
        groups = self.groups[target]
        drawn = (number * len(groups) + before) * per_update + place
        epoch, place = divmod(drawn, len(groups))
        return groups[self._permutation(target, epoch)[place]], epoch

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
