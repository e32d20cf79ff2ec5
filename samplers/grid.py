"""Where the model is called: the times of a plan, and its end.

A `Grid` is a schedule, a range of times and a rule; `grid.nodes(n)` gives the n + 1 nodes of n intervals. With
`end="zero"` the last interval goes from the n-th node to sigma = 0 (the clean image). With `end="t_end"` the n + 1
nodes end at `t_end`, as in the papers' codes.

Nodes run one way and no two are equal. They run from noise to data, or towards noise if t_start is below t_end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ._names import unknown
from .points import OPEN, SPACED
from .published import LEVELS
from .schedule import Schedule, VPDiscrete


class IntervalsError(ValueError):
    """The number of given nodes does not fit the number of intervals that the solver needs."""


@dataclass(frozen=True)
class Nodes:
    """Points of a schedule: float64 arrays of one length. At sigma = 0, lam is +inf; at alpha = 0 it is -inf."""

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    lam: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.t)

    @classmethod
    def at(cls, schedule: Schedule, t) -> Nodes:
        t = np.atleast_1d(np.asarray(t, np.float64))
        return cls(t, schedule.alpha(t), schedule.sigma(t), schedule.lam(t), schedule.model_time(t))

    def take(self, indices) -> Nodes:
        """The nodes at these indices. They may repeat: a solver with two calls per step may use a node twice."""
        return Nodes(*(getattr(self, name)[list(indices)] for name in ("t", "alpha", "sigma", "lam", "label")))

    def then_zero(self) -> Nodes:
        """These nodes and then the clean image: alpha = 1, sigma = 0 in every schedule."""
        end = {"t": 0.0, "alpha": 1.0, "sigma": 0.0, "lam": np.inf, "label": np.nan}
        return Nodes(**{name: np.append(getattr(self, name), value) for name, value in end.items()})


def _labels(kind: str, total: int, n: int, offset: int) -> np.ndarray:
    """Integer labels as diffusers' multistep schedulers space them (timestep_spacing; arXiv 2305.08891, table 2)."""
    if n > total:
        raise ValueError(f"grid {kind!r} has only {total} labels, but {n} steps need as many: take fewer steps")
    labels: np.ndarray
    if kind == "ddim_uniform":  # ComfyUI's
        labels = np.arange(n)[::-1] * (total // n) + 1.0
    elif kind == "linspace":
        labels = np.linspace(0, total - 1, n + 1).round()[::-1][:-1]
    elif kind == "leading":
        labels = (np.arange(n + 1) * (total // (n + 1)))[::-1][:-1] + offset
    else:  # trailing
        labels = np.arange(total, 0, -total / n).round()[:n] - 1
    if not 0 <= labels[0] < total:
        raise ValueError(f"grid {kind!r} with {offset=} begins at label {labels[0]:g}, outside 0 to {total - 1}")
    return labels.astype(np.float64)


LABEL_GRIDS = ("linspace", "leading", "trailing")  # diffusers' timestep_spacing
GRIDS = (*SPACED, *LABEL_GRIDS, "ddim_uniform")


class Grid:
    """A rule that places the nodes of a schedule.

    Args:
        schedule: the noise schedule.
        kind: one of `GRIDS`. None: the schedule's default, 'logsnr', or 'sgm_uniform' for flow. Both 'time' and
            'sgm_uniform' are uniform in t. With end='zero' the last call of 'time' is at t_end, that of 'sgm_uniform'
            one step before, since its last point is replaced by sigma = 0.
            'ays', 'ays_sdxl' (Stable Diffusion) and 'optimal_steps' (FLUX) are published for 10 steps and interpolated
            log-linearly for other numbers; 'gits' (SD 1.5) is for 1 to 20.
        end: 'zero' (step to sigma = 0 at the end) or 't_end'.
        t_start, t_end: the range; default t_max and t_min of the schedule. With t_start < t_end it runs towards noise.
        rho: exponent of 'karras'.
        steps_offset: added to the labels of 'leading'.
        sigmas, timesteps, times: at most one of them; the nodes themselves, from noise to data, each below the one
            before. `sigmas` are noise levels sigma / alpha (sigma for flow), `timesteps` the network's labels. A last
            sigma of 0 means end='zero'. The last of `times` is the end, unless end='zero' adds one.

    Raises:
        ValueError: unknown names; nodes that do not go down or lie outside the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        kind: str | None = None,
        *,
        end: str = "zero",
        t_start: float | None = None,
        t_end: float | None = None,
        rho: float = 7.0,
        steps_offset: int = 0,
        sigmas=None,
        timesteps=None,
        times=None,
    ):
        kind = schedule.default_grid if kind is None else kind
        if kind not in GRIDS:
            raise unknown("grid", kind, GRIDS)
        if end not in ("zero", "t_end"):
            raise unknown("grid end", end, ("zero", "t_end"))
        if sum(given is not None for given in (sigmas, timesteps, times)) > 1:
            raise ValueError("pass at most one of sigmas, timesteps and times")
        if not 0 < rho < np.inf:
            raise ValueError(f"rho must be above 0, got {rho}")
        self.schedule, self.kind, self.end, self.rho, self.steps_offset = schedule, kind, end, rho, steps_offset
        self.t_start = schedule.t_max if t_start is None else t_start
        self.t_end = schedule.t_min if t_end is None else t_end
        low, high = schedule.t_limits
        for t in (self.t_start, self.t_end):
            if not (low <= t <= high and np.isfinite(t)):
                raise ValueError(f"t = {t:g} lies outside the schedule, which runs from {low:g} to {high:g}")
        if self.t_start == self.t_end:
            raise ValueError(f"the grid starts and ends at t = {self.t_start:g}: choose another t_start or t_end")
        if end == "zero" and self.t_start < self.t_end:
            raise ValueError("a grid towards noise (t_start < t_end) cannot end at sigma = 0: pass end='t_end'")
        self.given = self._given(sigmas, timesteps, times)

    def _given(self, sigmas, timesteps, times) -> Nodes | None:
        of: Callable[[np.ndarray], np.ndarray]
        if sigmas is not None:
            values, of = falling("sigmas", sigmas), self.schedule.t_of_noise_level
        elif timesteps is not None:
            values, of = falling("timesteps", timesteps), self.schedule.t_of_model_time
        elif times is not None:
            values, of = falling("times", times), lambda t: t
        else:
            return None
        to_zero = self.end == "zero"
        if timesteps is None and values[-1] == 0.0:
            values, to_zero = values[:-1], True
        if not len(values):
            raise ValueError("the given sigmas leave no model call: at least one must be above 0")
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # outside the schedule
            t = of(values)
        low, high = self.schedule.t_limits
        slack = 1e-3 * (self.schedule.t_max - self.schedule.t_min)  # published tables are rounded (14.615 for 14.6146)
        inside = (t >= low - slack) & (t <= high + slack)
        if not inside.all():
            first = values[~inside][0]
            raise ValueError(
                f"{first:g} lies outside the schedule: t from {low:g} to {high:g}, network labels from "
                f"{self.schedule.model_time(low):g} to {self.schedule.model_time(high):g}"
            )
        t = np.clip(t, low, high)
        nodes = Nodes.at(self.schedule, t)
        if to_zero:
            return _apart(nodes.then_zero(), "the given values")
        if times is not None:
            return _apart(nodes, "the given times")
        nodes = Nodes.at(self.schedule, np.append(t, self.t_end))
        null = nodes.t[-2] == nodes.t[-1]  # a call at t_end, whose step changes nothing, as in diffusers' PNDM
        _apart(nodes.take(range(len(nodes) - null)), "the given values and t_end")
        return nodes

    def nodes(self, n: int) -> Nodes:
        """n + 1 nodes for n intervals, from the noisy end on."""
        if not isinstance(n, (int, np.integer)) or n < 1:
            raise ValueError(f"steps must be a whole number of model calls, at least 1; got {n!r}")
        if n > MOST_CALLS:
            raise ValueError(f"a plan has at most {MOST_CALLS} steps, got {n}")
        if self.given is not None:
            if len(self.given) != n + 1:
                raise IntervalsError(
                    f"the given sigmas or timesteps make {len(self.given) - 1} intervals, this solver needs {n}"
                )
            return self.given
        return _apart(self._placed(n), f"grid {self.kind!r} of {n} steps")

    def _placed(self, n: int) -> Nodes:
        if self.kind not in SPACED:
            if not isinstance(self.schedule, VPDiscrete):
                raise ValueError(f"grid {self.kind!r} places integer labels and needs a VPDiscrete schedule")
            top = round(float(self.schedule.model_time(self.t_start))) + 1
            t = self.schedule.t_of_model_time(_labels(self.kind, top, n, self.steps_offset))
            nodes = Nodes.at(self.schedule, t)
            return nodes.then_zero() if self.end == "zero" else Nodes.at(self.schedule, np.append(t, self.t_end))
        if (
            self.kind in LEVELS or self.kind in OPEN
        ) and self.end == "zero":  # n + 1 points whose last is replaced by 0
            t = SPACED[self.kind](self.schedule, self.t_start, self.t_end, n + 1, self.rho)[:-1]
            return Nodes.at(self.schedule, t).then_zero()
        points = n if self.end == "zero" else n + 1
        nodes = Nodes.at(self.schedule, SPACED[self.kind](self.schedule, self.t_start, self.t_end, points, self.rho))
        return nodes.then_zero() if self.end == "zero" else nodes


MOST_CALLS = 100_000  # of one plan


def falling(name: str, values) -> np.ndarray:
    """The values as float64; they must be finite, each below the one before.

    Raises:
        ValueError: they are not; the message names the wrong entry.
    """
    try:
        values = np.array([float(v) for v in values], np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}") from None
    if not len(values):
        raise ValueError(f"{name} must not be empty")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values.tolist()}")
    steps = np.diff(values)
    if len(steps) and (steps > 0).all():
        raise ValueError(
            f"{name} must go down, from noise to data, but entry 1 is {values[1]:g} after {values[0]:g}. To go towards "
            "noise pass a t_start below t_end and end='t_end'"
        )
    if not (steps < 0).all():
        bad = int(np.argmax(steps >= 0)) if steps[0] < 0 else int(np.argmax(steps <= 0))
        raise ValueError(
            f"{name} must be strictly monotone, but entry {bad + 1} is {values[bad + 1]:g} after {values[bad]:g}"
        )
    return values


def _apart(nodes: Nodes, what: str) -> Nodes:
    """The nodes, if they run one way, no two are equal, and sigma is above 0 at every call."""
    steps = np.diff(nodes.t)
    if not (nodes.sigma[:-1] > 1e-30).all():
        least = nodes.sigma[:-1].min()
        raise ValueError(f"{what}: the network cannot be called at sigma = {least:.3g}: leave that node out")
    if not ((steps < 0).all() or (steps > 0).all()):
        k = int(np.argmax(steps >= 0) if nodes.t[-1] < nodes.t[0] else np.argmax(steps <= 0))
        raise ValueError(
            f"{what}: nodes {k} and {k + 1} are too close (t = {nodes.t[k]:g} and {nodes.t[k + 1]:g}): take fewer "
            "steps, another grid or another range"
        )
    return nodes
