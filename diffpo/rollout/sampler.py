"""The policy's own sampling: trajectories from noise to an image, and SPO's walks through pools of candidates.

Every draw comes from generators that the caller addresses, one for each row of a batch, so that no row depends on which
others are sampled beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.prediction import convert

from ..config import RolloutSettings
from ..problems.transitions import guided, sampler_steps
from ..scorers.step.base import finite

Conditions = dict[str, Tensor]


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
    """Samples by ``settings`` with classifier-free guidance; x is float32 on the model's device throughout.

    ``autocast``: of the training, for the network alone (not for the scorers).
    """

    def __init__(
        self, settings: RolloutSettings, family: Any, autocast: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        self.settings, self.family, self.autocast = settings, family, autocast
        self.steps = sampler_steps(settings, family.schedule(), family.prediction)

    def predict(
        self, network: torch.nn.Module, k: int, x: Tensor, cond: Conditions, unconditional: Conditions | None
    ) -> Tensor:
        t = torch.full((len(x),), self.steps[k].t, device=x.device)
        free = None if self.settings.guidance == 1 else unconditional
        with self.autocast():
            return guided(self.family, network, x, t, cond, free, self.settings.guidance).float()

    @torch.no_grad()
    def trajectories(
        self,
        network: torch.nn.Module,
        x: Tensor,
        draws: Sequence[torch.Generator],
        cond: Conditions,
        unconditional: Conditions | None,
    ) -> Tensor:
        """(n, C, h, w) noise -> all states (n, steps + 1, C, h, w) on the CPU, x first and x_0 last."""
        states = [x.cpu()]
        for k, step in enumerate(self.steps):
            x = step.mean(x, self.predict(network, k, x, cond, unconditional))
            if step.noise:
                x = x + step.noise * _normal(draws, x.shape[1:]).to(x)
            states.append(x.cpu())
        return torch.stack(states, 1)

    @torch.no_grad()
    def forks(
        self,
        network: torch.nn.Module,
        x: Tensor,
        draws: Sequence[torch.Generator],
        cond: Conditions,
        unconditional: Conditions | None,
        scorer: Any,
        captions: Sequence[str],
    ) -> list[Forks]:
        """SPO's sampler (arXiv 2406.04314, sec. 3.3): from step ``start`` on, ``pool`` next states are drawn from one
        x_t; the network sees all of them at the next step, where the scorer judges their x_0 estimates; best and worst
        make a pair if p(best) - p(worst) = tanh(gap / 2) is above ``threshold``; and a random one of them, whatever its
        score, goes on with the network's output that is already there.

        The step to sigma = 0 has no noise and so no pool: the last pool is judged by the x_0 that this step returns.
        """
        settings, pool = self.settings, self.settings.pool
        found: list[list] = [[] for _ in captions]
        compared, name = 0, f"objective.rollout.step_scorer={settings.step_scorer}"
        repeated = {name: value.repeat_interleave(pool, 0) for name, value in cond.items()}
        empty = unconditional and {name: value.repeat_interleave(pool, 0) for name, value in unconditional.items()}
        crowd = [caption for caption in captions for _ in range(pool)]
        last = min(len(self.steps) - 1, settings.transitions or len(self.steps))
        out = self.predict(network, 0, x, cond, unconditional)
        for k, step in enumerate(self.steps[:last]):
            mean = step.mean(x, out)
            if k < settings.start or not step.noise:
                x = mean + step.noise * _normal(draws, x.shape[1:]).to(x)
                out = self.predict(network, k + 1, x, cond, unconditional)
                continue
            z = _normal(draws, (pool, *x.shape[1:])).to(x)
            candidates = (mean[:, None] + step.noise * z).flatten(0, 1)
            outs = self.predict(network, k + 1, candidates, repeated, empty)
            at = self.steps[k + 1]
            x_0 = convert(candidates, outs, self.family.prediction, "sample", at.alpha, at.sigma)
            t = torch.full((len(candidates),), at.t, device=x.device)
            scores = finite(scorer.score(candidates, x_0, t, crowd, repeated), name, crowd).unflatten(0, (-1, pool))
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


def _normal(draws: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    return torch.stack([torch.randn(tuple(shape), generator=draw) for draw in draws])


def _collect(found: list, compared: int, shape: Sequence[int]) -> Forks:
    if not found:
        return Forks(torch.empty(0, 3, *shape), [], torch.empty(0, 2), compared)
    states, steps, scores = zip(*found, strict=True)
    return Forks(torch.stack(states), list(steps), torch.stack(scores), compared)
