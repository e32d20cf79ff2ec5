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
    """The pairs that one prompt's pools gave: M steps, by ``decided`` of the ``pools`` that were compared.

    ``states`` (M, 2, 2, C, h, w) float32 on the CPU: x_t and x_{t-1}, of the best and of the worst; ``steps`` their
    places in the sampler; ``scores`` (M, 2) of the step scorer, best first.
    """

    states: Tensor
    steps: list[int]
    scores: Tensor
    pools: int
    decided: int


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

        From one x_t, ``pool`` next states are drawn, and each goes on by ``inner`` steps of its own. The network gets
        all of them at the step after that, where the scorer judges their x_0 estimates. The best and the worst make a
        pair if p(best) - p(worst) = tanh(gap / 2) is above ``threshold``, with all of the steps that led there. A
        random one of them, whatever its score, goes on with the output that the network has given.

        A last step to sigma = 0 has no noise and so no pool: the last pool is judged by the x_0 that this step returns.
        A last step to the lowest level (``end``) has one, which is judged as finished images, at t = 0.
        """
        settings, pool = self.settings, self.settings.pool
        found: list[list] = [[] for _ in captions]
        compared, name = 0, f"objective.rollout.step_scorer={settings.step_scorer}"
        repeated = given.repeat_interleave(pool)
        crowd = [caption for caption in captions for _ in range(pool)]
        noisy = sum(bool(step.transition.std) for step in self.steps)
        last = min(noisy, settings.transitions or noisy)
        out, k = self.predict(policy, 0, x, given), 0
        while k < last:
            if k < settings.start:
                x = self.steps[k].transition.sample(x, out, normal(draws, x.shape[1:]).to(x))
                out, k = self.predict(policy, k + 1, x, given), k + 1
                continue
            path = [x.repeat_interleave(pool, 0)]
            outs = out.repeat_interleave(pool, 0)
            for at in range(k, min(k + 1 + settings.inner, last)):
                z = normal(draws, (pool, *x.shape[1:])).flatten(0, 1).to(x)
                path.append(self.steps[at].transition.sample(path[-1], outs, z))
                if at + 1 < len(self.steps):
                    outs = self.predict(policy, at + 1, path[-1], repeated)
            x_0, t = self._judged_at(k + len(path) - 1, path[-1], outs)
            scores = finite(scorer.score(path[-1], x_0, t, crowd, repeated.cond), name, crowd).unflatten(0, (-1, pool))
            states = torch.stack(path, 1).unflatten(0, (-1, pool))  # (n, pool, 2 + inner, C, h, w)
            compared += 1
            for row, (best, worst) in enumerate(zip(scores.argmax(1).tolist(), scores.argmin(1).tolist(), strict=True)):
                gap = scores[row, best] - scores[row, worst]
                if torch.tanh(gap / 2) > settings.threshold:
                    found[row].append((states[row, [best, worst]].cpu(), k, scores[row, [best, worst]].cpu()))
            onward = torch.cat([torch.randint(pool, (1,), generator=draw) for draw in draws]).to(x.device)
            rows = torch.arange(len(x), device=x.device)
            x, out, k = states[rows, onward, -1], outs.unflatten(0, (-1, pool))[rows, onward], k + len(path) - 1
        return [_collect(each, compared, x.shape[1:]) for each in found]

    def _judged_at(self, k: int, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 estimates of states x before step k, and their times; after the last step x itself, at t = 0."""
        if k == len(self.steps):
            return x, torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = self.steps[k]
        x_0 = convert(x, out, self.family.prediction, "sample", at.alpha, at.sigma)
        return x_0, torch.full((len(x),), at.t, device=x.device)


def _collect(found: list, compared: int, shape: Sequence[int]) -> Forks:
    """Of pools (states (2, 1 + steps, C, h, w), first step, scores (2,)): a pair for each of their steps."""
    if not found:
        return Forks(torch.empty(0, 2, 2, *shape), [], torch.empty(0, 2), compared, 0)
    states = [part[:, i : i + 2] for part, _, _ in found for i in range(part.shape[1] - 1)]
    steps = [first + i for part, first, _ in found for i in range(part.shape[1] - 1)]
    scores = [each for part, _, each in found for _ in range(part.shape[1] - 1)]
    return Forks(torch.stack(states), steps, torch.stack(scores), compared, len(found))
