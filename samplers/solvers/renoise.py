"""Sampling of distilled networks: the network's x_0, noised anew at every step."""

from __future__ import annotations

from ..grid import Grid
from ..plan import Plan, row


def renoise(grid: Grid, steps: int) -> Plan:
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, Algorithm 1; LCM, DMD2, Turbo): each step
    draws `x' = alpha' x_0 + sigma' z` with the network's x_0 and fresh noise z. One call per step.

    For networks that were distilled to return samples of x_0. For any other network x_0 is a mean and the result is
    blurred, so this solver is not in `SOLVERS`; pass the function itself: `build_plan(schedule, renoise, 4)`.
    """
    nodes = grid.nodes(steps)
    rows = [row(0.0, alpha, noise=sigma) for alpha, sigma in zip(nodes.alpha[1:], nodes.sigma[1:], strict=True)]
    return Plan.build("renoise", "sample", nodes, rows)
