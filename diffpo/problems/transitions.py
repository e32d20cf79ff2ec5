"""Transitions of the policy's own sampler as regression problems (D3PO, SPO, PSO).

One step of a stochastic sampler is x' = a x + b out + s z with z ~ N(0, 1), whatever the network predicts. The Gaussian
log-likelihood ratio of a transition, as a mean over the dimensions, is then that of a regression,

    log p_policy(x'|x) - log p_ref(x'|x) = k (|out_ref - y|^2 - |out_policy - y|^2),  y = (x' - a x)/b,  k = b^2/2s^2,

exactly. D3PO (Yang et al. 2023, arXiv 2311.13231) and SPO (Liang et al. 2024, arXiv 2406.04314) write the left side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers import Grid, RectifiedFlow, build_plan
from samplers.plan import ANCHOR, HISTORY, NOISE
from samplers.prediction import conversion

from ..common.errors import DiffpoError
from ..config import RolloutSettings
from .regression import Regression


@dataclass(frozen=True)
class Step:
    """One model call of the sampler: ``t`` is the model's timestep, ``alpha`` and ``sigma`` are the levels there,
    and x' = of_x x + of_out out + noise z."""

    t: int
    alpha: float
    sigma: float
    of_x: float
    of_out: float
    noise: float

    def mean(self, x: Tensor, out: Tensor) -> Tensor:
        return self.of_x * x + self.of_out * out.to(x.dtype)

    def target(self, x: Tensor, x_next: Tensor) -> Tensor:
        """What the network would have had to return for x_next without noise."""
        return (x_next - self.of_x * x) / self.of_out

    @property
    def weight(self) -> float:
        """k: turns squared errors (means over the dimensions) into log-likelihood ratios (such means too)."""
        return self.of_out**2 / (2 * self.noise**2)


def sampler_steps(settings: RolloutSettings, schedule: Any, prediction: str) -> list[Step]:
    """The steps of ``settings``' sampler on the trailing grid of the model's timesteps, from noise to data. The last
    one ends at sigma = 0: without noise, and so no transition to train on.

    ``renoise``: x' = alpha' x_0 + sigma' z with the network's x_0, as distilled models (LCM, DMD2, Turbo) sample.
    """
    total = schedule.num_train_timesteps if isinstance(schedule, RectifiedFlow) else len(schedule.betas)
    if settings.steps > total:
        raise DiffpoError(f"objective.rollout.steps={settings.steps} is more than the model's {total} timesteps")
    times = np.arange(total, 0, -total / settings.steps).round()[: settings.steps]  # diffusers' trailing spacing
    grid = Grid(schedule, times=times / total, end="zero")
    plan = build_plan(schedule, "ddim", settings.steps, grid, prediction, eta=settings.eta)
    steps = []
    for k in range(len(plan)):
        alpha, sigma = float(plan.alpha[k]), float(plan.sigma[k])
        if settings.step == "renoise":
            of_x, of_out = (plan.alpha[k + 1] * c for c in conversion(prediction, "sample", alpha, sigma))
            noise = plan.sigma[k + 1]
        else:
            row, (read_x, read_out) = plan.rows[k][0], plan.reads[k]
            of_x, of_out, noise = row[ANCHOR] + row[HISTORY] * read_x, row[HISTORY] * read_out, row[NOISE]
        steps.append(Step(int(times[k]) - 1, alpha, sigma, float(of_x), float(of_out), float(noise)))
    return steps


def guided(
    family: Any,
    network: torch.nn.Module,
    x_t: Tensor,
    t: Tensor,
    cond: dict[str, Tensor],
    unconditional: dict[str, Tensor] | None,
    guidance: float,
) -> Tensor:
    """The network's output (n, C, h, w), with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) if there
    are ``unconditional`` conditions."""
    if unconditional is None:
        return family.predict(network, x_t, t, cond)
    both = {name: torch.cat([unconditional[name], value]) for name, value in cond.items()}
    empty, prompted = family.predict(network, x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
    return empty + guidance * (prompted - empty)


@dataclass(frozen=True)
class Transition:
    """A preferred and a rejected step of one prompt at one noise level.

    ``x`` and ``x_next``: each member's state before and after, (C, h, w) float32 on the CPU, the chosen one first.
    """

    prompt: int
    step: int
    x: tuple[Tensor, Tensor]
    x_next: tuple[Tensor, Tensor]
    scores: tuple[float, float] | None = None
    preference: float = 1.0


Conditions = Callable[[Sequence[int]], tuple[dict[str, Tensor], dict[str, Tensor]]]


def regression(
    items: Sequence[Transition], steps: Sequence[Step], conditions: Conditions, guidance: float, device: Any
) -> Regression:
    """n transitions as a Regression of n pairs; ``conditions(prompts)`` gives those of prompts and of the empty one."""
    own = [steps[item.step] for item in items] * 2
    x = torch.stack([item.x[member] for member in (0, 1) for item in items])
    x_next = torch.stack([item.x_next[member] for member in (0, 1) for item in items])
    target = torch.stack([step.target(*each) for step, *each in zip(own, x, x_next, strict=True)])
    cond, unconditional = conditions([item.prompt for item in items] * 2)
    scores = None
    if items[0].scores is not None:
        scores = torch.tensor([item.scores for item in items], device=device).T
    return Regression(
        x_t=x.to(device),
        t=torch.tensor([step.t for step in own], device=device),
        target=target.to(device),
        cond=cond,
        preference=torch.tensor([item.preference for item in items], device=device),
        scores=scores,
        weight=torch.tensor([step.weight for step in own], dtype=torch.float32, device=device),
        guidance=guidance,
        unconditional=None if guidance == 1 else unconditional,
    )
