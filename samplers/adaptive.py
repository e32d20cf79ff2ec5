"""Adaptive DPM-Solver: the step sizes follow an error estimate, so this is a loop and not a plan.

DPM-Solver-12 and -23 (Lu et al. 2022, arXiv 2206.00927, appendix) with the step-size controller of the authors' code
or of k-diffusion. The formulas are those of `solvers.singlestep`. Each attempted step is a small plan: its last input
is the solution of order p, its last anchor that of order p - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch

from ._names import unknown
from .grid import Grid, Nodes
from .plan import Plan
from .prediction import Guidance
from .schedule import Schedule
from .solvers.ddim import ddim
from .solvers.dpmpp import check_options
from .solvers.singlestep import Form, step_rows

CLOSE = 1e-5  # to t_end: in t for 'dpm_solver', in lambda for 'k_diffusion'
CONTROLLERS = ("dpm_solver", "k_diffusion")


class Effort(NamedTuple):
    """The cost of an adaptive run: model calls (`order` per attempted step), and the steps accepted and rejected."""

    calls: int
    accepted: int
    rejected: int


def sample_adaptive(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    schedule: Schedule,
    order: int = 3,
    target: Literal["sample", "epsilon"] = "sample",
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    rtol: float = 0.05,
    atol: float = 0.0078,
    first_step: float = 0.05,
    controller: Literal["dpm_solver", "k_diffusion"] = "dpm_solver",
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: bool = False,
    prediction: str = "epsilon",
    guidance: Guidance | None = None,
    threshold: Callable[[torch.Tensor], torch.Tensor] | None = None,
    max_calls: int = 1000,
) -> tuple[torch.Tensor, Effort]:
    """Solve the probability-flow ODE from t_start to t_end to a tolerance.

    An attempted step is accepted if the difference of its two solutions, relative to max(atol, rtol |x|) per element,
    has root mean square <= 1.

    Args:
        model, x, schedule, prediction, guidance, threshold: as in `sample`.
        order: 2 (DPM-Solver-12) or 3 (DPM-Solver-23): calls per attempted step, and the order of the result.
        target, solver_type: as in `solvers.singlestep`.
        rtol, atol: tolerances; the defaults are the authors', 2/256 for images in [-1, 1].
        first_step: the first step's length in lambda.
        controller: 'dpm_solver' takes the largest error E of the samples and sets h to 0.9 h E^(-1/order).
            'k_diffusion' takes E from the mean square over the whole batch, h times 1 + atan(E^(-1/order) - 1).
        t_start, t_end: default t_max and t_min; lambda must be finite at both. t_start < t_end goes towards noise.
        denoise: return the x_0 of one more call at t_end.
        max_calls: stop with an error if more calls would be needed.

    Returns: the result in x's dtype, and the `Effort`.

    Raises:
        ValueError: unknown names, order not 2 or 3, tolerances that are not positive, t_start at alpha = 0.
        FloatingPointError: the model's output is not finite (which call, which sigma).
        RuntimeError: more than max_calls calls would be needed.
    """
    if order not in (2, 3):
        raise ValueError(f"adaptive DPM-Solver has orders 2 and 3, got {order!r}")
    check_options(solver_type, target, eta=0.0)
    if controller not in CONTROLLERS:
        raise unknown("controller", controller, CONTROLLERS)
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0 and first_step > 0):
        raise ValueError(f"tolerances and the first step must be positive: {rtol=}, {atol=}, {first_step=}")
    grid = Grid(schedule, t_start=t_start, t_end=t_end, end="t_end")  # checks the range
    t, t_end = grid.t_start, grid.t_end
    lam, lam_end = float(schedule.lam(t)), float(schedule.lam(t_end))
    if not np.isfinite([lam, lam_end]).all():
        raise ValueError("adaptive steps need a finite lambda at both ends: choose t_start with alpha > 0, t_end > 0")
    towards, h = math.copysign(1.0, lam_end - lam), first_step
    dtype, state = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    if guidance is not None:
        guidance = replace(guidance, uncond=_seeing(dtype, guidance.uncond))
    run = partial(_run, _seeing(dtype, model), prediction=prediction, guidance=guidance, threshold=threshold)
    previous, effort = state, Effort(0, 0, 0)
    while abs(t - t_end if controller == "dpm_solver" else lam - lam_end) > CLOSE:
        if effort.calls + order > max_calls:
            raise RuntimeError(
                f"after {effort.calls} of max_calls = {max_calls} the run is at t = {t:g}, not at t_end = {t_end:g}. "
                f"{effort.rejected} steps were rejected: loosen rtol and atol, or raise max_calls"
            )
        step = min(h, abs(lam_end - lam))
        lams = lam + towards * step * np.arange(1, order + 1) / order
        nodes = Nodes.at(schedule, [t, *schedule.t_of_lambda(lams)])
        low, high = run(_pair(nodes, order, Form(target, solver_type)), state, effort.calls)
        gap = (high - low) / torch.maximum(low.abs(), previous.abs()).mul(rtol).clamp(min=atol)
        if controller == "dpm_solver":
            error = gap.square().flatten(1).mean(1).sqrt().max().item()
            accept, h = error <= 1.0, 0.9 * step * max(error, 1e-100) ** (-1.0 / order)
        else:
            error = gap.square().mean().sqrt().item() + 1e-8
            factor = 1.0 + math.atan(error ** (-1.0 / order) - 1.0)
            accept, h = factor >= 0.81, h * factor
        if not math.isfinite(error):
            raise FloatingPointError(f"the error estimate of the step from t = {t:g} is not finite")
        effort = Effort(effort.calls + order, effort.accepted + accept, effort.rejected + (not accept))
        if accept:
            state, previous, t = high, low, float(nodes.t[-1])
            lam = float(schedule.lam(t))
    if denoise:
        _, state = run(ddim(Grid(schedule, times=[t]), 1), state, effort.calls)
        effort = effort._replace(calls=effort.calls + 1)
    return state.to(dtype), effort


def _pair(nodes: Nodes, p: int, form: Form) -> Plan:
    """One step over all `nodes`: its last input is the result of order p, its last anchor that of order p - 1."""
    stages, high = step_rows(nodes, 0, p, form)
    _, low = step_rows(nodes.take([*range(p - 1), p]), 0, p - 1, form)
    low = low._replace(ms=(0.0, *low.ms))  # without the newest call
    return Plan.build("adaptive", form.target, nodes, [*stages, (high, low)])


def _run(model, plan: Plan, x: torch.Tensor, calls: int, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The last anchor and the last input of a plan; `calls` were made before it."""
    states = []
    try:
        plan.run(model, x, callback=lambda k, state: states.append(state), **settings)
    except FloatingPointError as error:
        raise FloatingPointError(f"after {calls} calls, step from t = {plan.t[0]:g}: {error}") from None
    return states[-1].anchor, states[-1].input


def _seeing(dtype: torch.dtype, model):
    """The model, called with inputs of this dtype although the state is wider."""
    return lambda x, label: model(x.to(dtype), label)
