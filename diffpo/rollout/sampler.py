"""The policy's own sampling: trajectories from noise to an image, and SPO's walks through pools of candidates.

Every draw comes from generators that the caller addresses, one for each row of a batch. So no row depends on the other
rows of its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samplers import Plan, convert

from ..common.errors import DiffpoError
from ..common.rng import normal
from ..config import RolloutSettings
from ..problems.policy import Policy
from ..problems.regression import Conditioning
from ..problems.transitions import Step, sampler_plan, steps_of, without_history
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
        self.steps_in = functools.lru_cache(maxsize=4)(self._steps_in)
        self._plan_in = functools.lru_cache(maxsize=4)(self._plan)

    def _window(self, number: int) -> range | None:
        """The calls with noise in round ``number``: a window that moves on by one call, and begins again at the end."""
        size = self.settings.window
        if size is None:
            return None
        first = number // self.settings.window_rounds % max(1, self.settings.steps - size)  # the last has no noise
        return range(first, first + size)

    def _plan(self, number: int) -> tuple[Plan, list[int]]:
        schedule, prediction = self.family.schedule(), self.family.prediction
        return sampler_plan(self.settings, schedule, prediction, self._window(number))

    def _steps_in(self, number: int) -> list[Step]:
        """The steps of round ``number``; DiffpoError if they have no likelihood."""
        return steps_of(*self._plan_in(number), self.settings)

    def check(self, likelihoods: bool) -> None:
        """DiffpoError unless the plan can be made, and its steps have ``likelihoods`` if they must."""
        self._plan_in(0)
        if likelihoods:
            self._steps_in(0)

    @property
    def steps(self) -> list[Step]:
        """Those of the first round."""
        return self.steps_in(0)

    def predict(self, policy: Policy, t: int, x: Tensor, given: Conditioning) -> Tensor:
        """The network's output at timestep t, (n, C, h, w) float32."""
        return policy.output(x, torch.full((len(x),), t, device=x.device), given).float()

    def trajectories(self, policy: Policy, x: Tensor, draws: Sequence[torch.Generator], given: Conditioning) -> Tensor:
        """(n, C, h, w) noise -> all states (n, steps + 1, C, h, w) on the CPU, x first and x_0 last."""
        return self.walk(policy, x, draws, given, targets=False)[0]

    @torch.no_grad()
    def walk(
        self,
        policy: Policy,
        x: Tensor,
        draws: Sequence[torch.Generator],
        given: Conditioning,
        number: int = 0,
        targets: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """`trajectories` by the plan of round ``number``, and the regression target of each step with noise (0 for the
        others), (n, steps, C, h, w) on the CPU; empty without ``targets``."""
        plan, times = self._plan_in(number)
        steps = self.steps_in(number) if targets else None
        start = normal(draws, x.shape[1:]).to(x) if plan.start[:, 1].any() else None
        state = plan.begin(x, start)
        states, found = [state.input.cpu()], []
        for k, t in enumerate(times):
            noise = normal(draws, x.shape[1:]).to(x) if plan.needs_noise(k) else None
            before, output = state, self.predict(policy, t, state.input, given)
            state = plan.step(k, state, output, noise)
            states.append(state.input.cpu())
            if steps is not None:
                trained = steps[k].transition.std != 0
                target = steps[k].transition.target(before, state.input) if trained else torch.zeros_like(x)
                found.append(target.cpu())
        return torch.stack(states, 1), torch.stack(found, 1) if found else torch.empty(0)

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
        if not without_history(self.steps):
            raise DiffpoError(
                f"objective.rollout.step={settings.step} uses earlier outputs, which the states of a pool lack: choose "
                f"a solver without, such as ddim, flow_sde or euler_ancestral"
            )
        found: list[list] = [[] for _ in captions]
        compared, name = 0, f"objective.rollout.step_scorer={settings.step_scorer}"
        repeated = given.repeat_interleave(pool)
        crowd = [caption for caption in captions for _ in range(pool)]
        noisy = sum(bool(step.transition.std) for step in self.steps)
        last = min(noisy, settings.transitions or noisy)
        out, k = self.predict(policy, self.steps[0].t, x, given), 0
        while k < last:
            if k < settings.start:
                x = self.steps[k].transition.sample(x, out, normal(draws, x.shape[1:]).to(x))
                out, k = self.predict(policy, self.steps[k + 1].t, x, given), k + 1
                continue
            path = [x.repeat_interleave(pool, 0)]
            outs = out.repeat_interleave(pool, 0)
            for at in range(k, min(k + 1 + settings.inner, last)):
                z = normal(draws, (pool, *x.shape[1:])).flatten(0, 1).to(x)
                path.append(self.steps[at].transition.sample(path[-1], outs, z))
                if at + 1 < len(self.steps):
                    outs = self.predict(policy, self.steps[at + 1].t, path[-1], repeated)
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
