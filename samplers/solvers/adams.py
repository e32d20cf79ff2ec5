"""Adams methods, which combine the network's last values: LMS, iPNDM, iPNDM_v, ABM with a corrector, and gradient
estimation.

All step along a line of `line.py`, on which the ODE is dy/du = m. With the last p values they are

    y_{i+1} = y_i + (u_{i+1} - u_i) (c_0 m_i + c_1 m_{i-1} + ... + c_{p-1} m_{i-p+1})

and differ in c. A step to sigma = 0 ends at u = 0, an ordinary point of the line, and uses the history like any other
step. The first steps use as many values as there are. Their error is O(h^2), but at the noisy end m hardly changes in
sigma/alpha, so runs from there have the claimed orders. From the middle (img2img), and from alpha = 0 in the space
'flow', orders 3 and 4 fall towards 2. PNDM (pndm.py) has a better first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..grid import Grid, Nodes
from ..plan import Plan
from .expint import add, through
from .line import Line

EQUAL = (  # c for equal steps: the integral of the polynomial through the last 1, 2, 3, 4 values
    np.array([1.0]),
    np.array([3.0, -1.0]) / 2,
    np.array([23.0, -16.0, 5.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)


def lms(grid: Grid, steps: int, *, order: int = 4, space: str | None = None, lower_order_final: bool = False) -> Plan:
    """Linear multistep method with the coefficients of the actual steps (k-diffusion's LMS; DEIS's rho-AB, Zhang & Chen
    2022, arXiv 2204.13902). Order `order` on any grid; one call per step.

    Args:
        order: values used, at least 1.
        space: the line, 'kappa' or 'flow' (line.py).
        lower_order_final: the last steps go down to order 1.
    """
    if not isinstance(order, (int, np.integer)) or order < 1:
        raise ValueError(f"lms needs an order of at least 1, got {order!r}")
    nodes = grid.nodes(steps)
    return _adams(f"lms(order={order})", nodes, Line(nodes, space), order, lower_order_final, exact)


def ipndm(
    grid: Grid,
    steps: int,
    *,
    order: int = 4,
    variable: bool = False,
    space: str | None = None,
    lower_order_final: bool = False,
    as_published: bool = False,
) -> Plan:
    """iPNDM (Zhang & Chen 2022, arXiv 2204.13902, app. H.2): PNDM's coefficients (Liu et al. 2022, arXiv 2202.09778,
    eq. 12) without its warm-up. One call per step.

    The coefficients are those of equal steps in sigma/alpha. On a grid uniform in sigma/alpha its order is `order`. On
    other smooth grids it is 2 (1 for order=1), and 1 where neighbouring steps keep differing. With few steps the errors
    are small all the same.

    Args:
        order: values used, 1 to 4.
        variable: iPNDM_v (diff-sampler): the coefficients of the actual steps, so order `order` everywhere; = `lms`.
        space: the line, 'kappa' (the published methods) or 'flow' (line.py).
        lower_order_final: the last steps go down to order 1.
        as_published: `variable` with diff-sampler's coefficients, wrong at orders 3 and 4 (docs/corrections.md).
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"ipndm has orders 1 to 4, got {order!r}")
    if as_published and not variable:
        raise ValueError("as_published needs variable=True: equal-step ipndm has no published form of its own")
    weights = (published if as_published else exact) if variable else lambda at: EQUAL[len(at) - 1]
    name = f"{'ipndm_v' if variable else 'ipndm'}(order={order})"
    nodes = grid.nodes(steps)
    return _adams(name, nodes, Line(nodes, space), order, lower_order_final, weights)


def abm(grid: Grid, steps: int, *, order: int = 4, final_order: int = 2, space: str | None = "flow") -> Plan:
    """Adams-Bashforth predictor, Adams-Moulton corrector (PEC; Hairer, Norsett & Wanner, Solving ODEs I, sec. III.1).

    UniPC (Zhao et al. 2023, arXiv 2302.04867) does this along lambda, `abm` along a line. There u = sigma / (alpha +
    sigma) is finite at pure noise and at sigma = 0, so that no step needs a lower order. Order `order` + 1 if
    `final_order` = `order`. One call per step, since the corrector uses the call at the next point:

        predictor  P_{i+1} = X_i + integral of the polynomial through m_i, m_{i-1}, ...             (`order` values)
        corrector  X_{i+1} = X_i + integral of the polynomial through m_{i+1}, m_i, ..., m_{i+1} taken at P_{i+1}

    Args:
        order: values that the predictor uses, at least 1.
        final_order: the predictors go down to this many values in the last steps; more stable with few steps.
        space: the line, 'flow' or 'kappa' (line.py).
    """
    for name, value in {"order": order, "final_order": final_order}.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"abm needs {name} of at least 1, got {value!r}")
    nodes = grid.nodes(steps)
    line = Line(nodes, space)
    rows, change = [], np.zeros(0)
    for i in range(steps):
        h = line.u[i + 1] - line.u[i]
        p = min(order, i + 1, max(final_order, steps - i))
        at = np.arange(i + 1, i - p, -1)
        weights = h * exact((line.u[at[1:]] - line.u[i]) / h)
        # X_i = P_i + change: only weights differ, so the state that is carried is P, and one row does both
        rows.append(line.row(i, i + 1, *add(weights, change)))
        change = add(h * exact((line.u[at] - line.u[i]) / h), -np.append(0.0, weights))
    return Plan.build(f"abm(order={order})", line.target, nodes, rows)


