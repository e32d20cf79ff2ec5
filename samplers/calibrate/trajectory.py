"""The states of a long solver at the nodes of a short plan."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from ..grid import Grid
from ..plan import Plan
from ..schedule import Schedule
from ..solvers.adams import lms
from .problem import Batch

CALLS = 100  # the error of third-order steps is far below that of the short plan


def trajectory(batch: Batch, plan: Plan, schedule: Schedule, prediction: str, calls: int = CALLS) -> list:
    """The exact states at the plan's K + 1 times, by third-order Adams steps between them with about `calls` calls.

    The last one is `batch.target` if the plan ends at sigma = 0. Each is a tensor of the noise's shape.
    """
    angle, inside = np.arctan2(plan.sigma, plan.alpha), max(1, round(calls / len(plan)))
    last = len(plan) - (plan.sigma[-1] == 0.0)  # the network is not called between the last call and sigma = 0
    times = []
    for i, (a, b) in enumerate(pairwise(angle[: last + 1])):
        between = np.tan(a + np.arange(1, inside) / inside * (b - a))
        times += [plan.t[i], *schedule.t_of_lambda(-np.log(between))]
    if not times:  # a plan of one call, at the noise
        return [batch.noise, batch.target]
    fine = lms(Grid(schedule, times=[*times, plan.t[last]], end="t_end"), len(times), order=3, space="flow")
    states = [batch.noise]

    def keep(k, state):
        if (k + 1) % inside == 0:
            states.append(state.input)

    with torch.no_grad():
        fine.run(batch.model, batch.noise, prediction=prediction, callback=keep)
    return states if last == len(plan) else [*states, batch.target]
