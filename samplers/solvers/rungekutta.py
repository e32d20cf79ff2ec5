"""Explicit Runge-Kutta methods for the probability-flow ODE: Euler, Heun and DPM2 with EDM's churn, DEIS's rhoRK."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .._names import unknown
from ..grid import Grid, Nodes
from ..plan import Plan, Row, Step, row
from ..schedule import Schedule
from .line import SPACES, Line


class Churn(NamedTuple):
    """EDM's stochasticity: the options s_churn, s_tmin, s_tmax and s_noise of `runge_kutta`."""

    amount: float
    low: float
    high: float
    noise: float


class Tableau(NamedTuple):
    """Butcher's: stage j starts from `a[j - 1]`, the step ends with `b`. The nodes c are the sums of a's rows."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


EULER = Tableau((), (1.0,))
TABLEAUX = {  # the last digit is the order; Hairer, Norsett & Wanner, Solving ODEs I, II.1
    "euler": EULER,
    "heun": Tableau(((1.0,),), (1 / 2, 1 / 2)),
    "kutta3": Tableau(((1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)),
    "ralston3": Tableau(((1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "heun3": Tableau(((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "houwen3": Tableau(((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "ssp3": Tableau(((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "rk4": Tableau(((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
DEIS_NAMES = {
    "1euler": "euler",
    "2heun": "heun",
    "3kutta": "kutta3",
    "3ral": "ralston3",
    "3heun": "heun3",
    "3vdh": "houwen3",
    "3ssprk": "ssp3",
    "4rk": "rk4",
}


def runge_kutta(
    grid: Grid,
    steps: int,
    *,
    method: str = "kutta3",
    space: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Plan:
    """An explicit Runge-Kutta method by its tableau: rhoRK of DEIS (Zhang & Chen 2023, arXiv 2204.13902, sec. 4).

    Order 1 to 4 and as many calls per step as the tableau has stages. A step to sigma = 0 is Euler's and takes one
    call, so n intervals that end there take stages * (n - 1) + 1. Calls that are left over make a first step of fewer
    stages (Euler's, Heun's or Kutta's), which bounds the order of the whole by one more than its own.

    Args:
        method: 'euler', 'heun', 'kutta3', 'ralston3', 'heun3', 'houwen3', 'ssp3' or 'rk4', or DEIS's names for them:
            '1euler', '2heun', '3kutta', '3ral', '3heun', '3vdh', '3ssprk' or '4rk'.
        space: in which variable the ODE is solved. 'kappa' (sigma / alpha: DEIS and EDM), 'flow' (rectified flow's;
            the default where alpha = 0), or 'time' (the schedule's own t: EDM's eq. 4 with its sigma(t) and s(t)).
        s_churn: EDM's stochasticity (Karras et al. 2022, arXiv 2206.00364, algorithm 2). Before a step from a noise
            level sigma / alpha within [s_tmin, s_tmax] noise is added that raises it by the factor 1 + min(s_churn /
            intervals, sqrt(2) - 1), at most to the noisiest level of the schedule. s_noise multiplies that noise.
    """
    method = DEIS_NAMES.get(method, method)
    if method not in TABLEAUX:
        raise unknown("method", method, TABLEAUX)
    tableau = TABLEAUX[method]
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    return _explicit(f"runge_kutta({method})", grid, steps, lambda *_: tableau, space, churn)


def euler(
    grid: Grid,
    steps: int,
    *,
    space: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Plan:
    """Euler's method with EDM's churn; without churn, and except in the space 'time', it is DDIM. Order 1, one call
    per step; the options are those of `runge_kutta`."""
    return _explicit("euler", grid, steps, lambda *_: EULER, space, Churn(s_churn, s_tmin, s_tmax, s_noise))


def heun(
    grid: Grid,
    steps: int,
    *,
    alpha: float = 1.0,
    space: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Plan:
    """EDM's stochastic sampler (Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2). Order 2, two calls per
    step, one in the step to sigma = 0 and, if a call is left over, in the first.

    Args:
        alpha: where the second stage lies, in (0, 1] (algorithm 3): 1 is Heun's method, 1/2 the midpoint method, 2/3
            Ralston's.
        space, s_churn, s_tmin, s_tmax, s_noise: see `runge_kutta`.
    """
    if not 1e-6 < alpha <= 1:
        raise ValueError(f"heun needs alpha in (0, 1], above 1e-6, got {alpha}")
    tableau = Tableau(((alpha,),), (1 - 1 / (2 * alpha), 1 / (2 * alpha)))
    return _explicit("heun", grid, steps, lambda *_: tableau, space, Churn(s_churn, s_tmin, s_tmax, s_noise))


def dpm2(
    grid: Grid,
    steps: int,
    *,
    r: float = 0.5,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Plan:
    """DPM-Solver-2 as k-diffusion's `dpm_2`, with EDM's churn (Lu et al. 2022, arXiv 2206.00927, algorithm 1).
    Order 2, two calls per step, one in the step to sigma = 0 and, if a call is left over, in the first.

    Args:
        r: where between the ends, in log(sigma / alpha), the second stage lies, in (0, 1].
        s_churn, s_tmin, s_tmax, s_noise: see `runge_kutta`.
    """
    if not 1e-6 < r <= 1:
        raise ValueError(f"dpm2 needs r in (0, 1], above 1e-6, got {r}")

    def tableau(u: float, v: float, space: str) -> Tableau:
        kappa = (lambda u: u / (1 - u)) if space == "flow" else lambda u: u
        c = r
        if r < 1 and not (space == "flow" and u == 1.0):  # from alpha = 0 there is no geometric mean
            middle = kappa(u) ** (1 - r) * kappa(v) ** r
            c = ((middle / (1 + middle) if space == "flow" else middle) - u) / (v - u)
        return Tableau(((c,),), (1 - 1 / (2 * r), 1 / (2 * r)))  # c = r + O(h), which is enough for order 2

    return _explicit("dpm2", grid, steps, tableau, None, Churn(s_churn, s_tmin, s_tmax, s_noise))


def outer_nodes(grid: Grid, calls: int, stages: int) -> tuple[Nodes, int]:
    """The ends of the steps of a solver with `stages` calls per step (one in a step to sigma = 0), and the number of
    calls of the first step. The first step takes the calls that are left over, so that any number can be made.

    A lower order costs least in the first step, because eps hardly changes at high noise.
    """
    if not isinstance(calls, (int, np.integer)) or calls < 1:
        return grid.nodes(calls), 1  # raises
    to_zero = int(grid.end == "zero" if grid.given is None else grid.given.sigma[-1] == 0)
    whole, rest = divmod(int(calls) - to_zero, stages)
    return grid.nodes(whole + (rest > 0) + to_zero), rest or stages


class _Clock(Line):
    """The schedule's own time: y = x, u = t, m = dx/dt = alpha' x_0 + sigma' eps (EDM, eq. 4, for any schedule)."""

    target = "flow"  # eps - x_0; with x it determines both at every level

    def __init__(self, nodes: Nodes):
        self.u, self.scale = nodes.t, np.ones(len(nodes))

    @staticmethod
    def reads(schedule: Schedule, nodes: Nodes) -> np.ndarray:
        """m as combinations of (x, eps - x_0)."""
        (d_alpha, d_sigma), alpha, sigma = schedule.rates(nodes.t), nodes.alpha, nodes.sigma
        return np.stack([d_alpha + d_sigma, d_sigma * alpha - d_alpha * sigma], 1) / (alpha + sigma)[:, None]


def _explicit(
    name: str,
    grid: Grid,
    calls: int,
    tableau: Callable[[float, float, str], Tableau],
    space: str | None,
    churn: Churn,
) -> Plan:
    """The plan of the Runge-Kutta method with the coefficients `tableau(u, v, space)` in a step from u to v."""
    if space not in (None, "time", *SPACES):
        raise unknown("space", space, ("time", *SPACES))
    if not (churn.amount >= 0 and churn.noise >= 0):
        raise ValueError(f"s_churn and s_noise must not be negative, got {churn.amount} and {churn.noise}")
    schedule = grid.schedule
    nodes, of_first = outer_nodes(grid, calls, len(tableau(0.9, 0.5, "kappa").b))
    n = len(nodes) - 1
    space = space or ("flow" if nodes.alpha[0] == 0.0 else "kappa")
    line_of = _Clock if space == "time" else lambda nodes: Line(nodes, space)
    begin, noise = _raised(schedule, nodes, churn)
    u, v = line_of(begin).u, line_of(nodes).u[1:]
    tables = [tableau(u[i], v[i], space) if nodes.sigma[i + 1] else EULER for i in range(n)]
    if of_first < len(tables[0].b):
        tables[0] = TABLEAUX[("euler", "heun", "kutta3")[of_first - 1]]

    times = []  # of the calls
    for i, (a, _) in enumerate(tables):
        stages = [sum(c) for c in a]
        inner = [nodes.t[i + 1] if c == 1 else _time_at(schedule, space, u[i] + c * (v[i] - u[i])) for c in stages]
        times += [begin.t[i], *inner]
    every = Nodes.at(schedule, [*times, *nodes.t[1:n]])  # the calls, then the ends of the steps
    every = every.then_zero() if nodes.sigma[n] == 0.0 else Nodes.at(schedule, [*times, *nodes.t[1:]])
    line, s = line_of(every), 0
    rows: list[Step] = []
    for i, (a, b) in enumerate(tables):
        end, h = len(times) + i, v[i] - u[i]
        for j, weights in enumerate(a, 1):  # k_j = f(y_s + h sum_l a_jl k_l)
            rows.append((line.row(s, s + j, *(h * w for w in weights[::-1])), row(1.0)))
        carry, ms, *_ = line.row(s, end, *(h * w for w in b[::-1]))  # y_t = y_s + h sum_j b_j k_j
        up = begin.alpha[i + 1] / nodes.alpha[i + 1] if noise[i + 1] else 1.0
        rows.append(Row(up * carry, tuple(up * m for m in ms), noise[i + 1]))
        s += len(b)
    start = [[begin.alpha[0] / nodes.alpha[0], noise[0]]] * 2 if noise[0] else None
    points = every.take([*range(s), len(every) - 1])
    reads = _Clock.reads(schedule, every.take(range(s))) if space == "time" else None
    return Plan.build(name, line.target, points, rows, reads, start)


def _time_at(schedule: Schedule, space: str, u: float) -> float:
    if space == "time":
        return u
    return float(schedule.t_of_lambda(np.log(1.0 - u) - np.log(u) if space == "flow" else -np.log(u)))


def _raised(schedule: Schedule, nodes: Nodes, churn: Churn) -> tuple[Nodes, np.ndarray]:
    """The beginnings of the n steps after churn, and the noise before each of them (0 after the last), in x's units."""
    n = len(nodes) - 1
    begin = nodes.take(range(n))
    gamma = min(churn.amount / n, math.sqrt(2.0) - 1.0)  # algorithm 2, line 4
    if not gamma:
        return begin, np.zeros(n + 1)
    if nodes.lam[-1] < nodes.lam[0]:
        raise ValueError("s_churn needs a grid that runs from noise to data")
    level = np.exp(-begin.lam)
    inside = np.flatnonzero((level >= churn.low) & (level <= churn.high) & np.isfinite(level))
    top = np.maximum(np.exp(-schedule.lam(schedule.t_limits[1])), level[inside])
    raised = np.minimum((1.0 + gamma) * level[inside], top)
    t, noise = begin.t.copy(), np.zeros(n + 1)
    t[inside] = schedule.t_of_lambda(-np.log(raised))
    begin = Nodes.at(schedule, t)
    noise[inside] = churn.noise * begin.alpha[inside] * np.sqrt(raised**2 - level[inside] ** 2)  # line 6
    return begin, noise
