"""The best of a list of classical plans for one model: what a fitted plan is compared with, or starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..plan import Plan
from ..sample import build_plan
from .problem import Problem, errors

# solver (None: the default rule), grid (None: the schedule's own), options; all end at sigma = 0
CANDIDATES: tuple[tuple[str | None, str | None, dict], ...] = (
    (None, None, {}),
    ("ddim", None, {}),
    ("dpmpp", None, {"order": 2}),
    ("dpmpp", "karras", {"order": 2}),
    ("dpmpp", None, {"order": 3}),
    ("dpmpp", "karras", {"order": 3}),
    ("unipc", None, {"order": 2}),
    ("unipc", "karras", {"order": 2}),
    ("unipc", None, {"order": 3}),
    ("unipc", "karras", {"order": 3}),
    ("ipndm", "karras", {}),
    ("deis", "karras", {"order": 3}),
    ("heun", "karras", {}),
    ("singlestep", None, {"order": 2}),
)


def classical(problem: Problem, calls: int, progress: Callable[[int, int], None] | None = None) -> Plan:
    """The plan of `CANDIDATES` with the least root mean square error on `problem.fitting`.

    Nothing is fitted but this choice. Candidates that cannot make so many calls are left out.

    Args:
        progress: called as `progress(done, total)` after each candidate.

    Raises:
        ValueError: calls < 1.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    plans = candidates(problem, calls)
    found = []
    for done, plan in enumerate(plans, 1):
        found.append(rms(errors(plan, problem.fitting)))
        if progress is not None:
            progress(done, len(plans))
    return plans[int(np.argmin(found))]


def candidates(problem: Problem, calls: int) -> list[Plan]:
    """Those of `CANDIDATES` that can make so many calls. The first is the default rule's."""
    plans = []
    for solver, grid, options in CANDIDATES:
        given = {"guidance": problem.guidance} if solver is None else options
        try:
            plan = build_plan(problem.schedule, solver, calls, grid, problem.prediction, **given)
        except ValueError:  # an order above the number of calls, or a number that the solver cannot make
            continue
        plans.append(replace(plan, name=f"{plan.name} on {grid or 'its own grid'}") if solver else plan)
    return plans


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))
