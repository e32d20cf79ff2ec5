"""The reverse SDE of a flow with any amount of noise: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from .._names import unknown
from ..grid import Grid, Nodes
from ..plan import Plan, row
from ..schedule import RectifiedFlow


def flow_sde(
    grid: Grid,
    steps: int,
    *,
    amount: float = 0.7,
    law: Literal["scaled", "constant"] = "scaled",
    as_published: bool = False,
) -> Plan:
    """dx = [v + g^2/(2t) (x + (1 - t) v)] dt + g dw, whose marginals are the flow's for every g(t). One call per step.

    Each step is the exact solution for x_0 held at the network's estimate. So the marginal at the end of a step is
    right whatever g and the step size are, if the estimate is. With N the integral of g^2 / (2 t^2) dt over a step

        x' = (sigma'/sigma) e^-N (x - alpha x_0) + alpha' x_0 + sigma' sqrt(1 - e^-2N) z.

    Order 1, weak order 1 with noise. A step to sigma = 0 has no noise.

    Args:
        amount: of noise; 0 is the flow's ODE (Euler's method). law 'scaled': sqrt(2) is the reverse SDE.
        law: 'scaled' is Flow-GRPO's g = amount sqrt(t / (1 - t)), which at t = 1 draws all noise anew. On schedules
            that are no flow it is the same multiple of their own noise. 'constant' is DanceGRPO's g = amount.
        as_published: Euler-Maruyama, as in the authors' codes, whose states have too much noise at few steps. At t = 1
            'scaled' takes 1 - t from the node after. The last step has no noise here either.
    """
    if law not in ("scaled", "constant"):
        raise unknown("law", law, ("scaled", "constant"))
    if not amount >= 0:
        raise ValueError(f"amount must not be negative, got {amount}")
    if not isinstance(grid.schedule, RectifiedFlow) and (law == "constant" or as_published):
        what = "as_published" if as_published else "law='constant'"
        raise ValueError(f"{what} is defined for a RectifiedFlow, not a {type(grid.schedule).__name__}: leave it out")
    nodes = grid.nodes(steps)
    if amount and (np.diff(nodes.lam) < 0).any():
        raise ValueError("amount > 0 needs a grid that runs from noise to data")
    name = f"flow_sde(amount={amount:g})"
    return _euler(name, nodes, amount, law) if as_published else _exact(name, nodes, amount, law)


def _exact(name: str, nodes: Nodes, amount: float, law: str) -> Plan:
    rows = []
    for i in range(len(nodes) - 1):
        a_s, a_t, s_s, s_t = nodes.alpha[i], nodes.alpha[i + 1], nodes.sigma[i], nodes.sigma[i + 1]
        if not amount:
            kept = 1.0
        elif law == "scaled":  # N = (amount^2 / 2) (lambda_t - lambda_s)
            kept = ((s_t * a_s) / (s_s * a_t)) ** (amount**2 / 2)
        else:  # N = (amount^2 / 2) (1/t' - 1/t)
            kept = math.exp(-(amount**2) / 2 * (1 / s_t - 1 / s_s)) if s_t else 0.0
        along = s_t / s_s * kept
        rows.append(row(along, a_t - along * a_s, noise=s_t * math.sqrt(1 - kept**2)))
    return Plan.build(name, "sample", nodes, rows)


def _euler(name: str, nodes: Nodes, amount: float, law: str) -> Plan:
    rows = []
    for i in range(len(nodes) - 1):
        t, dt = nodes.sigma[i], nodes.sigma[i + 1] - nodes.sigma[i]
        signal = nodes.alpha[i] if t < 1 else nodes.alpha[i + 1]
        g2 = amount**2 * (t / signal if law == "scaled" else 1.0)
        spread = math.sqrt(g2 * -dt) if amount and nodes.sigma[i + 1] else 0.0
        rows.append(row(1 + g2 / (2 * t) * dt, (1 + g2 * (1 - t) / (2 * t)) * dt, noise=spread))
    return Plan.build(name, "flow", nodes, rows)
