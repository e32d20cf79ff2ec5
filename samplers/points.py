"""The rules by which grid.py places n times from a to b: `SPACED[kind](schedule, a, b, n, rho)`.

Most are uniform in a function of the time (`_placed_in`). The others place n numbers `first` to `last` in it as
`last + (first - last) f(w)`, with f(0) = 1 and f(1) = 0 at the fraction w of the way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._needs import needs
from .published import LEVELS

Points = Callable[[float, float, int], np.ndarray]


def beta_quantiles(a: float, b: float) -> Points:
    """Quantiles of the distribution Beta(a, b) (Lee et al. 2024, arXiv 2407.12173)."""

    def place(first: float, last: float, n: int) -> np.ndarray:
        quantile = needs("scipy.special", "a grid of beta quantiles").betaincinv
        return last + (first - last) * quantile(a, b, 1 - np.linspace(0, 1, n))

    return place


def tangent(first: float, last: float, n: int, steepness: float = 4.0, pivot: float = 0.6) -> np.ndarray:
    """Two pieces of an arctangent that join halfway, at w = f = 1/2. Each piece is an S: flat at its ends, steep at the
    fraction `pivot` of it.

    So the numbers are dense at both ends and in the middle. In one piece, with v = 0 to 1,

        g(v) = (A(v) - A(1)) / (A(0) - A(1)),  A(v) = arctan(steepness (pivot - v)).
    """
    w = np.linspace(0, 1, n)

    def s_curve(v):
        start, end, here = (np.arctan(steepness * (pivot - x)) for x in (0.0, 1.0, v))
        return (here - end) / (start - end)

    f = np.where(w < 0.5, 0.5 + 0.5 * s_curve(2 * w), 0.5 * s_curve(2 * w - 1))
    return last + (first - last) * f


def linear_quadratic(first: float, last: float, n: int, low: float = 0.025) -> np.ndarray:
    """Half of the steps go the first `low` of the way in equal parts, the others the rest along a parabola with the
    same slope at the join (Movie Gen, Polyak et al. 2024, arXiv 2410.13720)."""
    steps = n - 1
    i, linear = np.arange(n), steps // 2
    if not linear:
        return np.linspace(first, last, n)
    slope, past = low / linear, np.maximum(0, i - linear)
    done = slope * i + (1.0 - slope * steps) * (past / (steps - linear)) ** 2
    return first + (last - first) * done


def _placed_in(forward, backward, points=np.linspace):
    """A rule for n times from a to b, spaced by `points(fa, fb, n)` in f = forward(t)."""

    def place(schedule, a, b, n, rho):
        with np.errstate(divide="ignore"):
            fa, fb = forward(schedule, a, rho), forward(schedule, b, rho)
        if not np.isfinite([fa, fb]).all():
            raise ValueError(
                "this grid needs alpha > 0 at t_start and sigma > 0 at t_end: use grid='time', or a smaller t_start"
            )
        t = backward(schedule, points(fa, fb, n), rho)
        t[0], t[-1] = a, b if n > 1 else a  # the ends exactly, not by a round trip
        return t

    return place


SPACED = {
    "time": _placed_in(lambda s, t, rho: t, lambda s, u, rho: u),
    "quadratic": _placed_in(lambda s, t, rho: np.sqrt(t), lambda s, u, rho: u**2),
    # uniform in lambda (DPM-Solver, arXiv 2206.00927, sec. 3.4); "lu_lambdas" elsewhere
    "logsnr": _placed_in(lambda s, t, rho: s.lam(t), lambda s, u, rho: s.t_of_lambda(u)),
    # The others space the noise level: sigma / alpha, or sigma itself for flow ("exponential" is "logsnr" otherwise).
    "exponential": _placed_in(
        lambda s, t, rho: np.log(s.noise_level(t)), lambda s, u, rho: s.t_of_noise_level(np.exp(u))
    ),
    # EDM, arXiv 2206.00364, eq. 5
    "karras": _placed_in(lambda s, t, rho: s.noise_level(t) ** (1 / rho), lambda s, u, rho: s.t_of_noise_level(u**rho)),
    "beta": _placed_in(
        lambda s, t, rho: s.noise_level(t), lambda s, u, rho: s.t_of_noise_level(u), beta_quantiles(0.6, 0.6)
    ),
}


def _published(levels):
    def place(schedule, a, b, n, rho):
        return np.clip(schedule.t_of_lambda(-np.log(levels(n))), min(a, b), max(a, b))

    return place


SPACED |= {name: _published(levels) for name, levels in LEVELS.items()}


def _u(schedule, t, rho):
    """sigma / (alpha + sigma), which is finite at pure noise; sigma of a flow."""
    return schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t))


def _of_u(schedule, u, rho):
    with np.errstate(divide="ignore"):
        return schedule.t_of_lambda(np.log1p(-u) - np.log(u))


def _to_zero(schedule, a, b, n, rho):
    """Uniform in time from a to 0, which is past the smallest time of the schedule."""
    return np.append(np.maximum(np.linspace(a, 0.0, n)[:-1], min(a, b)), b)


# Grids of ComfyUI's schedulers; of those that end at sigma = 0 the last of n + 1 points is replaced by it.
OPEN = {
    "simple": _to_zero,
    "sgm_uniform": SPACED["time"],
    # beta sampling in time (arXiv 2407.12173); "beta" above has its quantiles in the noise level, as diffusers
    "beta_time": _placed_in(lambda s, t, rho: t, lambda s, u, rho: u, beta_quantiles(0.6, 0.6)),
    "beta57": _placed_in(lambda s, t, rho: t, lambda s, u, rho: u, beta_quantiles(0.5, 0.7)),
    "linear_quadratic": _placed_in(
        lambda s, t, rho: s.noise_level(t), lambda s, u, rho: s.t_of_noise_level(u), linear_quadratic
    ),
    "tangent": _placed_in(_u, _of_u, tangent),
}
SPACED |= OPEN
# the optimum for a Gaussian of unit variance: uniform in arctan(sigma / alpha) (AYS, arXiv 2404.14507)
SPACED["kl_optimal"] = _placed_in(
    lambda s, t, rho: np.arctan2(s.sigma(t), s.alpha(t)), lambda s, u, rho: s.t_of_lambda(-np.log(np.tan(u)))
)
