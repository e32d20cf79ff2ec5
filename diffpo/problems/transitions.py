"""Steps of the policy's own sampler as regression problems (D3PO, SPO, PSO).

One step of a stochastic sampler is x' = a x + b out + s z with z ~ N(0, 1), whatever the network predicts. The Gaussian
log-likelihood ratio of a step, as a mean over the dimensions, is then that of a regression,

    log p_policy(x'|x) - log p_ref(x'|x) = k (|out_ref - y|^2 - |out_policy - y|^2),  y = (x' - a x)/b,  k = b^2/2s^2,

exactly. D3PO (Yang et al. 2023, arXiv 2311.13231) and SPO (Liang et al. 2024, arXiv 2406.04314) write the left side.
`samplers.Plan.transition` gives the Gaussian of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samplers import Grid, Plan, RectifiedFlow, VPDiscrete, build_plan
from samplers.solvers.renoise import renoise
from samplers.transition import Transition

from ..common.errors import DiffpoError
from ..config import RolloutSettings
from ..data.judgement import Judgement
from .regression import Conditioning, Regression


@dataclass(frozen=True)
class Step:
    """One model call of the sampler at the model's timestep ``t``, where the levels are ``alpha`` and ``sigma``;
    ``transition`` is the Gaussian that the next state is drawn from."""

    t: int
    alpha: float
    sigma: float
    transition: Transition


def sampler_plan(
    settings: RolloutSettings, schedule: VPDiscrete | RectifiedFlow, prediction: str
) -> tuple[Plan, list[int]]:
    """``settings``' sampler on the trailing grid of the model's timesteps, and its timesteps. It ends at sigma = 0 or,
    by ``end``, at the lowest level that the model was trained at.

    ``renoise``: x' = alpha' x_0 + sigma' z with the network's x_0, as distilled models (LCM, DMD2, Turbo) sample.
    """
    total = schedule.num_train_timesteps if isinstance(schedule, RectifiedFlow) else len(schedule.betas)
    if settings.steps > total:
        raise DiffpoError(f"objective.rollout.steps={settings.steps} must be at most {total}, the model's timesteps")
    times = np.arange(total, 0, -total / settings.steps).round()[: settings.steps]  # diffusers' trailing spacing
    if settings.end == "lowest":
        grid = Grid(schedule, times=[*times / total, 1 / total], end="t_end")
    else:
        grid = Grid(schedule, times=times / total, end="zero")
    solver, options = (renoise, {}) if settings.step == "renoise" else ("ddim", {"eta": settings.eta})
    plan = build_plan(schedule, solver, settings.steps, grid, prediction, **options)
    return plan, [int(time) - 1 for time in times]


def sampler_steps(settings: RolloutSettings, schedule: VPDiscrete | RectifiedFlow, prediction: str) -> list[Step]:
    """The steps of `sampler_plan`. One that ends at sigma = 0 has no noise, so it is nothing to train on."""
    plan, times = sampler_plan(settings, schedule, prediction)
    levels = zip(times, plan.alpha, plan.sigma, strict=False)  # the plan's last one is the end
    return [Step(time, float(alpha), float(sigma), plan.transition(k)) for k, (time, alpha, sigma) in enumerate(levels)]


@dataclass(frozen=True)
class StepPair:
    """A preferred and a rejected step of one prompt at one noise level.

    ``x`` and ``x_next``: each member's state before and after, (C, h, w) float32 on the CPU, the chosen one first.
    """

    prompt: int
    step: int
    x: tuple[Tensor, Tensor]
    x_next: tuple[Tensor, Tensor]
    scores: tuple[float, ...] | None = None
    preference: float = 1.0


def regression(
    pairs: Sequence[StepPair],
    steps: Sequence[Step],
    condition: Callable[[Sequence[int]], Conditioning],
    device: torch.device | str,
) -> Regression:
    """n pairs of steps as a Regression; ``condition(prompts)`` gives the conditioning of prompts."""
    own = [steps[pair.step] for pair in pairs] * 2
    x = torch.stack([pair.x[member] for member in (0, 1) for pair in pairs])
    x_next = torch.stack([pair.x_next[member] for member in (0, 1) for pair in pairs])
    target = torch.stack([step.transition.target(*each) for step, *each in zip(own, x, x_next, strict=True)])
    return Regression(
        x_t=x.to(device),
        t=torch.tensor([step.t for step in own], device=device),
        target=target.to(device),
        conditioning=condition([pair.prompt for pair in pairs] * 2),
        judgement=Judgement.of(pairs, 2, device),
        weight=torch.tensor([step.transition.weight for step in own], dtype=torch.float32, device=device),
    )
