"""DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095); with target='epsilon' DPM-Solver (arXiv 2206.00927)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .._names import unknown
from ..grid import Grid
from ..plan import Plan, row
from .expint import ExpStep


def dpmpp(
    grid: Grid,
    steps: int,
    *,
    order: int = 2,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
    target: Literal["sample", "epsilon"] = "sample",
    as_published: bool = False,
) -> Plan:
    """Multistep DPM-Solver++ of order 1 (DDIM), 2 ("2M") or 3 ("3M"); one call per step.

    The first steps use the order that the history allows. A step to sigma = 0 is first order: there lambda is infinite.

    Args:
        order: 1, 2 or 3.
        solver_type: order 2 only. 'midpoint' is the paper's Algorithm 2 (weight phi_1 / 2), 'heun' the Taylor form
            (weight phi_2).
        lower_order_final: end with orders ..., 2, 1, at any number of steps. More stable with few steps, first order
            in the last one.
        target: 'sample' is DPM-Solver++, 'epsilon' DPM-Solver.
        as_published: order 3 as the authors' code has it. That code halves the second derivative, which makes it
            second order; the default restores the factor 2.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpmpp has orders 1, 2 and 3, got {order!r}")
    if solver_type not in ("midpoint", "heun"):
        raise unknown("solver_type", solver_type, ("midpoint", "heun"))
    if target not in ("sample", "epsilon"):
        raise unknown("target", target, ("sample", "epsilon"))
    nodes = grid.nodes(steps)
    rows = []
    for i in range(steps):
        step = ExpStep(nodes, i, i + 1, target)
        known = max(1, int(np.isfinite(nodes.lam[: i + 1]).sum()))  # a value at lambda = -inf tells no derivative
        p = min(order, known)
        if lower_order_final:
            p = min(p, steps - i)
        if not np.isfinite(step.h) or step.h == 0.0:
            p = 1
        w1 = step.weight(1)
        if p == 1:  # eq. 8 with x_0 constant = DDIM
            rows.append(row(step.carry, w1))
            continue
        lam = nodes.lam
        r0 = (lam[i] - lam[i - 1]) / step.h
        if p == 2:  # D = (m_0 - m_1) / r_0 estimates h m'; Algorithm 2
            w2 = 0.5 * w1 if solver_type == "midpoint" else step.weight(2)
            rows.append(row(step.carry, w1 + w2 / r0, -w2 / r0))
            continue
        # Newton form of the quadratic through the last three values: D1 = h m', D2 = h^2 m''
        r1 = (lam[i - 1] - lam[i - 2]) / step.h
        d10 = np.array([1.0, -1.0, 0.0]) / r0
        d11 = np.array([0.0, 1.0, -1.0]) / r1
        d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
        d2 = (1.0 if as_published else 2.0) * (d10 - d11) / (r0 + r1)
        rows.append(row(step.carry, *(np.array([w1, 0.0, 0.0]) + step.weight(2) * d1 + step.weight(3) * d2)))
    family = "dpmpp" if target == "sample" else "dpm"
    return Plan.build(f"{family}(order={order})", target, nodes, rows)
