"""Steps of the policy's own sampler as regression problems (D3PO, SPO, PSO, DDPO, GRPO).

One step of a stochastic sampler is x' = a x + b out + s z with z ~ N(0, 1), whatever the network predicts. The Gaussian
log-likelihood ratio of a step, as a mean over the dimensions, is then that of a regression,

    log p_policy(x'|x) - log p_ref(x'|x) = k (|out_ref - y|^2 - |out_policy - y|^2),  y = (x' - a x)/b,  k = b^2/2s^2,

exactly. D3PO (Yang et al. 2023, arXiv 2311.13231) and SPO (Liang et al. 2024, arXiv 2406.04314) write the left side.
`samplers.Plan.transition` gives the Gaussian of each step.

In a multistep sampler `a x` stands for all of the mean but the newest output, the outputs of earlier calls included.
They are those of sampling, so they are constants: the gradient goes through the newest output only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from samplers import Grid, Plan, RectifiedFlow, VPDiscrete, build_plan
from samplers.grid import IntervalsError
from samplers.solvers import find_solver
from samplers.solvers.renoise import renoise
from samplers.transition import Transition

from ..common.errors import DiffpoError
from ..config import RolloutSettings
from ..data.judgement import Judgement
from .regression import Conditioning, Regression

BETWEEN = (
    "calls the model between the timesteps: choose a solver with one call per step, such as ddim, flow_sde, dpmpp or "
    "euler_ancestral"
)
NOISE = ("eta", "amount", "tau")  # options that are a solver's amount of noise, 0 for its ODE


@dataclass(frozen=True)
class Step:
    """One model call of the sampler at the model's timestep ``t``, where the levels are ``alpha`` and ``sigma``;
    ``transition`` is the Gaussian that the next state is drawn from."""

    t: int
    alpha: float
    sigma: float
    transition: Transition


def sampler_plan(
    settings: RolloutSettings, schedule: VPDiscrete | RectifiedFlow, prediction: str, window: range | None = None
) -> tuple[Plan, list[int]]:
    """``settings``' sampler on the trailing grid of the model's timesteps, and its timesteps. It ends at sigma = 0 or,
    by ``end``, at the lowest level that the model was trained at.

    ``renoise``: x' = alpha' x_0 + sigma' z with the network's x_0, as distilled models (LCM, DMD2, Turbo) sample.
    ``window``: the calls with noise; the others are the solver's without noise (MixGRPO). None: all.

    Raises DiffpoError that names the key: more steps than timesteps, an unknown solver or option, a solver that calls
    the model between the timesteps.
    """
    total = schedule.num_train_timesteps if isinstance(schedule, RectifiedFlow) else len(schedule.betas)
    if settings.steps > total:
        raise DiffpoError(f"objective.rollout.steps={settings.steps} must be at most {total}, the model's timesteps")
    times = np.arange(total, 0, -total / settings.steps).round()[: settings.steps]  # diffusers' trailing spacing
    if settings.end == "lowest":
        grid = Grid(schedule, times=[*times / total, 1 / total], end="t_end")
    else:
        grid = Grid(schedule, times=times / total, end="zero")
    options = {"eta": settings.eta} if settings.step == "ddim" else settings.step_options
    solver = renoise if settings.step == "renoise" else settings.step  # it has no name in samplers

    def built(options: dict) -> Plan:
        return build_plan(schedule, solver, settings.steps, grid, prediction, **options)

    try:
        plan = built(options)
        if window is not None:
            plan = _within(window, plan, built({**options, _amount(settings.step): 0.0}))
    except IntervalsError:
        raise DiffpoError(f"objective.rollout.step={settings.step} {BETWEEN}") from None
    except (ValueError, TypeError) as error:
        raise DiffpoError(f"objective.rollout.step={settings.step}: {error}") from None
    if len(plan) != settings.steps or not np.array_equal(plan.t[:-1], times / total):
        raise DiffpoError(f"objective.rollout.step={settings.step} {BETWEEN}")
    return plan, [int(time) - 1 for time in times]


def _amount(solver: str) -> str:
    """The option that is the solver's amount of noise."""
    known = () if solver == "renoise" else inspect.signature(find_solver(solver)).parameters
    for name in NOISE:
        if name in known:
            return name
    raise ValueError(f"its noise cannot be turned off, which rollout.window needs: use {', '.join(NOISE)} of another")


