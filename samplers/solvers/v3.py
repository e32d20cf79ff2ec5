"""DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268): an exponential integrator fitted to one model.

With y = x / alpha and kappa = sigma / alpha the probability-flow ODE is y' = -kappa eps (in lambda). The statistics l,
s, b of the model define

    f = kappa eps - l y                                (eq. 5; l is chosen so that f hardly depends on x)
    g = e^{-S} f - int e^{-S} b,   S = int s           (eq. 8; s and b so that g hardly changes)

and then, with L = int l, exactly

    y_t = e^{L_s - L_t} y_s - int_s^t e^{L - L_t} f dlambda,   f = e^{S} (g + int e^{-S} b).       (eq. 9)

The polynomial through the last values of g makes this linear in x_s, the last f and 1: a row of a plan. A call's m is
its f, which the corrector keeps ("N_theta is not computed again"): so the corrector changes only x, as in UniPC.

l = 1, s = b = 0 is f = -x_0, DPM-Solver++. To sigma = 0 the solver goes to the last noise level of the statistics and
from there by DDIM, with the f that it expects there.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .._names import unknown
from ..grid import Grid, Nodes
from ..plan import ANCHOR, HISTORY, ONE, Plan
from ..statistics import Statistics
from .unipc import climb
from .v3_integrals import Integrals, exact, trapezoid

CORRECTORS = {"none": None, "same": (0, False), "pseudo": (1, True), "full": (1, False)}  # added order, pseudo


def dpm_solver_v3(
    grid: Grid,
    steps: int,
    *,
    statistics: Statistics | str | os.PathLike | None = None,
    order: int = 3,
    corrector: Literal["none", "same", "pseudo", "full"] = "pseudo",
    pseudo: bool = False,
    half: bool = False,
    lower_order_final: bool = True,
    as_published: bool = False,
) -> Plan:
    """DPM-Solver-v3: order `order` (one more with corrector='full'; 2 with `pseudo`). One call per step.

    Args:
        statistics: of the model at its guidance scale, or a file of them. None: l = 1, s = 0, b = 0, which needs no
            model.
        order: 1 to 3. The authors take 3, and 2 with guidance.
        corrector: the step is made again with the new value, at no call. 'same': of the predictor's order; 'full': one
            order more; 'pseudo': one more value, used as by `pseudo` (the authors' default).
        pseudo: every derivative from as few of the newest values as possible ("pseudo-order", app. D.2): second order,
            more robust with 5 to 10 calls.
        half: correct only above half of the schedule's time ("half-corrector", app. D.2, for strong guidance).
        lower_order_final: the last steps go down to order 1.
        as_published: the authors' integrals (trapezoidal sums over the noise levels of the statistics), for which the
            nodes are moved to the nearest of those levels. Needs statistics and a grid that ends at t_end.

    Raises:
        ValueError: noise levels far outside those of the statistics, or unknown options.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpm_solver_v3 has orders 1 to 3, got {order!r}")
    if corrector not in CORRECTORS:
        raise unknown("corrector", corrector, CORRECTORS)
    if isinstance(statistics, str | os.PathLike):
        statistics = Statistics.load(statistics)
    if not isinstance(statistics, Statistics | None):
        raise ValueError(f"statistics must be samplers.Statistics or the path of a file, got {type(statistics)}")
    nodes = grid.nodes(steps)
    if statistics is None:
        ends = np.sort(np.append(grid.schedule.lam([grid.schedule.t_min]), nodes.lam[np.isfinite(nodes.lam)][:1]))
        ones = np.ones(2)
        ends = ends if ends[1] > ends[0] else ends[0] + np.arange(2.0)
        statistics = Statistics(ends, ones, 0 * ones, 0 * ones)
    else:
        statistics.check_range(nodes.lam)
    if as_published:
        nodes, integrals = _published(grid, nodes, statistics)
    else:
        integrals = exact(statistics)
    orders = climb(order, steps, lower_order_final)
    maps = _Maps(nodes, statistics, integrals, max(orders) + 1)
    corrected = [
        corrector != "none" and (not half or nodes.t[i + 1] > 0.5 * grid.schedule.t_max) and i + 1 < steps
        for i in range(steps)
    ]
    rows = _rows(maps, orders, pseudo, CORRECTORS[corrector], corrected)
    l = statistics.at(np.where(np.isfinite(nodes.lam), nodes.lam, statistics.lam[0])[:steps])[0]
    reads = np.stack([np.zeros_like(l), -np.ones_like(l)], axis=1)  # f = (1 - l) y - x_0; at alpha = 0 it is -x_0
    there = np.isfinite(nodes.lam[:steps])
    reads[there, 0] = (1.0 - l[there]) / nodes.alpha[:steps][there].reshape(-1, *[1] * (l.ndim - 1))
    name = f"dpm_solver_v3(order={order})"
    return Plan(name, "sample", nodes.t, nodes.alpha, nodes.sigma, nodes.label[:steps], rows, reads)


def _rows(maps: _Maps, orders: list[int], pseudo: bool, corrector, corrected: list[bool]) -> np.ndarray:
    """The rows of predictor and corrector; see `unipc.predict_and_correct` for how two states become one row."""
    nodes, steps = maps.nodes, len(orders)
    first = int(not np.isfinite(nodes.lam[0]))  # f at lambda = -inf gives no derivative
    shape = maps.statistics.shape
    rows = np.zeros((steps, 2, HISTORY + min(steps, max(orders) + 1), *shape))
    change = _Sum({}, 0.0)
    for i, order in enumerate(orders):
        p = max(1, min(order, i + 1 - first))
        predicted = maps.step(i, [i - j for j in range(p)], pseudo)
        carry = maps.pieces[i].carry
        rows[i, :, ANCHOR] = carry
        total = predicted.plus(change, carry)
        rows[i, :, ONE] = total.constant
        for node, weight in total.weights.items():
            rows[i, :, HISTORY + i - node] = weight
        change = _Sum({}, 0.0)
        if corrected[i] and i >= first:
            more, pseudo_too = corrector
            c = p + more
            if c > 1:
                at = [i, i + 1, *(i - j for j in range(1, c - 1))]
                change = maps.step(i, at, pseudo_too).plus(predicted, -1.0)
    used = np.flatnonzero((rows != 0).any(axis=(0, 1, *range(3, rows.ndim))))
    return rows[:, :, : max(HISTORY + 1, used.max() + 1)]


class _Sum(NamedTuple):
    """sum of weights[i] f_i, and a constant; the numbers may broadcast over the sample."""

    weights: dict
    constant: float | np.ndarray

    def plus(self, other: _Sum, factor) -> _Sum:
        nodes = {**self.weights, **other.weights}
        weights = {i: self.weights.get(i, 0.0) + factor * other.weights.get(i, 0.0) for i in nodes}
        return _Sum(weights, self.constant + factor * other.constant)


@dataclass
class _Piece:
    """A step s -> t: `x_t = carry x_s - sum_k moments[k] g^(k) - source`, with g relative to s (g_s = f_s)."""

    carry: float | np.ndarray
    moments: list
    source: float | np.ndarray


class _Maps:
    """All steps of a grid, as linear maps of x_s and of the f of any nodes."""

    def __init__(self, nodes: Nodes, statistics: Statistics, integrals, orders: int):
        self.nodes, self.statistics, self.integrals = nodes, statistics, integrals
        self.pieces: list[_Piece] = []
        zero = np.zeros(statistics.shape)
        self.s_sum, self.b_sum = [zero], [zero]  # int s and int e^{-S} b, from the first finite node on
        for i in range(len(nodes) - 1):
            start, end = np.isfinite(nodes.lam[[i, i + 1]])
            piece, found = (self._to_zero if not end else self._inside if start else self._from_noise)(i, orders)
            self.pieces.append(piece)
            if start and end:
                self.b_sum.append(self.b_sum[-1] + np.exp(-self.s_sum[-1]) * found.beta)
                self.s_sum.append(self.s_sum[-1] + found.s)
            else:
                self.b_sum.append(self.b_sum[-1])
                self.s_sum.append(self.s_sum[-1])

    def _inside(self, i: int, orders: int) -> tuple[_Piece, Integrals]:
        alpha, lam = self.nodes.alpha, self.nodes.lam
        found = self.integrals(lam[i], lam[i + 1], orders)
        carry = alpha[i + 1] / alpha[i] * np.exp(-found.l)
        return _Piece(carry, [alpha[i + 1] * m for m in found.moments], alpha[i + 1] * found.source), found

    def _to_zero(self, i: int, orders: int) -> tuple[_Piece, Integrals]:
        """To the clean end of the statistics, and by DDIM to sigma = 0: y = (1 - l) y_end - f_end."""
        edge = max(float(self.statistics.lam[-1]), float(self.nodes.lam[i]))
        h = edge - self.nodes.lam[i]
        found = self.integrals(self.nodes.lam[i], edge, orders)
        rest, grow = 1.0 - self.statistics.at(np.array([edge]))[0][0], np.exp(found.s)
        moments = [rest * m + grow * h**k / math.factorial(k) for k, m in enumerate(found.moments)]
        carry = rest * np.exp(-found.l) / self.nodes.alpha[i]
        return _Piece(carry, moments, rest * found.source + grow * found.beta), found

    def _from_noise(self, i: int, orders: int) -> tuple[_Piece, Integrals]:
        """From alpha = 0, where f = -x_0: by DDIM to the noisy end of the statistics, and on with the f there."""
        alpha, lam = self.nodes.alpha[i + 1], self.nodes.lam[i + 1]
        edge = min(float(self.statistics.lam[0]), float(lam))
        found = self.integrals(edge, lam, 1)
        rest = 1.0 - self.statistics.at(np.array([edge]))[0][0]
        of_y = np.exp(-found.l) - found.moments[0] * rest
        moments = [alpha * (of_y + found.moments[0]), *[0.0 * found.l] * (orders - 1)]
        return _Piece(alpha * of_y * math.exp(-edge) / self.nodes.sigma[i], moments, alpha * found.source), found

    def step(self, i: int, at: list[int], pseudo: bool) -> _Sum:
        """Step i without its carry, with derivatives from the nodes `at`; the first of them is i."""
        piece, lam = self.pieces[i], self.nodes.lam[at]
        if len(at) == 1:
            return _Sum({i: -piece.moments[0]}, -piece.source)
        weights = _derivatives(lam - lam[0], pseudo).T @ np.stack(
            [math.factorial(k) * np.ravel(m) for k, m in enumerate(piece.moments[: len(at)])]
        )
        total = _Sum({}, -piece.source)
        for node, w in zip(at, weights, strict=True):
            w = w.reshape(np.shape(piece.moments[0]))
            shift = np.exp(self.s_sum[i] - self.s_sum[node])
            past = np.exp(self.s_sum[i]) * (self.b_sum[node] - self.b_sum[i])  # g = shift f - past
            total = total.plus(_Sum({node: -w * shift}, w * past), 1.0)
        return total


def _derivatives(d: np.ndarray, pseudo: bool) -> np.ndarray:
    """(derivative k, value): g^(k) / k! from values at the offsets d, d[0] = 0."""
    n = len(d)
    if not pseudo:
        return np.linalg.inv(np.vander(d, increasing=True))
    table = np.zeros((n, n))  # Newton's divided differences of the first k + 1 values
    for k in range(n):
        for j in range(k + 1):
            table[k, j] = 1.0 / np.prod([d[j] - d[m] for m in range(k + 1) if m != j])
    return table


def _published(grid: Grid, nodes: Nodes, statistics: Statistics):
    """The nodes at the nearest noise levels of the statistics, and trapezoidal sums between those."""
    if not np.isfinite(nodes.lam).all():
        raise ValueError("as_published needs a grid that begins at alpha > 0 and ends at t_end")
    lam = statistics.lam
    at = np.rint((len(lam) - 1) * (nodes.lam - lam[0]) / (lam[-1] - lam[0])).astype(int)
    at = np.clip(at, 0, len(lam) - 1)
    if (np.diff(at) == 0).any():
        raise ValueError(f"two nodes fall on one of the {len(lam)} noise levels of the statistics: take fewer steps")
    moved = Nodes.at(grid.schedule, grid.schedule.t_of_lambda(lam[at]))
    return moved, trapezoid(statistics, at)
