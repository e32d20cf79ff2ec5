"""Which group comes when: all shuffled, or the easy ones first (Curriculum-DPO, Croitoru et al. 2024, arXiv 2405.13637;
Curry-DPO, Pattnaik et al. 2024, arXiv 2403.07230)."""

from __future__ import annotations

from ..config import Data
from .groups import Groups
from .order import order


class Curriculum:
    """The groups by score gap, the largest (easiest) first, in ``data.curriculum`` parts of equal size; part g = 0, 1,
    ... joins those before it at update g * ``data.curriculum_updates``. One part is plain shuffling.

    Curriculum-DPO's code cuts at equally spaced gaps instead, where an outlier is a part of its own. Raises DiffpoError
    if groups have no scores, or are fewer than the parts.
    """

    def __init__(self, groups: Groups, data: Data, seed: int) -> None:
        self.seed, self.updates = seed, data.curriculum_updates
        self.ranking = groups.by_gap(data.curriculum) if data.curriculum > 1 else range(len(groups))
        self.sizes = [len(groups) * (part + 1) // data.curriculum for part in range(data.curriculum)]

    def index(self, position: int, per_update: int) -> int:
        """The group at ``position``, which counts the groups drawn since the start, ``per_update`` in each update.

        Each stage goes through its groups epoch after epoch, as `order` does. Depends on its arguments alone.
        """
        stage = min(position // per_update // self.updates, len(self.sizes) - 1)
        start = stage * self.updates * per_update
        return self.ranking[order(self.seed, self.sizes[stage], position - start)]
