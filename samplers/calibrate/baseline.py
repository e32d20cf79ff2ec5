"""The classical plan that suits a model best: what a fitted plan is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..plan import Plan
from ..sample import build_plan
from .problem import Problem, errors, rms

CLASSICAL: tuple[tuple[str, dict], ...] = (
    ("ddim", {}),
    ("dpmpp", {"order": 2}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3}),
    ("abm", {"order": 2}),
    ("ipndm", {"order": 2}),
    ("ipndm", {"order": 3}),
    ("deis", {"order": 2}),
)
GRIDS = ("logsnr", "karras", "sgm_uniform", "beta_time")
KEPT = 4  # one candidate in so many goes on from a round to the next


def classical(problem: Problem, calls: int) -> list[Plan]:
    """The plans that need no fitting, of this number of calls, to sigma = 0."""
    schedule, prediction = problem.schedule, problem.prediction
    options: dict = {"guidance": problem.guidance, "images": problem.images}
    plans = [build_plan(schedule, None, calls, prediction=prediction, end="zero", **options)]
    for solver, options in CLASSICAL:
        for kind in GRIDS:
            try:
                plans.append(build_plan(schedule, solver, calls, kind, prediction, **options))
            except ValueError:  # more order than calls, or a grid that needs alpha > 0 at the start
                continue
    return plans


def baseline(problem: Problem, calls: int, progress: Callable[[int, int], None] | None = None) -> Plan:
    """The plan of `classical` with the least root mean square error on `problem.fitting`.

    Nothing is fitted but this choice. It is made by successive halving: all candidates are run on the first batch, the
    best quarter of them on one more, the best quarter of these on twice as many batches, until one is left.

    Args:
        progress: called as `progress(done, total)` after each candidate.

    Raises:
        ValueError: calls < 1.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    plans = classical(problem, calls)
    rounds = list(_rounds(len(plans), len(problem.fitting)))
    done, total = 0, sum(count for count, _, _ in rounds)
    found: list[list[np.ndarray]] = [[] for _ in plans]
    order = list(range(len(plans)))
    for count, first, end in rounds:
        order = order[:count]
        for i in order:
            found[i].append(errors(plans[i], problem.fitting[first:end]))
            done += 1
            if progress is not None:
                progress(done, total)
        order.sort(key=lambda i: rms(np.concatenate(found[i])))
    return plans[order[0]]


def _rounds(candidates: int, batches: int) -> Iterator[tuple[int, int, int]]:
    """(how many candidates, first batch, end of the batches) of each round; the last candidate needs none."""
    first, end = 0, 1
    while candidates > 1 and first < batches:
        yield candidates, first, min(end, batches)
        candidates, first, end = -(-candidates // KEPT), end, 2 * end