def _within(window: range, plan: Plan, quiet: Plan) -> Plan:
    """The rows of ``plan`` in ``window`` and those of ``quiet`` elsewhere; the networks' outputs mean the same."""
    if plan.rows.shape != quiet.rows.shape or not np.array_equal(plan.reads, quiet.reads):
        raise ValueError("it takes other quantities with noise than without, so rollout.window is not possible")
    inside = np.isin(np.arange(len(plan)), window)[:, None, None]
    return replace(plan, rows=np.where(inside, plan.rows, quiet.rows))


def steps_of(plan: Plan, times: Sequence[int], settings: RolloutSettings) -> list[Step]:
    """The steps of a `sampler_plan`. The last one ends at sigma = 0. It has no noise, so it is nothing to train on.

    Raises DiffpoError that names the key: the draw of a step is no single Gaussian, or no step has noise.
    """
    levels = zip(times, plan.alpha, plan.sigma, strict=False)  # the plan's last one is the end
    try:
        found = [Step(t, float(alpha), float(sigma), plan.transition(k)) for k, (t, alpha, sigma) in enumerate(levels)]
    except ValueError as error:
        raise DiffpoError(f"objective.rollout.step={settings.step}: {error}") from None
    if not any(step.transition.std for step in found[: settings.transitions]):
        raise DiffpoError(
            f"objective.rollout.step={settings.step} adds no noise in the steps that are trained on, so they have no "
            f"likelihood: set its amount in objective.rollout.step_options, e.g. {{eta: 1.0}}"
        )
    return found


def sampler_steps(settings: RolloutSettings, schedule: VPDiscrete | RectifiedFlow, prediction: str) -> list[Step]:
    """`steps_of` the settings' own plan."""
    return steps_of(*sampler_plan(settings, schedule, prediction), settings)


def without_history(steps: Sequence[Step]) -> bool:
    """Whether each step depends on the state before it and on one output alone."""
    return all(len(step.transition.outputs) == 1 and not step.transition.input for step in steps)


@dataclass(frozen=True)
class StepGroup:
    """Steps of one prompt at one noise level: a preferred and a rejected one, or a single one with its advantage.

    ``x`` and ``target``: of each member the network's input and the output that would have led to the next state
    without noise, (C, h, w) float32 on the CPU, the chosen one first.
    """

    prompt: int
    at: Step
    x: tuple[Tensor, ...]
    target: tuple[Tensor, ...]
    scores: tuple[float, ...] | None = None
    preference: float = 1.0
    advantages: tuple[float, ...] | None = None


def regression(
    groups: Sequence[StepGroup], condition: Callable[[Sequence[int]], Conditioning], device: torch.device | str
) -> Regression:
    """n groups of steps of one size as a Regression; ``condition(prompts)`` gives the conditioning of prompts."""
    members = range(len(groups[0].x))
    own = [group.at for group in groups] * len(members)
    x = torch.stack([group.x[member] for member in members for group in groups])
    target = torch.stack([group.target[member] for member in members for group in groups])

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Regression(
        x_t=x.to(device),
        t=torch.tensor([step.t for step in own], device=device),
        target=target.to(device),
        conditioning=condition([group.prompt for group in groups] * len(members)),
        judgement=Judgement.of(groups, len(members), device, [group.advantages for group in groups]),
        weight=column([step.transition.weight for step in own]),
        std=column([step.transition.std for step in own]),
    )
