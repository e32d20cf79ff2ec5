"""UniPC (Zhao et al. 2023, arXiv 2302.04867), and the multistep predictor-corrector that SA-Solver shares with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np

from .._names import unknown
from ..grid import Grid, Nodes
from ..plan import Plan, Row, row
from .expint import ExpStep, add

VARIANTS = ("bh1", "bh2", "vary_coeff")


def unipc(
    grid: Grid,
    steps: int,
    *,
    order: int = 3,
    variant: Literal["bh1", "bh2", "vary_coeff"] = "bh2",
    corrector: bool = True,
    disable_corrector: Collection[int] = (),
    target: Literal["sample", "epsilon"] = "sample",
    lower_order_final: bool = True,
    as_published: bool = False,
) -> Plan:
    """UniPC of any order p: order p + 1 with the corrector, p without. One call per step; the corrector costs none.

    The first steps use the order that the history allows. A step to sigma = 0 is first order, with every variant:
    there lambda is infinite. The last step is not corrected, since no call follows it.

    Args:
        order: p, at least 1; above 4 only for smooth problems and many calls.
        variant: a formula through two values (the predictor of order 2, the corrector of order 1) has one number
            that need only be 1/2 + O(h). 'bh2' and 'bh1' take 1/2 with B(h) = e^h - 1 and B(h) = h, 'vary_coeff' the
            exact integral. All other formulas are the same in the three, because B(h) cancels.
        corrector: False is UniP, the predictor alone.
        disable_corrector: the steps (0 is the first) that are not corrected.
        target: interpolate x_0 ('sample') or the noise ('epsilon').
        lower_order_final: end with orders ..., 2, 1, at any number of steps.
        as_published: 'vary_coeff' with the index error of the authors' corrector, which makes it first order.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"unipc needs a whole order of at least 1, got {order!r}")
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    if target not in ("sample", "epsilon"):
        raise unknown("target", target, ("sample", "epsilon"))
    weights = {"bh1": bh1, "bh2": _bh2, "vary_coeff": _as_published if as_published else ExpStep.weights}[variant]
    nodes = grid.nodes(steps)
    stages = []
    for i, p in enumerate(climb(order, steps, lower_order_final)):
        corrected = corrector and i not in disable_corrector and i + 1 < steps
        stages.append((ExpStep(nodes, i, i + 1, target), p, p + 1 if corrected else 0))
    rows, _ = predict_and_correct(nodes, stages, weights)
    return Plan.build(f"unipc(order={order})", target, nodes, rows)


def climb(order: int, steps: int, lower_order_final: bool) -> list[int]:
    """The order of each step: as high as the history allows and, with `lower_order_final`, down to 1 at the end."""
    order = min(order, steps)
    last = [min(order, steps - i) if lower_order_final else order for i in range(steps)]
    return [i + 1 if i + 1 < order else last[i] for i in range(steps)]


def predict_and_correct(
    nodes: Nodes,
    stages: Sequence[tuple[ExpStep, int, int]],
    weights: Callable[..., np.ndarray],
    reevaluate: bool = False,
) -> tuple[list[Row], np.ndarray]:
    """The rows of a predictor-corrector that interpolates the m_i in lambda: UniP and UniC (eq. 3), SA-Solver.

    The predicted state P and the corrected state X of a node have the same start and noise and differ in m's only:

        P_{i+1} = carry X_i + sum_j w_j m_{i-j} + noise z
        X_{i+1} = P_{i+1} + v_0 m_{i+1} + sum_j (v_{j+1} - w_j) m_{i-j}

    So the corrector needs no second state: it changes the weights that lead from P_i to P_{i+1}, in one row.

    Args:
        stages: per step (step, values that the predictor uses, values that the corrector uses: the new one and
            history, or 0 for none).
        weights: `weights(step, *indices)`, the weight of the value of each node in `indices`.
        reevaluate: call the model again at the corrected states (PECE), except at the last node.

    Returns: the rows (one per call but for a call at the last node), and X - P of the last node as weights of the m's.
    """
    every = 2 if reevaluate else 1  # columns between the values of two nodes: PECE has one of a predicted state between
    rows, change = [], np.zeros(0)
    for i, (step, p, c) in enumerate(stages):
        # A value at lambda = -inf (pure noise) gives no derivative, and an infinite step has no polynomial.
        known = max(1, int(np.isfinite(nodes.lam[: i + 1]).sum()))
        p, c = (min(p, known), min(c, known + 1)) if step.finite else (1, min(c, 2))
        w = _integral(step, weights, range(i, i - p, -1))
        rows.append(row(step.carry, *add(step.carry * change, _spread(w, every)), noise=step.noise))
        change = np.zeros(0)
        if c:
            new, *old = add(_integral(step, weights, range(i + 1, i + 1 - c, -1)), np.append(0.0, -w))
            change = np.append(new, _spread(old, every))
        if reevaluate and i + 1 < len(stages):
            rows.append(row(1.0, *change))
            change = np.zeros(0)
    return rows, change


def _integral(step: ExpStep, weights, at: Sequence[int]) -> np.ndarray:
    if len(at) == 1:
        return np.array([step.first])
    if not step.finite:  # from alpha = 0: x_0 is linear in e^lambda = alpha / sigma there, so both ends weigh the same
        return np.array([0.5, 0.5]) * step.first
    return weights(step, *at)


def bh1(step: ExpStep, *at: int) -> np.ndarray:
    """The interpolation weights; two values with B(h) = h, which replaces the integral phi_2(z h) by phi_2(0) = 1/2."""
    return _with_slope(step, at, 0.5 * step.scale * step.h)


def _bh2(step: ExpStep, *at: int) -> np.ndarray:
    """The same with B(h) = e^h - 1, which replaces it by phi_1(z h) / 2."""
    return _with_slope(step, at, 0.5 * step.first)


def _with_slope(step: ExpStep, at: Sequence[int], slope: float) -> np.ndarray:
    """Interpolation weights; of two values, with this weight of h m' = (m_a - m_b) h / (lambda_a - lambda_b)."""
    exact = step.weights(*at)
    if len(at) != 2:
        return exact
    lam = step.lam[list(at)]
    return exact + (slope - step.weight(2)) * step.h / (lam[0] - lam[1]) * np.array([1.0, -1.0])


def _as_published(step: ExpStep, *at: int) -> np.ndarray:
    """As `ExpStep.weights`, with the authors' error in the corrector.

    With D_j = (m_j - m_0) / r_j and C_jk = r_j^(k-1) / k!, sum_k H_k (C^-1 D)_k is the exact correction. Their code
    leaves out the new value's part of all H_k but the last, the history's part of the last, and in the last reads the
    row of C^-1 before it (a loop index used after its loop).
    """
    if step.lam[at[0]] == step.lam_s:  # the predictor is right
        return step.weights(*at)
    new, _, *old = at
    r = (step.lam[[*old, new]] - step.lam_s) / step.h
    n = len(r)
    right = np.linalg.inv([[rj**k / math.factorial(k + 1) for k in range(n)] for rj in r])
    coded = np.zeros((n, n))
    coded[:-1, :-1] = right[:-1, :-1]
    coded[-1, -1] = right[max(n - 2, 0), -1]
    *of_old, of_new = np.array([step.weight(k + 2) for k in range(n)]) @ coded / r
    return np.array([of_new, step.first - of_new - sum(of_old), *of_old])


def _spread(values: Sequence[float] | np.ndarray, every: int) -> np.ndarray:
    """The values with `every` - 1 zeros between them."""
    out = np.zeros(every * (len(values) - 1) + 1)
    out[::every] = values
    return out
