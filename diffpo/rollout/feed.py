"""On-policy training: every so many updates the policy samples a round, which is judged and trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..common.worker import Worker
from ..config.choices import TRANSITIONS
from ..data.order import order
from ..problems.regression import Regression
from ..weights import trained
from .groups import Item, harvest
from .round import Rounds, by_reference


class OnPolicy:
    """A feed (train/feeds.py) of the policy's own samples: a round lasts for ``rollout.updates`` updates.

    Round r belongs to updates r * updates, r * updates + 1 and so on. All its groups are visited once before any is
    visited again. Groups are the same on all processes, whichever process sampled them. After a resume the round is
    sampled again by the weights that sampled it before.
    """

    def __init__(self, rounds: Rounds, worker: Worker, per_update: int) -> None:
        self.rounds, self.worker = rounds, worker
        self.settings, self.seed, self.network = rounds.settings, rounds.seed, rounds.policy.network
        self.groups_per_round = per_update * self.settings.rollout.updates
        self.items: list[Item] = []
        self.round: int | None = None
        self._step = -1
        self._start: dict[str, Any] = {}  # what sampled the round

    def begin(self, step: int) -> dict[str, float]:
        self._step = step
        number = step // self.settings.rollout.updates
        if number == self.round:
            return {}
        self._start = {"policy": _copy(trained.of(self.network).state())}
        if by_reference(self.settings):
            self._start["reference"] = _copy(self.rounds.reference.state())
        return self._fill(number)

    def _fill(self, number: int) -> dict[str, float]:
        """Sample round ``number``; collective."""
        rounds, rollout = self.rounds, self.settings.rollout
        places = range(self.worker.index, rollout.prompts, self.worker.count)
        share = rounds.sample(number, places, self.worker.quiet)
        records = sorted(self.worker.gather(share), key=lambda record: record.place)
        steps = rounds.walker.steps_in(number) if self.settings.source in TRANSITIONS else []
        self.items, metrics = harvest(records, self.settings, steps, rounds.names)
        self.round = number
        return metrics

    def regression(self, positions: Sequence[int]) -> Regression | None:
        if not self.items:
            return None
        places = [position % self.groups_per_round for position in positions]
        return self.rounds.regression(visited(self.items, self.seed, self.round or 0, places), positions)

    def state(self) -> dict[str, Any]:
        """What it takes to sample the round again, unless it is over."""
        if self.round is None or (self._step + 1) // self.settings.rollout.updates != self.round:
            return {}
        return {"round": self.round, **self._start}

    def load(self, state: dict[str, Any]) -> None:
        """Put `state()` back, after policy and reference; collective."""
        if "round" not in state:
            return
        self._start = {name: weights for name, weights in state.items() if name != "round"}
        with self._as_then():
            self._fill(state["round"])

    @contextlib.contextmanager
    def _as_then(self) -> Iterator[None]:
        """Policy (and reference, where it samples) with the weights that sampled the round."""
        reference = self.rounds.reference
        now, now_reference = _copy(trained.of(self.network).state()), _copy(reference.state())
        try:
            trained.of(self.network).set_state(self._start["policy"])
            if "reference" in self._start:
                reference.load(self._start["reference"])
            yield
        finally:
            trained.of(self.network).set_state(now)
            if "reference" in self._start:
                reference.load(now_reference)


T = TypeVar("T")


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def visited(items: Sequence[T], seed: int, number: int, places: Sequence[int]) -> list[T]:
    """The items at ``places`` of round ``number``: all are visited once in a random order, then all again."""
    return [items[order(seed, len(items), place, f"rollout {number} order")] for place in places]
