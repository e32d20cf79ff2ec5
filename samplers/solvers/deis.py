"""DEIS multistep solvers (Zhang & Chen 2022, arXiv 2204.13902). rho-RK is `runge_kutta`, iPNDM is in adams.py."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .._names import unknown
from ..grid import Grid
from ..plan import Plan
from ..schedule import Schedule
from .line import Line

VARIANTS = ("tab", "rhoab", "logrho")


def deis(
    grid: Grid,
    steps: int,
    *,
    order: int = 3,
    variant: Literal["tab", "rhoab", "logrho"] = "tab",
    time: Schedule | None = None,
    space: str | None = None,
    lower_order_final: bool = False,
    as_published: bool | Literal["diff-sampler"] = False,
) -> Plan:
    """DEIS: the network's last values are extrapolated by a polynomial and the ODE is integrated exactly. Order `order`
    on any grid; one call per step.

        y_{i+1} = y_i + sum_j m_{i-j} int l_j(tau(u)) du    over [u_i, u_{i+1}], with y, u, m of line.py     (eq. 14-15)

    where l_j are the Lagrange polynomials in tau through the last nodes.

    Args:
        order: number of values used, 1 to 4 (the paper counts from 0: tAB3 is order=4).
        variant: tau. 'tab': time. 'rhoab': u itself, = `lms`. 'logrho': log(sigma/alpha) (diffusers' DEIS); first order
            where that is infinite.
        time: the schedule whose time 'tab' uses; default the grid's. With EDM's, t = sigma, 'tab' equals 'rhoab';
            diff-sampler takes VPLinear's for EDM networks.
        space: the line, 'kappa' (the paper's rho) or 'flow'.
        lower_order_final: end with orders ..., 2, 1.
        as_published: 'tab' and 'rhoab' with the authors' coefficients, a left Riemann sum of 10,000 nodes;
            'diff-sampler': that code's, whose nodes include both ends.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"deis has orders 1 to 4, got {order!r}")
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    if as_published not in (False, True, "diff-sampler"):
        raise unknown("as_published", as_published, ("False", "True", "diff-sampler"))
    if not isinstance(time, Schedule | None):
        raise ValueError(f"time must be a schedule, got {time!r}")
    nodes = grid.nodes(steps)
    line = Line(nodes, space)
    time = time or grid.schedule
    if as_published and (variant == "logrho" or line.target != "epsilon" or nodes.sigma[-1] == 0.0):
        raise ValueError("as_published needs variant 'tab' or 'rhoab', space='kappa' and a grid that ends at t_end")

    def lam(u):
        with np.errstate(divide="ignore"):
            return -np.log(u) if line.target == "epsilon" else np.log1p(-u) - np.log(u)

    tau = {"tab": lambda u: time.t_of_lambda(lam(u)), "rhoab": lambda u: u, "logrho": lam}[variant]
    corners = np.empty(0)
    if variant == "tab" and len(time.corners):
        kappa = np.exp(-time.lam(time.corners))
        corners = kappa if line.target == "epsilon" else kappa / (1.0 + kappa)
    at = tau(line.u)
    rows = []
    for i in range(steps):
        p = min(order, i + 1, steps - i if lower_order_final else order)
        while p > 1 and not np.isfinite(at[[i - p + 1, i + 1]]).all():
            p -= 1
        if as_published == "diff-sampler" and p == 1:
            points, weights = line.u[[i]], line.u[[i + 1]] - line.u[i]
        elif as_published:
            points, weights = _riemann(at[i], at[i + 1], as_published is True)
            if variant == "tab":
                alpha, sigma, (d_alpha, d_sigma) = time.alpha(points), time.sigma(points), time.rates(points)
                weights = weights * (alpha * d_sigma - sigma * d_alpha) / alpha**2  # d rho / dt
        else:
            u, weights = _gauss(line.u[i], line.u[i + 1], corners)
            points = tau(u)
        values = at[i - np.arange(p)]
        rows.append(line.row(i, i + 1, *(weights @ _lagrange(values, points))))
    return Plan.build(f"deis({variant}, order={order})", line.target, nodes, rows)


def _lagrange(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(points, values): the Lagrange basis through `values`."""
    basis = np.ones((len(points), len(values)))
    for j, value in enumerate(values):
        for other in np.delete(values, j):
            basis[:, j] *= (points - other) / (value - other)
    return basis


def _riemann(a: float, b: float, left: bool, n: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the published sums."""
    return np.linspace(a, b, n, endpoint=not left), np.full(n, (b - a) / n)


def _gauss(a: float, b: float, corners: np.ndarray, panels: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of an integral from a to b: Gauss-Legendre, exact to rounding.

    The panels end at corners of the integrand and shrink towards u = 0, where time is like a square root of u + 1e-2.
    """
    low, high = min(a, b), max(a, b)
    ends = np.geomspace(low + 0.01, high + 0.01, panels + 1) - 0.01
    ends = np.unique([low, *ends[1:-1], *corners[(low < corners) & (corners < high)], high])
    x, w = np.polynomial.legendre.leggauss(8)
    middle, half = (ends[1:] + ends[:-1]) / 2, np.diff(ends) / 2
    points, weights = middle[:, None] + half[:, None] * x, half[:, None] * w
    return points.ravel(), weights.ravel() * np.sign(b - a)
