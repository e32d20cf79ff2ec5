"""Coordinates in which the probability-flow ODE is `dy/du = m`, for the solvers that are plain ODE methods.

    'kappa'  y = x / alpha            u = sigma / alpha              m = eps    EDM (2206.00364, eq. 4), DEIS's rho
    'flow'   y = x / (alpha + sigma)  u = sigma / (alpha + sigma)    m = eps - x_0    rectified flow (2209.03003)

A first-order step is the same in both (DDIM). Only 'flow' is finite where alpha = 0; it is the default there.
"""

from __future__ import annotations

import numpy as np

from .._names import unknown
from ..grid import Nodes
from ..plan import Row, row

SPACES = {"kappa": "epsilon", "flow": "flow"}  # -> the network's quantity that is the slope


class Line:
    """The nodes as points u on a line: `x_t = (scale_t / scale_s) x_s + scale_t sum_j c_j m_j`.

    Attributes: u, scale: (n,). target: what the m are, a name in `prediction.PREDICTIONS`.
    """

    def __init__(self, nodes: Nodes, space: str | None = None):
        if space is None:
            space = "flow" if (nodes.alpha == 0).any() else "kappa"
        if space not in SPACES:
            raise unknown("space", space, SPACES)
        if space == "kappa" and (nodes.alpha == 0).any():
            raise ValueError("sigma / alpha is infinite at alpha = 0: use space='flow' or a smaller t_start")
        self.target = SPACES[space]
        self.scale = nodes.alpha if space == "kappa" else nodes.alpha + nodes.sigma
        self.u = nodes.sigma / self.scale

    def row(self, s: int, t: int, *increments: float, noise: float = 0.0) -> Row:
        """The row of `y_t = y_s + sum_j increments_j m_j` (newest m first) + `noise` z (in units of x)."""
        return row(self.scale[t] / self.scale[s], *(self.scale[t] * np.asarray(increments)), noise=noise)
