"""What an update trains on. A feed turns the positions of an update's groups into one `Regression`.

A position counts groups since the start of training. So its group does not depend on the batch size, the number of
processes, or where a run was interrupted. `Offline` reads data; `rollout.feed.OnPolicy` samples, and
`rollout.labelled.Labelled` reads trajectories that people have judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ..problems.regression import Regression

if TYPE_CHECKING:
    from ..data.batches import Batch, Batches


class Feed(Protocol):
    def begin(self, step: int) -> dict[str, float]:
        """Before update ``step``, on all processes together; returns metrics."""

    def regression(self, positions: Sequence[int]) -> Regression | None:
        """The groups at ``positions``; None, on all processes, if there is nothing to train on."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""

    def load(self, state: dict[str, Any]) -> None: ...


class Offline:
    """Groups of the training data, epoch after epoch, through a source of regression problems.

    ``visit(position)`` says which group is drawn at a position, and how often it was before. ``draws``: a group has so
    many draws, which come again (`objective.forward.draws`); None: new ones at each position.
    """

    def __init__(
        self,
        batches: Batches,
        source: Callable[[Batch], Regression],
        visit: Callable[[int], tuple[int, int]],
        draws: int | None = None,
    ) -> None:
        self.batches, self.source, self.visit, self.draws = batches, source, visit, draws

    def begin(self, step: int) -> dict[str, float]:
        return {}

    def regression(self, positions: Sequence[int]) -> Regression:
        visits = [self.visit(position) for position in positions]
        indices = [index for index, _ in visits]
        if self.draws is None:
            return self.source(self.batches.batch(indices, positions))
        numbers = [index * self.draws + visit % self.draws for index, visit in visits]
        return replace(self.source(self.batches.batch(indices, numbers)), numbers=numbers)

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
