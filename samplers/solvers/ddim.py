"""DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502), deterministic (eta = 0) to ancestral (eta = 1)."""

from __future__ import annotations

import math

from .._names import unknown
from ..grid import Grid
from ..plan import Plan, row


def ddim(grid: Grid, steps: int, *, eta: float = 0.0, target: str = "sample") -> Plan:
    """DDIM with noise `eta`, on any schedule. First order; one call per step.

    Args:
        eta: 0 is the probability-flow ODE (= DPM-Solver-1 = Euler on sigma/alpha), 1 is ancestral sampling.
        target: write the rows for 'sample' (x_0) or 'epsilon'. The method is the same, but only 'sample' can start at
            alpha = 0.
    """
    if target not in ("sample", "epsilon"):
        raise unknown("target", target, ("sample", "epsilon"))
    if not eta >= 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    nodes = grid.nodes(steps)
    rows = []
    for i in range(steps):
        a_s, a_t, s_s, s_t = nodes.alpha[i], nodes.alpha[i + 1], nodes.sigma[i], nodes.sigma[i + 1]
        # eq. 16 for any schedule: noise / alpha_t = eta kappa_t sqrt(1 - kappa_t^2 / kappa_s^2), kappa = sigma/alpha
        ratio = (s_t * a_s) / (s_s * a_t)  # kappa_t / kappa_s
        if eta and ratio > 1:
            raise ValueError("eta > 0 needs a grid that runs from noise to data")
        noise = eta * s_t * math.sqrt(max(0.0, 1.0 - ratio**2)) if eta else 0.0
        if noise > s_t:
            raise ValueError(f"eta = {eta} adds more noise in step {i} than there is at its end: choose eta <= 1")
        direction = math.sqrt(s_t**2 - noise**2)
        # eq. 12: x_t = alpha_t x_0 + sqrt(sigma_t^2 - noise^2) eps + noise z
        if target == "sample":
            rows.append(row(direction / s_s, a_t - direction / s_s * a_s, noise=noise))
        elif a_s == 0.0:
            raise ValueError("target='epsilon' is undefined at alpha = 0: use target='sample'")
        else:
            rows.append(row(a_t / a_s, direction - a_t / a_s * s_s, noise=noise))
    return Plan.build(f"ddim(eta={eta:g})", target, nodes, rows)
