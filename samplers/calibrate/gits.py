"""GITS (Chen et al. 2024, arXiv 2405.11326): the nodes of a short plan, chosen from those of a long one.

All trajectories of a model bend in the same way. So the error of one long Euler step between any two nodes of a fine
grid is measured on a few of them, and dynamic programming finds the nodes with the least sum of errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..grid import Grid
from ..plan import Plan
from ..prediction import convert
from ..solvers.adams import lms
from .problem import Batch, Problem, mean_squares

COEFFICIENT = 1.15  # of the cost of later steps, as published


def gits_grid(problem: Problem, calls: int, *, fine: int = 60, coefficient: float = COEFFICIENT) -> Grid:
    """A grid of `calls` nodes, then sigma = 0, for any solver with one call per step.

    Args:
        problem: its fitting batches are used; a few trajectories are enough.
        fine: nodes of the fine grid, which are called once each.
        coefficient: see `shortest_path`.

    Raises:
        ValueError: calls < 1, or more calls than the fine grid has nodes.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")
    if calls > fine:
        raise ValueError(f"the {fine} nodes of the fine grid leave no choice of {calls} calls: pass fine={2 * calls}")
    grid = problem.rule(fine).grid
    plan = lms(grid or Grid(problem.schedule), fine, order=min(3, fine), space="flow")
    costs = euler_errors(plan, problem.fitting, problem.prediction)
    path = shortest_path(costs, calls + 1, coefficient)
    return Grid(problem.schedule, times=plan.t[path[:-1]], end="zero")


def euler_errors(plan: Plan, batches: Sequence[Batch], prediction: str) -> np.ndarray:
    """(M, M) for the plan's M points: entry (i, j), i < j, is the error of one Euler step (DDIM) from point i to j.

    It is the root mean square over samples and their elements, in units of x. Below the diagonal it is 0.
    The plan makes one call per step and ends at sigma = 0 or t_end.
    """
    points, count = len(plan.t), 0
    scale = plan.alpha + plan.sigma  # DDIM is Euler's method for x / scale against u = sigma / scale (solvers/line.py)
    u, squares = plan.sigma / scale, np.zeros((points, points))
    for batch in batches:
        states, slopes = [batch.noise], list[torch.Tensor]()

        def keep(k, state, states=states):
            states.append(state.input)

        def model(x, label, batch=batch, slopes=slopes):
            out = batch.model(x, label)
            k = len(slopes)
            slopes.append(convert(x, out.to(x.dtype), prediction, "flow", plan.alpha[k], plan.sigma[k]))
            return out

        with torch.no_grad():
            plan.run(model, batch.noise, prediction=prediction, callback=keep)
        for i, slope in enumerate(slopes):
            for j in range(i + 1, points):
                step = (scale[j] / scale[i]) * states[i] + (scale[j] * (u[j] - u[i])) * slope
                squares[i, j] += float(mean_squares(step - states[j]).sum())
        count += len(batch.noise)
    return np.sqrt(squares / count)


def shortest_path(costs: np.ndarray, points: int, coefficient: float = COEFFICIENT) -> list[int]:
    """The path of `points` points from 0 to M - 1 with the least cost (sec. 3.3, Algorithm 1).

    The cost of a path is `C[0, a] + g (C[a, b] + g (C[b, c] + ...))` with g the coefficient: above 1 it makes later
    steps count more, because an error there has less time to shrink.

    Args:
        costs: (M, M); only entries above the diagonal are read.
        points: how many points are kept, 2 to M.
    """
    size = len(costs)
    if not 2 <= points <= size:
        raise ValueError(f"a path of {points} points through {size} nodes: take 2 to {size}")
    best = np.full((size, points), np.inf)  # best[j, k]: from j to the end in k steps
    following = np.zeros((size, points), int)
    best[:-1, 1] = costs[:-1, -1]
    for k in range(2, points):
        for j in range(size - 2):
            through = costs[j, j + 1 : -1] + coefficient * best[j + 1 : -1, k - 1]
            following[j, k] = j + 1 + int(np.argmin(through))
            best[j, k] = through.min()
    path = [0]
    for k in range(points - 1, 1, -1):
        path.append(int(following[path[-1], k]))
    return [*path, size - 1]
