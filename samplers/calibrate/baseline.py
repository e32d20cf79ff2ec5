"""The classical plan that suits a model best: what a fitted plan is compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..plan import Plan
from ..sample import build_plan
from .problem import Problem, errors, rms

CLASSICAL: tuple[tuple[str, dict], ...] = (
    ("dpmpp", {"order": 2}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3}),
    ("abm", {"order": 2}),
    ("ipndm", {"order": 2}),
    ("ipndm", {"order": 3}),
    ("deis", {"order": 2}),
)
GRIDS = ("logsnr", "karras", "time", "beta")
FINALISTS = 4


def classical(problem: Problem, calls: int) -> list[Plan]:
    """The plans that need no fitting, of this number of calls, to sigma = 0."""
    schedule, prediction = problem.schedule, problem.prediction
    plans = [build_plan(schedule, None, calls, prediction=prediction, guidance=problem.guidance, end="zero")]
    for solver, options in CLASSICAL:
        for kind in GRIDS:
            try:
                plans.append(build_plan(schedule, solver, calls, kind, prediction, **options))
            except ValueError:  # more order than calls, or a grid that needs alpha > 0 at the start
                continue
    return plans


def baseline(problem: Problem, calls: int, progress: Callable[[int, int], None] | None = None) -> Plan:
    """The plan of `classical` with the least root mean square error on `problem.fitting`.

    Nothing is fitted but this choice. All candidates are run on the first batch, the best four of them on all.

    Args:
        progress: called as `progress(done, total)` after each candidate.

    Raises:
        ValueError: calls < 1.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    plans = classical(problem, calls)
    total = len(plans) + min(FINALISTS, len(plans))
    found = []
    for plan in plans:
        found.append(rms(errors(plan, problem.fitting[:1])))
        if progress is not None:
            progress(len(found), total)
    best = []
    for i in np.argsort(found, kind="stable")[:FINALISTS]:
        best.append((rms(errors(plans[i], problem.fitting)), int(i)))
        if progress is not None:
            progress(len(found) + len(best), total)
    return plans[min(best)[1]]
