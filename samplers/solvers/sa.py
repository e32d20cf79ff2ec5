"""SA-Solver (Xue et al. 2023, arXiv 2309.05019): stochastic Adams predictor-corrector with any amount of noise."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .._names import unknown
from ..grid import Grid, Nodes
from ..plan import Plan, row
from .denoise import then_denoise
from .expint import ExpStep
from .unipc import bh1, climb, predict_and_correct


def sa_solver(
    grid: Grid,
    steps: int,
    *,
    predictor_order: int = 3,
    corrector_order: int = 4,
    tau: float | tuple[float, float, float] = 0.0,
    target: Literal["sample", "epsilon"] = "sample",
    mode: Literal["few_steps", "more_steps"] = "few_steps",
    pece: bool = False,
    lower_order_final: bool = True,
    as_published: bool = False,
) -> Plan:
    """SA-Solver with a p-step predictor and a corrector through c values.

    Order min(p + 1, c) for tau = 0, p without corrector. With noise, mean and variance of Gaussian data converge with
    that order, at most 2. A step to sigma = 0 is first order (lambda is infinite there).
    Calls for N intervals: N ('few_steps') or N + 2 ('more_steps'); with `pece` 2N - 1 or 2N + 1.

    Args:
        predictor_order: p = 1, 2, 3, ..., how many values the predictor interpolates.
        corrector_order: c, how many values the corrector interpolates, the new one included; 0 is no corrector.
        tau: amount of noise: 0 is the probability-flow ODE, 1 the reverse SDE. (tau, t_low, t_high): tau while a
            step ends in t_low <= t <= t_high, else 0; the authors often use (1.0, 0.2, 0.8).
        target: interpolate x_0 ('sample') or the noise ('epsilon').
        mode: 'few_steps' makes the last step with tau = 0 and without corrector. 'more_steps' makes it like the
            others, which takes one more call to correct it. The result is then the x_0 of another call at t_end; a
            grid that ends at sigma = 0 is used up to the node before.
        pece: call the network again at the corrected states and use those values from there on.
        lower_order_final: end with orders ..., 2, 1 (the corrector one more), at any number of steps.
        as_published: formulas through two values have h^2/2 for the exact integral ('sample' and 'few_steps' only), as
            UniPC's 'bh1'. It changes O(h^3), not the order.
    """
    for name, order, least in (("predictor_order", predictor_order, 1), ("corrector_order", corrector_order, 0)):
        if not isinstance(order, int) or order < least:
            raise ValueError(f"sa_solver needs a whole {name} >= {least}, got {order!r}")
    if target not in ("sample", "epsilon"):
        raise unknown("target", target, ("sample", "epsilon"))
    if mode not in ("few_steps", "more_steps"):
        raise unknown("mode", mode, ("few_steps", "more_steps"))
    if pece and not corrector_order:
        raise ValueError("pece calls the network at corrected states: it needs corrector_order >= 1")
    few = mode == "few_steps"
    nodes = _nodes(grid, steps, few, pece, corrected=corrector_order > 0)
    n = len(nodes) - 1
    stages = []
    for i, order in enumerate(climb(max(predictor_order, corrector_order - 1), n, lower_order_final)):
        last = few and i + 1 == n
        eta = 0.0 if last else _tau(tau, nodes.t[i + 1]) ** 2
        c = 0 if last else min(corrector_order, order + 1)
        stages.append((ExpStep(nodes, i, i + 1, target, eta), min(predictor_order, order), c))
    shortcut = as_published and few and target == "sample"
    rows, change = predict_and_correct(nodes, stages, bh1 if shortcut else ExpStep.weights, pece)
    visits = [0, *(i for i in range(1, n) for _ in range(1 + pece)), n]
    if not few and corrector_order:
        rows, visits = [*rows, row(1.0, *change)], [*visits, n]
    name = f"sa_solver(predictor_order={predictor_order}, corrector_order={corrector_order})"
    plan = Plan.build(name, target, nodes.take(visits), rows)
    return plan if few else then_denoise(plan, grid.schedule)


def _nodes(grid: Grid, steps: int, few: bool, pece: bool, corrected: bool) -> Nodes:
    """The nodes of as many intervals as these calls make."""
    extra = 0 if few else 1 + corrected  # to correct the last node, and its x_0
    calls = steps - extra
    if calls < 1 or (pece and calls % 2 == 0):
        first, gap = 1 + extra, 1 + pece
        possible = ", ".join(str(first + k * gap) for k in range(3))
        raise ValueError(f"sa_solver makes {possible}, ... model calls with these options, not {steps}")
    n = (calls + 1) // 2 if pece else calls
    ends_at_zero = grid.end == "zero" if grid.given is None else grid.given.sigma[-1] == 0.0
    return grid.nodes(n) if few or not ends_at_zero else grid.nodes(n + 1).take(range(n + 1))


def _tau(tau: float | tuple[float, float, float], t: float) -> float:
    """The amount of noise of a step that ends at t."""
    value, low, high = tau if isinstance(tau, tuple | list) else (tau, -np.inf, np.inf)
    if not value >= 0:
        raise ValueError(f"tau must not be negative, got {value}")
    return float(value) if low <= t <= high else 0.0
