"""DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095); with target='epsilon' DPM-Solver (arXiv 2206.00927).

With `eta` their SDE forms: SDE-DPM-Solver++ (2211.01095, sec. 5), k-diffusion's DPM++ 2M SDE and 3M SDE.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .._names import unknown
from ..grid import Grid
from ..plan import Plan, row
from .expint import ExpStep, through


def dpmpp(
    grid: Grid,
    steps: int,
    *,
    order: int = 2,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
    target: Literal["sample", "epsilon"] = "sample",
    eta: float = 0.0,
    s_noise: float = 1.0,
    as_published: bool = False,
) -> Plan:
    """Multistep DPM-Solver++ of order 1 (DDIM), 2 ("2M") or 3 ("3M"); one call per step.

    The first steps use the order that the history allows. A step to sigma = 0 is first order and adds no noise: there
    lambda is infinite.

    Args:
        order: 1, 2 or 3.
        solver_type: of second-order steps. 'midpoint' is the paper's Algorithm 2 (weight phi_1 / 2), 'heun' the
            Taylor form (weight phi_2).
        lower_order_final: end with orders ..., 2, 1, at any number of steps. More stable with few steps, first order
            in the last one. k-diffusion does not.
        target: 'sample' is DPM-Solver++, 'epsilon' DPM-Solver.
        eta: 0 is the probability-flow ODE, 1 the reverse SDE. With noise, order 2 and 3 are of weak order 2 (measured
            on Gaussians).
        s_noise: factor on the noise that is added; 1 keeps the marginals.
        as_published: order 3 as in the authors' code, which halves the second derivative and so is of second order. The
            default has the missing factor 2.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpmpp has orders 1, 2 and 3, got {order!r}")
    check_options(solver_type, target, eta)
    nodes = grid.nodes(steps)
    known = np.maximum(1, np.isfinite(nodes.lam).cumsum())  # a value at lambda = -inf gives no derivative
    rows = []
    for i in range(steps):
        step = ExpStep(nodes, i, i + 1, target, eta if nodes.sigma[i + 1] else 0.0)
        p = min(order, known[i], steps - i if lower_order_final else order)
        if p == 1 or not step.finite:  # eq. 8 with x_0 constant = DDIM
            weights = np.array([step.first])
        else:  # moments: what multiplies h^j m^(j) of the polynomial through the last p values
            moments = [step.weight(j + 1) for j in range(p)]
            if p == 2 and solver_type == "midpoint":  # Algorithm 2
                moments[1] = moments[0] / 2
            if p == 3 and as_published:
                moments[2] /= 2
            weights = through((nodes.lam[i - np.arange(p)] - nodes.lam[i]) / step.h, moments)
        rows.append(row(step.carry, *weights, noise=s_noise * step.noise))
    return Plan.build(plan_name("dpmpp", order, target, eta), target, nodes, rows)


def check_options(solver_type: str, target: str, eta: float) -> None:
    """That the common options of the DPM-Solver family have known values."""
    if solver_type not in ("midpoint", "heun"):
        raise unknown("solver_type", solver_type, ("midpoint", "heun"))
    if target not in ("sample", "epsilon"):
        raise unknown("target", target, ("sample", "epsilon"))
    if not eta >= 0:
        raise ValueError(f"eta must not be negative, got {eta}")


def plan_name(family: str, order: int, target: str, eta: float) -> str:
    eps = "" if target == "sample" else ", epsilon"
    return f"{family}(order={order}{eps}{f', eta={eta:g}' if eta else ''})"
