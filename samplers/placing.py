"""Where a scheduler config places the calls: the grid for `SolverScheduler.set_timesteps`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .grid import Grid, Nodes
from .schedule import EDM, RectifiedFlow, Schedule

SIGMA_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "logsnr",
    "use_beta_sigmas": "beta",
}

# Solvers whose last call is at the smallest time of a flow. FlowMatchEulerDiscreteScheduler and
# FlowMatchHeunDiscreteScheduler have it there, and abm corrects its last step with it. Others, which work in lambda,
# make nothing of it (schedule.RectifiedFlow); diffusers' UniPC, DPM-Solver and DEIS do not call there either.
CALLED_LAST = ("ddim", "euler", "heun", "abm")


def place(config, schedule: Schedule, chosen: Grid | None, given: dict[str, Any]) -> Grid:
    """The grid that a config describes.

    Args:
        config: of a `SolverScheduler`.
        chosen: the grid of `default_solver`; used where the config names none.
        given: 'timesteps' or 'sigmas' from the caller, falling; empty if only the number of calls is known.
    """
    end = "zero" if config.final_sigmas_type == "zero" else "t_end"
    flagged = next((kind for flag, kind in SIGMA_FLAGS.items() if config[flag]), None)
    if config.use_flow_sigmas:
        if "timesteps" in given:
            return Grid(schedule, end=end, timesteps=given["timesteps"])
        if "sigmas" in given:
            return _flow_sigmas(config, schedule, given["sigmas"], end, flagged)
        return _flow(config, schedule, chosen, end, flagged)
    t_start, t_end = schedule.t_max, schedule.t_min
    if np.isfinite(config.lambda_min_clipped):
        t_start = min(t_start, float(schedule.t_of_lambda(config.lambda_min_clipped)))
    if flagged and not config.grid:
        t_start = min(t_start, _time_at(config, schedule, "sigma_max", t_start))
        t_end = max(t_end, _time_at(config, schedule, "sigma_min", t_end))
    kind = config.timestep_spacing if config.grid == "config" else config.grid or flagged
    if chosen is not None and not (kind or given or t_start != schedule.t_max):
        return chosen
    return Grid(schedule, kind, end=end, t_start=t_start, t_end=t_end, steps_offset=config.steps_offset, **given)


def shifted(config, mu) -> RectifiedFlow:
    """The schedule of a flow that is shifted by the image's size. Its smallest time is shifted once.

    Raises:
        ValueError: mu is missing, or is no number that makes a finite shift above 0.
    """
    if mu is None:
        raise ValueError("this config has use_dynamic_shifting: pass mu= to set_timesteps")
    steps = config.num_train_timesteps
    try:
        shift = math.exp(mu) if config.time_shift_type == "exponential" else float(mu)
        return RectifiedFlow(shift, steps, t_min=1.0 / steps)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"mu must be a number that makes a finite shift above 0, got {mu!r}") from None


# -- flow models, as in FlowMatchEulerDiscreteScheduler: shift, stretch to `shift_terminal`, then the flags ------------


def _flow(config, schedule: Schedule, chosen: Grid | None, end: str, flagged: str | None) -> Grid:
    """The grid of a flow model by the number of calls."""
    terminal, kind = config.shift_terminal, config.grid or flagged
    kind = "time" if kind == "config" else kind
    if flagged and not config.grid and (config.sigma_min, config.sigma_max) != (None, None):
        if config.sigma_min is None or config.sigma_max is None:
            raise ValueError("a flow model needs both of sigma_min and sigma_max")
        levels = Grid(EDM(config.sigma_min, config.sigma_max), kind, end=end)  # UniPC's: sigma / alpha
        return _Relevelled(schedule, levels, lambda level: level / (1.0 + level))
    if terminal and kind in (None, "time"):
        return _Relevelled(schedule, Grid(schedule, "time", end=end), lambda level: _stretched(level, terminal))
    if chosen is not None and not kind:
        return chosen
    if config.solver in CALLED_LAST:
        kind = kind or "time"
    t_end = float(schedule.t_of_noise_level(terminal)) if terminal else None
    return Grid(schedule, kind, end=end, t_end=t_end)


def _flow_sigmas(config, schedule: Schedule, sigmas: np.ndarray, end: str, flagged: str | None) -> Grid:
    """The grid of a flow model through given sigmas, which are sigmas before the shift."""
    if sigmas[0] > 1.0 + 1e-6 or sigmas[-1] < 0.0:
        raise ValueError(f"sigmas of a flow model lie between 0 and 1, got {sigmas.tolist()}")
    calls = schedule.sigma(np.minimum(sigmas, 1.0)[: len(sigmas) - (sigmas[-1] == 0.0)])
    calls = _stretched(calls, config.shift_terminal) if config.shift_terminal else calls
    if flagged and len(calls) > 1:
        kind = "time" if config.grid == "config" else config.grid or flagged
        t_start, t_end = schedule.t_of_noise_level(calls[[0, -1]])
        calls = schedule.sigma(Grid(schedule, kind, t_start=t_start, t_end=t_end).nodes(len(calls)).t[:-1])
    return Grid(schedule, end="zero" if sigmas[-1] == 0.0 else end, sigmas=calls)


class _Relevelled(Grid):
    """Another grid's nodes, moved to the noise levels `level(theirs)`."""

    def __init__(self, schedule: Schedule, nodes_of: Grid, level: Callable[[np.ndarray], np.ndarray]):
        super().__init__(schedule, end=nodes_of.end)
        self._nodes_of, self._level = nodes_of, level

    def _placed(self, n: int) -> Nodes:
        t = self._nodes_of.nodes(n).t
        to_zero = self.end == "zero"
        levels = self._level(self._nodes_of.schedule.noise_level(t[:-1] if to_zero else t))
        nodes = Nodes.at(self.schedule, self.schedule.t_of_noise_level(levels))
        return nodes.then_zero() if to_zero else nodes


def _stretched(sigma: np.ndarray, terminal: float) -> np.ndarray:
    """1 - sigma scaled so that the last sigma is `terminal` (FlowMatchEulerDiscreteScheduler's shift_terminal)."""
    if sigma[-1] == 1.0:  # one call
        return sigma
    return 1.0 - (1.0 - sigma) * ((1.0 - terminal) / (1.0 - sigma[-1]))


# -- the flags' range -------------------------------------------------------------------------------------------------


def _time_at(config, schedule: Schedule, option: str, default: float) -> float:
    """The time at the noise level that an option names."""
    level = config[option]
    if level is None:
        return default
    least, most = schedule.noise_level(np.array(schedule.t_limits))
    if not 0.999 * least <= level <= 1.001 * most:
        raise ValueError(f"{option} = {level:g} lies outside the schedule, {least:g} to {most:g}")
    return float(schedule.t_of_noise_level(np.clip(level, least, most)))