def gradient_estimation(
    grid: Grid, steps: int, *, gamma: float = 2.0, space: str | None = None, lower_order_final: bool = True
) -> Plan:
    """Gradient estimation (Permenter & Yuan 2023, arXiv 2306.04848): Euler's step along `gamma m_i +
    (1 - gamma) m_{i-1}`. One call per step.

    The mean points further than the newest value, which cancels part of its error as an estimate of the direction to
    the data. Order 1: only on equal steps in sigma / alpha with gamma = 1.5 is it of order 2.

    Args:
        gamma: 1 is Euler's method, 2 the paper's choice.
        space: the line, 'kappa' (the paper) or 'flow' (line.py).
        lower_order_final: the last step is Euler's. The paper's algorithm does not do it, ComfyUI's does.
    """
    nodes = grid.nodes(steps)
    line, rows = Line(nodes, space), []
    for i in range(steps):
        h = line.u[i + 1] - line.u[i]
        first = i == 0 or (lower_order_final and i + 1 == steps)
        rows.append(line.row(i, i + 1, *((h,) if first else (gamma * h, (1.0 - gamma) * h))))
    return Plan.build(f"gradient_estimation(gamma={gamma:g})", line.target, nodes, rows)


def _adams(
    name: str,
    nodes: Nodes,
    line: Line,
    order: int,
    lower_order_final: bool,
    weights: Callable[[np.ndarray], np.ndarray],
) -> Plan:
    """`weights` gives c from the points of the values, relative to the newest and in steps (0, -h_1/h_0, ...)."""
    steps, rows = len(nodes) - 1, []
    for i in range(steps):
        p = min(order, i + 1, steps - i if lower_order_final else order)
        h = line.u[i + 1] - line.u[i]
        at = (line.u[i - np.arange(p)] - line.u[i]) / h
        rows.append(line.row(i, i + 1, *(h * weights(at))))
    return Plan.build(name, line.target, nodes, rows)


def exact(at: np.ndarray) -> np.ndarray:
    """Integrates the polynomial through the values over the step: the k-th derivative has weight 1/(k+1)!."""
    return through(at, [1.0 / math.factorial(k + 1) for k in range(len(at))])


def published(at: np.ndarray) -> np.ndarray:
    """diff-sampler's iPNDM_v. h_0 = 1 is the step; h_1, h_2, h_3 the ones before."""
    r = -np.diff(at)  # h_1, h_2, h_3
    c = np.zeros(len(at))
    c[0] = 1.0
    if len(at) > 1:
        c[:2] += np.array([1.0, -1.0]) / (2 * r[0])
    if len(at) > 2:
        # the bracket should close after the first quotient: (1 - 1/(3 (1+h_1))) (1+h_1) / (h_1 (h_1+h_2)) / 2
        second = (1 - 1 / (3 * (1 + r[0])) * (1 + r[0]) / (r[0] * (r[0] + r[1]))) / 2
        q = r[0] / r[1]
        c[:3] += second * np.array([1.0, -1 - q, q])
    if len(at) > 3:
        # the second summand should be subtracted, and the last weight should have h_2/h_3 in place of q
        first_three, all_four = 1 + r[0] + r[1], r[0] + r[1] + r[2]
        third = (1 - 1 / (3 * (1 + r[0]))) / 2 + (1 - 1 / (2 * (1 + r[0]))) / (6 * first_three)
        third *= (1 + r[0]) * first_three / (r[0] * (r[0] + r[1]) * all_four)
        g = r[0] * (r[0] + r[1]) / (r[1] * (r[1] + r[2]))
        c += third * np.array([1.0, -(1 + q + g), q + g * (1 + r[1] / r[2]), -g * q])
    return c
