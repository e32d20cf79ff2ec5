"""What the votes on each task come to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .store import Vote
from .tasks import Task, Tasks


@dataclass(frozen=True)
class Tally:
    """The votes on a task that count: first ones, without skips. ``bad``: how many say that all pictures are bad."""

    task: Task
    votes: tuple[Vote, ...]

    @property
    def bad(self) -> int:
        return sum(vote.bad for vote in self.votes)


def tallies(tasks: Tasks, votes: Iterable[Vote]) -> list[Tally]:
    """Of every task with a vote that counts, in the order of the tasks."""
    found: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.ranks is not None and not vote.repeat:
            found.setdefault(vote.task, []).append(vote)
    return [Tally(task, tuple(found[task.id])) for task in tasks.all if task.id in found]


def wins(ranks: tuple[int, ...], best_only: bool) -> np.ndarray:
    """(k, k): 1 where the row's picture beat the column's, 1/2 each for a tie. ``best_only``: the vote names the best
    pictures and says nothing of the others among themselves."""
    r = np.asarray(ranks)
    won = (r[:, None] < r[None]) + 0.5 * (r[:, None] == r[None])
    if best_only:
        others = r > 1
        won = np.where(others[:, None] & others[None], 0.0, won)
    np.fill_diagonal(won, 0.0)
    return won


def summed(tally: Tally, best_only: bool) -> np.ndarray:
    """(k, k): the `wins` of all votes. Votes that all are bad count as ties."""
    k = len(tally.task.pictures)
    return sum((wins(vote.ranks, best_only) for vote in tally.votes if vote.ranks), np.zeros((k, k)))
