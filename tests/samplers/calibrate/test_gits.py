"""GITS: the dynamic programme against all paths, the costs against single steps, the grid against the default one."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from samplers import Grid, VPDiscrete, build_plan
from samplers.calibrate import Batch, Problem, errors, gits_grid, reference
from samplers.calibrate.gits import euler_errors, shortest_path

SD = VPDiscrete.scaled_linear()


def batch(mixture, seed, n=8):
    classes = torch.arange(n) % 2
    x = torch.randn(n, *mixture.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = mixture.model(SD, "epsilon", classes, 3.0)
    return Batch(model, x, reference(model, x, SD, calls=100))


@pytest.fixture(scope="module")
def problem(mixture):
    return Problem(SD, "epsilon", (batch(mixture, 0),), (batch(mixture, 1),), 3.0)


@pytest.mark.parametrize("coefficient", [1.0, 1.3])
def test_the_path_is_the_best_of_all(coefficient):
    costs = np.triu(np.random.default_rng(0).random((9, 9)), 1)

    def cost(path):
        total = 0.0
        for a, b in reversed(list(pairwise(path))):
            total = costs[a, b] + coefficient * total
        return total

    for points in range(2, 10):
        every = [(0, *inner, 8) for inner in combinations(range(1, 8), points - 2)]
        assert shortest_path(costs, points, coefficient) == list(min(every, key=cost))


def test_the_costs_are_those_of_ddim_steps(problem):
    """One DDIM step of the plug-in's own from each state, against the state that the fine plan reaches."""
    fine = build_plan(SD, "lms", 6, "logsnr", order=3)
    costs = euler_errors(fine, problem.fitting, "epsilon")
    only, states = problem.fitting[0], [problem.fitting[0].noise]
    fine.run(only.model, only.noise, callback=lambda k, state: states.append(state.input))
    for i, j in [(0, 1), (0, 4), (2, 5), (3, 6), (0, 6)]:
        times, end = (fine.t[[i]], "zero") if j == 6 else (fine.t[[i, j]], "t_end")
        step = build_plan(SD, "ddim", 1, Grid(SD, times=times, end=end)).run(only.model, states[i])
        assert costs[i, j] == pytest.approx((step - states[j]).square().mean().sqrt().item(), rel=1e-9, abs=1e-12)
    assert (np.tril(costs) == 0).all()


def test_places_the_calls_better_than_uniform_steps(problem):
    """DDIM, whose steps are what was measured, on held-out noises."""
    grid = gits_grid(problem, 6)
    assert len(grid.given) == 7 and grid.given.sigma[-1] == 0.0 and grid.given.t[0] == SD.t_max
    chosen, uniform = (errors(build_plan(SD, "ddim", 6, g), problem.heldout).mean() for g in (grid, Grid(SD, "time")))
    assert chosen < 0.7 * uniform


def test_says_what_it_cannot_do(problem):
    with pytest.raises(ValueError, match="pass fine=128"):
        gits_grid(problem, 64)
    with pytest.raises(ValueError, match="a path of 1 points"):
        shortest_path(np.zeros((4, 4)), 1)
