"""DPM-Solver-v3 for one model: its statistics, and the options and nodes that fit best."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..grid import Grid
from ..plan import Plan
from ..solvers.v3 import dpm_solver_v3
from ..statistics import Statistics
from .problem import Problem, errors
from .statistics import estimate


def v3(
    problem: Problem,
    calls: int,
    *,
    statistics: Statistics | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The plan of DPM-Solver-v3 (arXiv 2310.13268) with the smallest mean error on the problem's fitting batches.

    The authors choose order, corrector and pseudo-order by hand, model by model (app. D.2). Here all of them are tried,
    on the nodes of the default rule, uniform in lambda, and uniform in the root of t. That costs as much as 40 samples
    of every fitting noise.

    Args:
        statistics: of the model at the problem's guidance, for any number of calls. None: estimated.
        progress: called as `progress(done, total)` while candidates are tried.

    Returns: a plan of `calls` calls that ends at sigma = 0, for the problem's prediction.
    """
    statistics = estimate(problem, pooled=True) if statistics is None else statistics
    best, least = None, np.inf
    every = list(candidates(problem, calls))
    for done, (grid, options) in enumerate(every, 1):
        plan = dpm_solver_v3(grid, calls, statistics=statistics, **options).for_prediction(problem.prediction)
        try:
            error = float(errors(plan, problem.fitting).mean())
        except FloatingPointError:  # it blows up
            error = np.inf
        if best is None or error < least:
            best, least = plan, error
        if progress is not None:
            progress(done, len(every))
    assert best is not None  # noqa: S101 -- for mypy
    return best


def candidates(problem: Problem, calls: int) -> Iterator[tuple[Grid, dict]]:
    """What `v3` tries: nodes, and options of dpm_solver_v3."""
    schedule = problem.schedule
    grids = [problem.rule(calls).grid or Grid(schedule), Grid(schedule, "quadratic")]
    if np.isfinite(schedule.lam(schedule.t_max)):
        grids.append(Grid(schedule, "logsnr"))
    for grid in grids:
        for order in range(1, min(3, calls) + 1):
            for corrector in ("none", "full") if order == 1 else ("none", "pseudo", "full"):
                for pseudo in (False, True) if order == 3 else (False,):
                    yield grid, {"order": order, "corrector": corrector, "pseudo": pseudo}
