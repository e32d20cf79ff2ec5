"""The order of groups: shuffled, or easy ones first (Curriculum-DPO, Croitoru et al. 2024, arXiv 2405.13637; Curry-DPO,
Pattnaik et al. 2024, arXiv 2403.07230)."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Data
from .groups import Groups
from .order import order


class Curriculum:
    """Groups sorted by score gap, the largest (easiest) first, in ``data.curriculum`` parts of equal size. Training
    starts with the first part; part g is added at update g * ``data.curriculum_updates``, or replaces the one before
    unless ``data.curriculum_keeps`` (Curry-DPO's stages). One part is plain shuffling.

    Curriculum-DPO's code splits at equally spaced gaps instead, where a single outlier becomes a part. DiffpoError if
    groups have no scores, or if there are fewer groups than parts.
    """

    def __init__(self, groups: Groups, data: Data, seed: int) -> None:
        self.seed, self.updates = seed, data.curriculum_updates
        self.ranking: Sequence[int] = groups.by_gap(data.curriculum) if data.curriculum > 1 else range(len(groups))
        ends = [len(groups) * part // data.curriculum for part in range(data.curriculum + 1)]
        starts = [0] * data.curriculum if data.curriculum_keeps else ends[:-1]
        self.parts = [range(*each) for each in zip(starts, ends[1:], strict=True)]  # of the ranking, in each stage

    def index(self, position: int, per_update: int) -> int:
        """The group drawn at ``position``, counted from the start of training; ``per_update`` groups are one update.

        Each stage draws its groups epoch after epoch, as `order` does. Depends on its arguments alone.
        """
        return self.visit(position, per_update)[0]

    def visit(self, position: int, per_update: int) -> tuple[int, int]:
        """`index`, and the number of the epoch, from 0 in each stage."""
        stage = min(position // per_update // self.updates, len(self.parts) - 1)
        part, start = self.parts[stage], stage * self.updates * per_update
        drawn = position - start
        return self.ranking[part[order(self.seed, len(part), drawn)]], drawn // len(part)
