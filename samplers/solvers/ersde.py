"""ER-SDE-Solvers (Cui et al. 2023, arXiv 2309.06169): reverse SDEs with a noise that is chosen by a function phi.

With k = sigma / alpha (the paper's lambda) and y = x / alpha, the probability-flow ODE is dy = (y - x_0) / k dk, and
the score is (x_0 - y) / k^2. Noise of variance v(k) per falling k keeps the marginals if half of v times minus the
score is added to the drift. With v = 2 k (k phi' / phi - 1), not negative where phi grows at least as k does,

    dy = phi' / phi (y - x_0) dk + sqrt(v) dw,      solved by variation of constants, r = phi(k_t) / phi(k_s):
    y_t = r y_s + phi(k_t) int_{k_t}^{k_s} phi'(k) / phi(k)^2 x_0(k) dk + sqrt(k_t^2 - r^2 k_s^2) z

because d(k^2 / phi^2) / dk = -v / phi^2. phi(k) = k is the ODE, phi(k) = k^2 the usual reverse SDE. Here phi(k) = k
psi(k), so that everything stays finite at pure noise (k = inf). A solver takes x_0(k) as a polynomial through the last
values, in the paper a Taylor polynomial with difference quotients.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from .._names import unknown
from ..grid import Grid
from ..plan import Plan, row
from .expint import through

LOG_PSI = {  # log(phi(k) / k) as a function of k
    "ode": lambda k: np.zeros_like(k),
    "sde": lambda k: np.log(k),
    "er_sde": lambda k: np.logaddexp(k**0.3, math.log(10.0)),  # phi = k (exp(k^0.3) + 10)
}


def er_sde(
    grid: Grid,
    steps: int,
    *,
    order: int = 3,
    phi: Literal["er_sde", "ode", "sde"] = "er_sde",
    s_noise: float = 1.0,
    lower_order_final: bool = False,
    as_published: bool = False,
) -> Plan:
    """ER-SDE-Solver-1, -2 and -3 with data prediction; one call per step.

    Order `order` for phi='ode'; with noise weak order 1, or 2 for order 2 and 3. Measured on Gaussians, for every phi
    against the mean and variance of the SDE above, from one point and from the marginal. The integrals are exact to
    rounding. Outputs of the authors' code were not at hand. A step to sigma = 0 returns x_0; a step from alpha = 0 is
    of first order.

    Args:
        order: 1, 2 or 3, how many values of x_0 are used.
        phi: the noise. 'er_sde' is the paper's recommendation, k (exp(k^0.3) + 10) with k = sigma / alpha: little
            noise, most of it at high noise levels. 'ode' adds none, 'sde' that of the reverse SDE.
        s_noise: factor on the noise that is added; 1 keeps the marginals.
        lower_order_final: the last steps go down to order 1.
        as_published: order 3 as in the paper, whose first derivative is the difference quotient of the last two values
            even there. That is of second order. The default is the polynomial through three values.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"er_sde has orders 1, 2 and 3, got {order!r}")
    if phi not in LOG_PSI:
        raise unknown("phi", phi, LOG_PSI)
    if not s_noise >= 0:
        raise ValueError(f"s_noise must not be negative, got {s_noise}")
    nodes = grid.nodes(steps)
    if phi != "ode" and nodes.lam[-1] < nodes.lam[0]:
        raise ValueError(f"phi={phi!r} adds noise and needs a grid that runs from noise to data")
    kappa = np.exp(-nodes.lam)
    known = np.maximum(1, np.isfinite(kappa).cumsum())  # a value at kappa = inf gives no derivative
    rows = []
    for i in range(steps):
        a, b = kappa[i], kappa[i + 1]
        p = min(order, known[i], steps - i if lower_order_final else order)
        ratio = _psi_ratio(phi, a, b)
        carry = nodes.sigma[i + 1] / nodes.sigma[i] * ratio
        moments = [nodes.alpha[i + 1] - carry * nodes.alpha[i]]
        if p > 1 and b > 0:
            moments += [nodes.alpha[i + 1] * moment for moment in _moments(phi, a, b, p)]
        weights = np.array(moments)
        if len(moments) > 1:
            at = (kappa[i - np.arange(len(moments))] - a) / (b - a)
            if as_published and len(moments) == 3:  # the difference quotient is the slope - at[1] / 2 of the curvature
                moments[2] += moments[1] * at[1] / 2
            weights = through(at, moments)
        noise = 0.0 if phi == "ode" else s_noise * nodes.sigma[i + 1] * math.sqrt(1.0 - ratio**2)
        rows.append(row(carry, *weights, noise=noise))
    return Plan.build(f"er_sde(order={order}{'' if phi == 'er_sde' else f', {phi}'})", "sample", nodes, rows)


def _psi_ratio(phi: str, a: float, b: float) -> float:
    """psi(b) / psi(a); 0 from a = inf or to b = 0 where phi's noise is all new."""
    if phi == "ode":
        return 1.0
    if b == 0.0 or np.isinf(a):
        return 0.0
    return float(np.exp(LOG_PSI[phi](b) - LOG_PSI[phi](a)))


_X, _W = np.polynomial.legendre.leggauss(40)


def _moments(phi: str, a: float, b: float, p: int) -> list[float]:
    """What multiplies (b - a)^j times the j-th derivative of x_0 at a, for j = 1 to p - 1, in units of y.

    By parts, the integral of (k - a)^j / j! is (b - a)^j / j! + int_b^a phi(b) / phi(k) (k - a)^(j-1) / (j-1)! dk. The
    quadrature runs over v = log k, where phi(b) / phi(k) dk = (b psi(b) / psi(k)) dv is smooth.
    """
    span = math.log(a / b)
    v = math.log(b) + span * (_X + 1.0) / 2.0
    k = np.exp(v)
    weight = b * np.exp(LOG_PSI[phi](np.float64(b)) - LOG_PSI[phi](k)) * _W * span / 2.0
    u = (k - a) / (b - a)
    return [
        1.0 / math.factorial(j) + float(weight @ u ** (j - 1)) / math.factorial(j - 1) / (b - a) for j in range(1, p)
    ]
