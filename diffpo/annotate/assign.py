"""Who is shown what next, and on which side. Everything follows from the seed and the votes, so a restart changes
nothing."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from heapq import nsmallest
from typing import Literal

from .store import Vote
from .tasks import Task

GAP = 10  # tasks between a pair and its repetition, as long as there are others
HOLD = 600.0  # s that a task which was sent to somebody counts as voted on
PRIOR = 2.0  # votes that a prior of `tasks.Task` counts as
Policy = Literal["balanced", "active"]


@dataclass(frozen=True)
class Plan:
    """How tasks are assigned.

    Attributes:
        per_task: annotators who vote on each task.
        repeat: share of an annotator's tasks that are asked again.
        assign: balanced, the least voted task first; active, the most uncertain one first.
    """

    per_task: int = 1
    repeat: float = 0.05
    assign: Policy = "balanced"
    seed: int = 0


@dataclass(frozen=True)
class Assignment:
    """A task as it is shown: its pictures in ``order``. ``repeat``: 1 if it is asked for the second time."""

    task: Task
    repeat: int
    order: tuple[int, ...]


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on ``parts`` alone."""
    value = blake2b("\0".join(map(str, parts)).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(value, "big") / 2**64


def order(seed: int, annotator: str, task: Task, repeat: int) -> tuple[int, ...]:
    """The sides: a random permutation for each annotator, task and repetition."""
    numbers = range(len(task.pictures))
    return tuple(sorted(numbers, key=lambda k: uniform(seed, "side", annotator, task.id, repeat, k)))


@lru_cache(2**17)
def is_repeated(plan: Plan, annotator: str, task: str) -> bool:
    return uniform(plan.seed, "repeat", annotator, task) < plan.repeat


def uncertainty(task: Task, votes: Sequence[Vote]) -> float:
    """The variance of the posterior of who wins.

    Of a pair it is that of Beta(2p + w, 2(1 - p) + l), for w wins, l losses, ties half each, and the prior p. Of a set
    it is the summed variance of a Dirichlet distribution over which picture is the best, uniform at first.
    """
    k = len(task.pictures)
    shares = [PRIOR * task.prior, PRIOR * (1 - task.prior)] if k == 2 else [PRIOR / k] * k
    for vote in votes:
        if vote.ranks is not None and not vote.repeat:
            best = [place for place, rank in enumerate(vote.ranks) if rank == 1]
            for place in best:
                shares[place] += 1 / len(best)
    total = sum(shares)
    return sum(a / total * (1 - a / total) for a in shares) / (total + 1) / (2 if k == 2 else 1)


@dataclass
class Desk:
    """Which votes there are, and who holds which task now. Not safe for threads: one at a time.

    `next` never gives an annotator a task twice, except the repetitions, and no task to more than ``plan.per_task``
    annotators, unless they hold it for longer than `HOLD`.
    """

    tasks: Sequence[Task]
    plan: Plan
    votes: dict[tuple[str, str, int], Vote] = field(default_factory=dict)  # by annotator, task, repeat
    by_task: dict[str, dict[str, Vote]] = field(default_factory=lambda: defaultdict(dict))  # first votes, by annotator
    turns: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))  # number of a first vote
    held: dict[str, dict[str, float]] = field(default_factory=dict)  # since when, by task and annotator
    counts: Counter[str] = field(default_factory=Counter)  # by task: first votes that are no skips
    mine: Counter[str] = field(default_factory=Counter)  # by annotator: votes, repetitions and skips too
    done: int = 0  # votes of `counts`, at most ``plan.per_task`` of each task

    def __post_init__(self) -> None:
        self.known = {task.id: task for task in self.tasks}
        self._shuffled = lru_cache(256)(self._shuffle)
        self._doubts: dict[str, float] = {}
        self._levels = Counter({0: len(self.known)})  # how many tasks have so many votes

    def put(self, vote: Vote) -> None:
        """Count a vote, in place of an earlier one on the same."""
        key = (vote.annotator, vote.task, vote.repeat)
        if earlier := self.votes.get(key):
            self._add(earlier, -1)
        self.votes[key] = vote
        if holders := self.held.get(vote.task):
            holders.pop(vote.annotator, None)
        if not vote.repeat:
            turns = self.turns[vote.annotator]
            turns.setdefault(vote.task, next(reversed(turns.values()), 0) + 1)
            self.by_task[vote.task][vote.annotator] = vote
        self._add(vote, 1)

    def take_back(self, annotator: str, task: str, repeat: int) -> None:
        """Forget a vote that was undone."""
        if not (vote := self.votes.pop((annotator, task, repeat), None)):
            return
        if not repeat:
            self.by_task[task].pop(annotator, None)
            self.turns[annotator].pop(task, None)
        self._add(vote, -1)

    def _add(self, vote: Vote, sign: int) -> None:
        self.mine[vote.annotator] += sign
        self._doubts.pop(vote.task, None)
        if vote.ranks is not None and not vote.repeat:
            before = self.counts[vote.task]
            self.counts[vote.task] = after = before + sign
            self._levels[before] -= 1
            self._levels[after] += 1
            self.done += min(self.plan.per_task, after) - min(self.plan.per_task, before)

    def next(self, annotator: str, n: int, have: Sequence[str] = (), now: float | None = None) -> list[Assignment]:
        """Up to ``n`` tasks for an annotator, who has those of ``have`` ("ID" or "ID:1" for a repetition) already."""
        now, without = time.monotonic() if now is None else now, {*have}
        chosen = [(each, 1) for each in self._due(annotator, without)][:n]
        fresh = self._fresh(annotator, n - len(chosen), without, now)
        chosen += [(each, 0) for each in fresh]
        if len(chosen) < n and all(":" in each for each in have):  # nothing new is left
            due = [each for each in self._due(annotator, without, 1) if (each, 1) not in chosen]
            chosen += [(each, 1) for each in due[: n - len(chosen)]]
        for each in fresh:
            self.held.setdefault(each, {})[annotator] = now
        return [
            Assignment(self.known[each], repeat, order(self.plan.seed, annotator, self.known[each], repeat))
            for each, repeat in chosen
        ]

    def _due(self, annotator: str, without: Collection[str], gap: int = GAP) -> list[str]:
        """Tasks to be asked again now: voted on at least ``gap`` tasks ago."""
        turns = self.turns[annotator]
        last = next(reversed(turns.values()), 0)
        return [
            task
            for task, turn in turns.items()
            if last - turn >= gap
            and is_repeated(self.plan, annotator, task)
            and f"{task}:1" not in without
            and (annotator, task, 1) not in self.votes
            and self.by_task[task][annotator].ranks is not None
        ]

    def _fresh(self, annotator: str, n: int, without: Collection[str], now: float) -> list[str]:
        """Tasks that the annotator has not seen, by the policy."""
        if n <= 0:
            return []
        seen, active, found, best = self.turns[annotator], self.plan.assign == "active", [], 0
        fewest = min((votes for votes, tasks in self._levels.items() if tasks), default=0)
        for rank, task in enumerate(self._shuffled(annotator)):
            if task in seen or task in without:
                continue
            count = self.counts[task]
            if holders := self.held.get(task):
                count += sum(who != annotator and now - since < HOLD for who, since in holders.items())
            if count < self.plan.per_task:
                found.append((-self._doubt(task) if active else 0.0, count, rank, task))
                best += not active and count == fewest
            if best == n:  # none that follows can be before these
                break
        return [task for *_, task in nsmallest(n, found)]

    def _doubt(self, task: str) -> float:
        if task not in self._doubts:
            self._doubts[task] = uncertainty(self.known[task], [*self.by_task[task].values()])
        return self._doubts[task]

    def _shuffle(self, annotator: str) -> list[str]:
        return sorted(self.known, key=lambda task: uniform(self.plan.seed, "turn", annotator, task))

    def progress(self, annotator: str) -> dict[str, int]:
        """For the page: votes of this annotator and of all, and how many are wanted."""
        wanted = self.plan.per_task * len(self.tasks)
        return {"mine": self.mine[annotator], "done": self.done, "wanted": wanted}
