"""The solver to take when nobody asks for one: a rule that looks at the number of calls, the guidance and the schedule.

    w       guidance scale, at least 1
    solver  abm of order p = min(4, 1 + floor(calls / (3 + 2 log w))), down to 2 in the last steps; for p = 1, ipndm of
            order 2, whose extrapolation is the cautious one
    nodes   uniform in u = k / (c + k) with k = (sigma / alpha)^0.8 and c = (0.4 sqrt(w))^0.8, from pure noise to t_end

Why: errors come from where the denoiser changes its mind, sigma/alpha around the data's own scale; uniform u puts most
calls there, unlike uniform log-SNR (too many at the clean end) or uniform time (too many at the noisy end). Guidance
moves those decisions to more noise and multiplies the network's slopes by w, so nodes move up with sqrt(w) and high
orders, which amplify what is not yet resolved, wait for more calls. docs/default_solver.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ._names import unknown
from .grid import Grid
from .plan import Plan
from .schedule import Schedule
from .solvers.abm import abm
from .solvers.adams import ipndm

POWER = 0.8  # 0 would be uniform log-SNR, 1 (with center 1) the uniform time of rectified flow
CENTER = 0.4  # sigma/alpha with the most nodes around it, without guidance; data of about unit variance


@dataclass(frozen=True)
class Choice:
    """What `default_solver` chose: `build_plan(schedule, choice.solver, calls, choice.grid, **choice.options)`."""

    solver: Callable[..., Plan]
    grid: Grid
    options: dict = field(default_factory=dict)


def default_solver(calls: int, guidance: float, schedule: Schedule, end: str = "t_end") -> Choice:
    """The solver, its options and its grid.

    Args:
        calls: number of model calls (a guided pair is one), at least 1.
        guidance: scale of classifier-free guidance; 1 and below is none.
        schedule: the network's.
        end: 't_end' stops at the schedule's smallest noise level; 'zero' aims all nodes at sigma = 0, to which the last
            call's step extrapolates (somewhat less accurate, no noise left).

    Raises:
        ValueError: calls < 1, a guidance that is not finite, unknown end.
    """
    if not isinstance(calls, (int, np.integer)) or calls < 1:
        raise ValueError(f"calls must be a whole number of at least 1, got {calls!r}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance!r}")
    if end not in ("t_end", "zero"):
        raise unknown("end", end, ("t_end", "zero"))
    w = max(1.0, float(guidance))
    grid = Grid(schedule, times=_times(schedule, int(calls), CENTER * math.sqrt(w), end), end=end)
    order = min(4, 1 + int(calls / (3.0 + 2.0 * math.log(w))))
    if order == 1:
        return Choice(ipndm, grid, {"order": min(2, int(calls))})
    return Choice(abm, grid, {"order": order, "final_order": 2})


def _times(schedule: Schedule, calls: int, center: float, end: str) -> np.ndarray:
    """The calls and, for 't_end', the end: uniform in u = 1 / (1 + exp(POWER (lambda - lambda of `center`)))."""
    middle = -math.log(center)
    noisy, clean = (1.0 / (1.0 + np.exp(POWER * (schedule.lam(t) - middle))) for t in (schedule.t_max, schedule.t_min))
    if end == "t_end":
        u = np.linspace(noisy, clean, calls + 1)
    else:  # u = 0 is sigma = 0; the network is not called below t_min
        u = np.linspace(noisy, max(noisy / calls, clean), calls)
    with np.errstate(divide="ignore"):  # u = 1: pure noise of a flow schedule
        t = schedule.t_of_lambda(middle + np.log((1.0 - u) / u) / POWER)
    t[0] = schedule.t_max  # exactly, not by a round trip
    if end == "t_end":
        t[-1] = schedule.t_min
    return np.maximum(t, schedule.t_min)
