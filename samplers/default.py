"""The solver that is used if none is named: a rule of calls, guidance scale, schedule, and whether states are images.

    w       guidance scale, at least 1

images (and latents of images)
    solver  by r = calls / w: ipndm of order 1 (Euler's method) below r = 1.4 or 3 calls, of order 2 below r = 3 or 5
            calls; then abm, predictor and corrector, of order 2, of order 3 from r = 8 and 4 from r = 25 on. The last
            orders go down to 1 if calls + w < 14, else to 2
    nodes   uniform in u = k / (c^p + k) with k = (sigma / alpha)^p, from pure noise to t_end; p = 0.5, c = 7

vectors (independent elements)
    solver  by s = calls / w^(1/3): abm of order 2 from s = 3.9, 3 from 6.3 and 4 from 10 on; below, ipndm of order 2.
            The last orders go down to 1 below 6 calls, else to 2
    nodes   the same form with p = 0.8, c = 0.5 w^(1/3)

both
    A schedule that begins above sigma / alpha = 30 (1.5 times the calls, if that is more) is treated as if it began
    there: only the first call is made above.

Why: most of the error comes from the noise levels where the predicted x_0 changes fastest. For independent elements
those have equal parts of signal and noise; for images, whose pixels are correlated, more noise. Calls are densest
there (uniform log-SNR is p -> 0, karras c -> infinity, the time of rectified flow p = c = 1). Guidance multiplies the
network's slopes by w in that region, so higher orders are of use only with more calls. Above 30, where flow models
begin, x_0 hardly changes.
The numbers for vectors were fitted on mixtures, those for images on training prompts of assets/tiny-sdxl and
assets/tiny-dit (docs/default_solver.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ._names import unknown
from .grid import MOST_CALLS, Grid
from .plan import Plan
from .schedule import Schedule
from .solvers.adams import abm, ipndm

NOISIEST = 30.0  # sigma / alpha, from which the nodes below the first one are spread; see `default_solver`
OF_VECTORS = {2: 3.9, 3: 6.3, 4: 10.0}  # order of abm -> least calls / w^(1/3)
OF_IMAGES = {2: 3.0, 3: 8.0, 4: 25.0}  # order of abm -> least calls / w
SECOND = 1.4  # images: the least calls / w for order 2 of ipndm


@dataclass(frozen=True)
class Choice:
    """A solver, its grid and options: `build_plan(schedule, choice.solver, calls, choice.grid, **choice.options)`."""

    solver: Callable[..., Plan]
    grid: Grid | None  # None: as the caller places the calls
    options: dict = field(default_factory=dict)


def are_images(states: torch.Tensor) -> bool:
    """Whether states are images to `default_solver`: (batch, channels, height, width) of more than one line."""
    return states.ndim >= 4 and min(states.shape[-2:]) > 1


def default_solver(calls: int, guidance: float, schedule: Schedule, end: str = "t_end", images: bool = False) -> Choice:
    """The solver, its options and its grid.

    Args:
        calls: number of model calls (a guided pair is one), at least 1.
        guidance: scale of classifier-free guidance; 1 or less means no guidance.
        schedule: the network's.
        end: 't_end' stops at the schedule's smallest noise level. 'zero' goes on to sigma = 0: no noise is left, but
            the last step extrapolates and is somewhat less accurate.
        images: whether states are images or latents of images. `SolverScheduler` passes True, `sample` asks
            `are_images`.

    Raises:
        ValueError: calls < 1, a guidance that is not finite, unknown end.
    """
    if not isinstance(calls, (int, np.integer)) or calls < 1:
        raise ValueError(f"calls must be a whole number of at least 1, got {calls!r}")
    if calls > MOST_CALLS:
        raise ValueError(f"{calls} calls are more than the {MOST_CALLS} that a plan may have")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance!r}")
    if end not in ("t_end", "zero"):
        raise unknown("end", end, ("t_end", "zero"))
    calls, w = int(calls), max(1.0, float(guidance))
    rule = _for_images(calls, w) if images else _for_vectors(calls, w)
    grid = Grid(schedule, times=_times(schedule, calls, rule.power, rule.center, end), end=end)
    if rule.order == 1:
        return Choice(ipndm, grid, {"order": min(rule.first, calls)})
    return Choice(abm, grid, {"order": rule.order, "final_order": rule.final})


@dataclass(frozen=True)
class _Rule:
    """The order of abm, or 1 for ipndm; the order of ipndm; the least order of the last steps of abm; p and c."""

    order: int
    first: int
    final: int
    power: float
    center: float


def _for_images(calls: int, w: float) -> _Rule:
    order = 1 + sum(calls >= max(5.0, least * w) for least in OF_IMAGES.values())
    return _Rule(order, 2 if calls >= max(3.0, SECOND * w) else 1, 1 if calls + w < 14.0 else 2, 0.5, 7.0)


def _for_vectors(calls: int, w: float) -> _Rule:
    scale = w ** (1 / 3)
    order = 1 + sum(calls >= least * scale for least in OF_VECTORS.values())
    return _Rule(order, 2, 1 if calls < 6 else 2, 0.8, 0.5 * scale)


def _times(schedule: Schedule, calls: int, power: float, center: float, end: str) -> np.ndarray:
    """The calls and, for 't_end', the end: uniform in u = 1 / (1 + exp(power (lambda - lambda of `center`)))."""
    middle = -math.log(center)
    # with many calls the first step must become small, too
    start = max(float(schedule.lam(schedule.t_max)), -math.log(max(NOISIEST, 1.5 * calls)))
    noisy, clean = (
        1.0 / (1.0 + np.exp(power * (lam - middle))) for lam in (start, float(schedule.lam(schedule.t_min)))
    )
    if end == "t_end":
        u = np.linspace(noisy, clean, calls + 1)
    else:  # u = 0 is sigma = 0; the network is not called below t_min
        u = np.linspace(noisy, max(noisy / calls, clean), calls)
    with np.errstate(divide="ignore"):  # u = 1: pure noise of a flow schedule
        t = schedule.t_of_lambda(middle + np.log((1.0 - u) / u) / power)
    t[0] = schedule.t_max  # exactly, not by a round trip
    if end == "t_end":
        t[-1] = schedule.t_min
    return np.maximum(t, schedule.t_min)
