"""DPM-Solver and DPM-Solver++ single-step: 2S, 3S and the mix of orders ("fast") that makes any number of calls.

Lu et al. 2022, arXiv 2206.00927 (DPM-Solver-2, -3 and -fast: Algorithms 1 and 2 and the appendix) and arXiv 2211.01095
(DPM-Solver++(2S), Algorithm 1).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from ..grid import Grid, Nodes
from ..plan import Plan, Row, Step, row
from .dpmpp import check_options, plan_name
from .expint import ExpStep


class Form(NamedTuple):
    """What the steps of one plan have in common: the options of `singlestep`."""

    target: str
    solver_type: str
    eta: float = 0.0
    own_noise: bool = False  # each stage draws anew; if not, all stages of a step see one Brownian path


def singlestep(
    grid: Grid,
    steps: int,
    *,
    order: int = 3,
    target: Literal["sample", "epsilon"] = "sample",
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    fixed: bool = False,
    eta: float = 0.0,
    as_published: bool = False,
) -> Plan:
    """Single-step DPM-Solver(++) of order 1 (DDIM), 2 ("2S") or 3 ("3S"). A step of order p makes p calls and needs no
    history.

    The grid places one interval per call, and a step of order p takes p of them. Given sigmas or timesteps are the
    steps themselves. The calls inside a step lie evenly in lambda, at r = 1/2 or at 1/3 and 2/3, because the 'midpoint'
    type is of order 3 only for r_2 = 2/3. A step to sigma = 0 or from alpha = 0 is first order (one call), because
    lambda is infinite there.

    Args:
        order: 1, 2 or 3; the highest one of the mix. A mix that ends with order 1 is globally of order 2.
        target: 'sample' is DPM-Solver++, 'epsilon' DPM-Solver.
        solver_type: 'midpoint' is the papers' algorithms, 'heun' (the code's 'taylor') integrates the polynomial
            through all stages.
        fixed: all steps of `order`, except those that must be first order. Not every number of calls is possible.
        eta: 0 is the ODE, 1 the reverse SDE. All stages of a step follow one Brownian path, which makes order 2 of
            weak order 2 (measured on Gaussians).
        as_published: the calls inside a step as in the authors' code, on the grid's own nodes. On grids uniform in
            lambda: steps of equal length, whatever their order; with target='epsilon' k-diffusion's dpm_fast. With
            `eta`, independent noise for each stage, as in diffusers: weak order 1.

    Raises:
        ValueError: unknown names, `fixed` with an impossible number of calls.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"singlestep has orders 1, 2 and 3, got {order!r}")
    check_options(solver_type, target, eta)
    lam = (grid.nodes(steps) if grid.given is None else grid.given).lam
    orders = order_list(steps, order, fixed, bool(np.isneginf(lam[0])), bool(np.isposinf(lam[-1])))
    nodes = _place(grid, steps, orders, as_published)
    rows: list[Step] = []
    for p in orders:
        stages, last = step_rows(nodes, len(rows), p, Form(target, solver_type, eta, as_published))
        rows += [*stages, last]
    return Plan.build(plan_name("singlestep", order, target, eta), target, nodes, rows)


def order_list(steps: int, order: int, fixed: bool, from_pure_noise: bool, to_zero: bool) -> list[int]:
    """The orders of the steps, which add up to `steps` calls.

    DPM-Solver-fast (2206.00927): as many steps of the highest order as fit, then one with the remaining calls. If none
    remain, order 3 ends with 2, 1. The first step from alpha = 0 and the last to sigma = 0 are of order 1.
    """
    first, last = [1] * from_pure_noise, [1] * to_zero
    body = steps - len(first) - len(last)
    if body < 0:
        first, body = [], 0  # one step from pure noise to data
    if fixed and body % order:
        low = steps - body % order
        raise ValueError(f"steps of order {order} cannot make {steps} calls here: choose {low} or {low + order}")
    if order == 3 and body and body % 3 == 0 and not fixed and not to_zero:
        last, body = [1], body - 1
    return first + [order] * (body // order) + ([body % order] if body % order else []) + last


def step_rows(nodes: Nodes, s: int, p: int, form: Form) -> tuple[list[Step], Row]:
    """The rows of one step of order p from node s to node s + p: of its p - 1 stages, and of its end.

    The calls are at the nodes s, s + 1, up to s + p - 1. The anchor stays at s while the stages are called. It carries
    the noise of the path so far, unless `form.own_noise`.
    """
    target, solver_type, eta, own_noise = form
    stages: list[Step] = []
    for j in range(1, p + 1):
        step, link = (ExpStep(nodes, a, s + j, target, eta if nodes.sigma[s + j] else 0.0) for a in (s, s + j - 1))
        if j == 1:  # 2206.00927, eq. 3.7
            weights = np.array([step.first])
        elif solver_type == "midpoint" and j == p == 2:  # Algorithm 1 of both papers, for any r_1
            slope = step.first / (2 * (nodes.lam[s + 1] - nodes.lam[s]) / step.h)
            weights = np.array([slope, step.first - slope])
        elif solver_type == "midpoint" and j == p == 3:  # 2206.00927, Algorithm 2, last line
            new, old = step.weights(s + 2, s)
            weights = np.array([new, 0.0, old])
        else:  # Algorithm 2, second stage; the code's 'taylor'
            weights = step.weights(*range(s + j - 1, s - 1, -1))
        noise = step.noise if own_noise else link.noise
        following = row(step.carry, *weights, noise=noise)
        if j < p:
            stages.append((following, row(1.0, noise=0.0 if own_noise else noise / step.carry)))
    return stages, following


def _place(grid: Grid, steps: int, orders: list[int], as_published: bool) -> Nodes:
    """One node per call, and the end."""
    if grid.given is not None or (as_published and grid.kind == "logsnr"):
        outer = grid.nodes(len(orders))
    elif as_published:
        return grid.nodes(steps)
    else:
        outer = grid.nodes(steps).take(np.cumsum([0, *orders]))
    t = []
    for i, p in enumerate(orders):
        inside = outer.lam[i] + np.arange(1, p) / p * (outer.lam[i + 1] - outer.lam[i])
        t += [outer.t[i], *grid.schedule.t_of_lambda(inside)]
    if outer.sigma[-1] == 0.0:
        return Nodes.at(grid.schedule, t).then_zero()
    return Nodes.at(grid.schedule, [*t, outer.t[-1]])
