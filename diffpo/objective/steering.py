"""Several rewards at once, weighed when pictures are made: one LoRA for all weights.

The policy is conditioned on the weights w of K rewards, which lie between 0 and 1 and add up to 1. In training w is
drawn anew for each pair, uniformly, and the better image is the one with more w . reward. So a policy learns the answer
to every trade-off at once (the directions of DPA, Wang et al. 2024, arXiv 2402.18571, with pairs in place of rejection
sampling). At generation the weights are given. The reference does not read them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..common.rng import Draws
from ..common.text import plain
from ..data.groups import Groups


class Steering:
    """The rewards ``names`` of a data set of pairs.

    ``gaps`` (G, K): first image minus second, each in units of its root mean square: equal weights have equal say.
    """

    def __init__(self, names: Sequence[str], gaps: Tensor) -> None:
        self.names = list(names)
        spread = gaps.double().square().mean(0).sqrt()
        if not (spread > 0).all():
            same = self.names[int((spread > 0).int().argmin())]
            raise DiffpoError(f"the reward {same} (data.columns.rewards) is the same for both images of every pair")
        self.gaps = (gaps.double() / spread).float()

    @property
    def header(self) -> dict[str, str]:
        """What a file of the tokens says of them."""
        return {"rewards": json.dumps(self.names)}

    @property
    def scale(self) -> Tensor:
        """What weights are divided by where they enter the network, (K,): their standard deviation in training."""
        k = len(self.names)
        return torch.full((k,), ((k - 1) / (k * k * (k + 1))) ** 0.5)

    def weights(self, draws: Draws) -> Tensor:
        """(n, K), uniform over all that add up to 1."""
        rows = [torch.empty(len(self.names)).exponential_(generator=draw) for draw in draws.generators("steering")]
        found = torch.stack(rows)
        return found / found.sum(1, keepdim=True)

    def condition(self, indices: Sequence[int], draws: Draws) -> dict[str, Tensor]:
        """The policy's further condition, as `Batches.further` takes it."""
        return {"user": centred(self.weights(draws))}

    def preference(self, indices: Sequence[int], draws: Draws) -> Tensor:
        """P(the first image is better) by the weights of each pair: 1, 0, or 1/2 for equal sums; `Batches.judge`."""
        gap = (self.weights(draws) * self.gaps[list(indices)]).sum(1)
        return (gap.sign() + 1) / 2


def centred(weights: Tensor) -> Tensor:
    """Weights (..., K) as the network takes them: 0 for equal ones."""
    return weights - 1 / weights.shape[-1]


def read_rewards(groups: Groups) -> Steering:
    """The steering of the pairs of ``groups``; DiffpoError unless there are two rewards at least."""
    names = groups.columns.rewards
    if len(names) < 2:
        raise DiffpoError(
            f"objective.steered weighs several rewards, but data.columns.rewards names {len(names)}: name two at least"
        )
    both = torch.tensor([group.rewards for group in groups.groups])  # (G, 2, K)
    return Steering(names, both[:, 0] - both[:, 1])


def parse(text: str, names: Sequence[str]) -> Tensor:
    """ "following:0.7 appearance:0.3" as weights (K,) of the rewards ``names``, divided by their sum; those that are
    left out are 0. DiffpoError for other names, negative or zero weights."""
    found = dict.fromkeys(names, 0.0)
    for part in text.split():
        name, _, value = part.rpartition(":")
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if name not in found or not 0 <= weight < float("inf"):
            raise DiffpoError(
                f"--steer {plain(text, 100)}: {plain(part, 60)!r} is not NAME:WEIGHT with a weight from 0 on; the "
                f"rewards of this LoRA are {', '.join(names)}"
            )
        found[name] = weight
    weights = torch.tensor(list(found.values()))
    if not weights.sum() > 0:
        raise DiffpoError(f"--steer {plain(text, 100)}: give one weight above 0 at least")
    return weights / weights.sum()
