"""The policy's own sampling: trajectories from noise to an image, and SPO's walks through pools of candidates.

Every draw comes from generators that the caller addresses, one for each row of a batch. So no row depends on the other
rows of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samplers import convert

from ..common.rng import normal
from ..config import RolloutSettings
from ..problems.policy import Policy
from ..problems.regression import Conditioning
from ..problems.transitions import sampler_steps
from ..scorers.step.base import StepScorer, finite

if TYPE_CHECKING:
    from ..models.family import Family


@dataclass(frozen=True)
class Forks:
    """The pairs that one prompt's pools gave: M steps, of ``pools`` that were compared.

    ``states`` (M, 3, C, h, w) float32 on the CPU: x_t, the best and the worst x_{t-1}; ``steps`` their places in the
    sampler; ``scores`` (M, 2) of the step scorer, best first.
    """

    states: Tensor
    steps: list[int]
    scores: Tensor
    pools: int


class Walker:
    """Samples by ``settings``; x is float32 on the policy's device throughout.

    Draws come from one generator for each row. ``given`` is the conditioning of the rows, with guidance or without.
    """

    def __init__(self, settings: RolloutSettings, family: Family) -> None:
        self.settings, self.family = settings, family
        self.steps = sampler_steps(settings, family.schedule(), family.prediction)

    def predict(self, policy: Policy, k: int, x: Tensor, given: Conditioning) -> Tensor:
        """The network's output at step k, (n, C, h, w) float32."""
        return policy.output(x, torch.full((len(x),), self.steps[k].t, device=x.device), given).float()

    @torch.no_grad()
    def trajectories(self, policy: Policy, x: Tensor, draws: Sequence[torch.Generator], given: Conditioning) -> Tensor:
        """(n, C, h, w) noise -> all states (n, steps + 1, C, h, w) on the CPU, x first and x_0 last."""
        states = [x.cpu()]
        for k, step in enumerate(self.steps):
            noise = normal(draws, x.shape[1:]).to(x) if step.transition.std else None
            x = step.transition.sample(x, self.predict(policy, k, x, given), noise)
            states.append(x.cpu())
        return torch.stack(states, 1)

    @torch.no_grad()
    def forks(
        self,
        policy: Policy,
        x: Tensor,
        draws: Sequence[torch.Generator],
        given: Conditioning,
        scorer: StepScorer,
        captions: Sequence[str],
    ) -> list[Forks]:
        """SPO's sampler (arXiv 2406.04314, sec. 3.3), from step ``start`` on.

        From one x_t, ``pool`` next states are drawn. The network gets all of them at the next step, where the scorer
        judges their x_0 estimates. The best and the worst make a pair if p(best) - p(worst) = tanh(gap / 2) is above
        ``threshold``. A random one of them, whatever its score, goes on with the output that the network has given.

        The step to sigma = 0 has no noise and so no pool: the last pool is judged by the x_0 that this step returns.
        """
        settings, pool = self.settings, self.settings.pool
        found: list[list] = [[] for _ in captions]
        compared, name = 0, f"objective.rollout.step_scorer={settings.step_scorer}"
        repeated = given.repeat_interleave(pool)
        crowd = [caption for caption in captions for _ in range(pool)]
        last = min(len(self.steps) - 1, settings.transitions or len(self.steps))
        out = self.predict(policy, 0, x, given)
        for k, step in enumerate(self.steps[:last]):
            mean, std = step.transition.mean(x, out), step.transition.std
            if k < settings.start or not std:
                x = mean + std * normal(draws, x.shape[1:]).to(x)
                out = self.predict(policy, k + 1, x, given)
                continue
            z = normal(draws, (pool, *x.shape[1:])).to(x)
            candidates = (mean[:, None] + std * z).flatten(0, 1)
            outs = self.predict(policy, k + 1, candidates, repeated)
            at = self.steps[k + 1]
            x_0 = convert(candidates, outs, self.family.prediction, "sample", at.alpha, at.sigma)
            t = torch.full((len(candidates),), at.t, device=x.device)
            scores = finite(scorer.score(candidates, x_0, t, crowd, repeated.cond), name, crowd).unflatten(
                0, (-1, pool)
            )
            candidates, outs = candidates.unflatten(0, (-1, pool)), outs.unflatten(0, (-1, pool))
            compared += 1
            for row, (best, worst) in enumerate(zip(scores.argmax(1).tolist(), scores.argmin(1).tolist(), strict=True)):
                gap = scores[row, best] - scores[row, worst]
                if torch.tanh(gap / 2) > settings.threshold:
                    states = torch.stack([x[row], candidates[row, best], candidates[row, worst]]).cpu()
                    found[row].append((states, k, scores[row, [best, worst]].cpu()))
            onward = torch.cat([torch.randint(pool, (1,), generator=draw) for draw in draws]).to(x.device)
            rows = torch.arange(len(x), device=x.device)
            x, out = candidates[rows, onward], outs[rows, onward]
        return [_collect(each, compared, x.shape[1:]) for each in found]


def _collect(found: list, compared: int, shape: Sequence[int]) -> Forks:
    if not found:
        return Forks(torch.empty(0, 3, *shape), [], torch.empty(0, 2), compared)
    states, steps, scores = zip(*found, strict=True)
    return Forks(torch.stack(states), list(steps), torch.stack(scores), compared)
