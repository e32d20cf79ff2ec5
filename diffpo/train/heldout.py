"""Held-out pair accuracy: does the policy's implicit reward rank pairs that it was not trained on?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..data.batches import Batches
from ..objective.reward import Objective, score
from ..problems.forward import Forward
from ..problems.policy import Policy
from . import distributed
from .metrics import accuracy

if TYPE_CHECKING:
    from accelerate import Accelerator

DRAWS = 4  # timesteps for each pair, one from each quarter of 0..T-1


def spread(size: int, limit: int) -> list[int]:
    """At most ``limit`` of ``size`` pairs, at even distances over the whole source."""
    n = min(limit, size)
    return [i * size // n for i in range(n)]


class HeldOut:
    """A fixed set of (pair, noise, timestep), the same at every measurement and for every number of processes."""

    def __init__(self, batches: Batches, limit: int, rows: int, accelerator: Accelerator) -> None:
        """At most ``limit`` pairs of ``batches``, ``rows`` of them in one forward pass."""
        self.batches, self.rows, self.accelerator = batches, rows, accelerator
        self.n = min(limit, len(batches.groups))
        total = self.n * DRAWS
        self.indices = spread(len(batches.groups), limit)
        self.mine = list(range(total))[accelerator.process_index :: accelerator.num_processes]

    def _portions(self) -> Iterator[tuple[list[int], bool]]:
        """Positions of one forward pass, and whether it counts: the processes that share a sharded network must call it
        equally often."""
        mine = list(self.batches.portions(self.mine, lambda p: self.indices[p // DRAWS], self.rows))
        yield from ((positions, True) for positions in mine)
        if distributed.sharded(self.accelerator):
            count = torch.tensor([len(mine)], device=self.accelerator.device)
            most = self.accelerator.gather(count).max().item()
            yield from [([0], False)] * (most - len(mine))

    @property
    def preferences(self) -> torch.Tensor:
        """(n,) float64: the probability that the first image of each pair is the better one, at least 1/2."""
        groups = self.batches.groups.groups
        return torch.tensor([groups[index].preference for index in self.indices], dtype=torch.float64)

    def measure(self, policy: Policy, objective: Objective) -> dict[str, float]:
        """eval/accuracy: share of pairs whose mean margin over the draws is positive (ties half); eval/margin;
        eval/pairs."""
        margins = self.margins(policy, objective)
        return {
            "eval/accuracy": accuracy(margins).mean().item(),
            "eval/margin": margins.mean().item(),
            "eval/pairs": float(self.n),
        }

    @torch.no_grad()
    def margins(self, policy: Policy, objective: Objective) -> torch.Tensor:
        """(n,) float64: of each pair the mean margin over the draws. Pairs are noised forward, whatever the objective
        trains on. All processes call it alike."""
        source = Forward(policy.family)
        # likelihood ratios of transitions are bounded, those of noised images need not be
        settings = objective.settings.model_copy(update={"clip": None})
        objective = replace(objective, settings=settings, behaviour=None)
        margins = torch.zeros(self.n, dtype=torch.float64)
        width = policy.family.train_timesteps / DRAWS
        for positions, counts in self._portions():
            batch = self.batches.batch(
                [self.indices[position // DRAWS] for position in positions],
                positions,
                purpose="eval",
                timesteps=[(int(p % DRAWS * width), int((p % DRAWS + 1) * width)) for p in positions],
            )
            u = score(policy, objective, source(batch)).margin.cpu().double()
            if counts:
                margins.index_add_(0, torch.tensor([position // DRAWS for position in positions]), u / DRAWS)
        if self.accelerator.num_processes > 1:
            margins = self.accelerator.reduce(margins.to(self.accelerator.device), "sum").cpu()
        return margins
