"""The search over decisions: its budget, its children, its predictor, and that it finds what is better."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from samplers import RectifiedFlow, VPLinear, build_plan
from samplers.calibrate import Batch, Problem, errors, reference, searched
from samplers.calibrate.decisions import MOST_VALUES, Decision
from samplers.calibrate.search import Candidate, beginnings, child, predict, ranking

VP = VPLinear()


def batch(mixture, seed, n):
    classes = torch.arange(n) % 2
    x = torch.randn(n, *mixture.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = mixture.model(VP, "epsilon", classes, 3.0)
    return Batch(model, x, reference(model, x, VP, calls=100))


@pytest.fixture(scope="module")
def problem(mixture):
    return Problem(VP, "epsilon", (batch(mixture, 0, 16),), (batch(mixture, 1, 32),), 3.0)


def test_finds_better_plans_within_the_budget(problem):
    """On noises that it did not see it beats every classical solver that it began with."""
    only, calls = problem.fitting[0], []

    def model(x, t):
        calls.append(len(x))
        return only.model(x, t)

    heard = []
    counted = Problem(VP, "epsilon", (Batch(model, only.noise, only.target),), problem.heldout, 3.0)
    plan = searched(counted, 4, budget=600, progress=lambda *done: heard.append(done))
    assert len(plan) == 4 and len(calls) <= 600
    assert heard[-1][1] == 600 and heard[-1][0] >= len(calls) > 550
    classical = min(errors(c.plan(VP), problem.heldout, "epsilon").mean() for c in beginnings(problem, 4))
    rule = errors(build_plan(VP, None, 4, guidance=3.0), problem.heldout).mean()
    assert errors(plan, problem.heldout, "epsilon").mean() < min(classical, rule)


def test_the_same_seed_finds_the_same_plan(problem):
    one, two = (searched(problem, 3, budget=230, seed=5) for _ in range(2))
    assert (one.rows == two.rows).all() and (one.t == two.t).all()


def test_children_are_plans(problem):
    rng, parents = np.random.default_rng(0), beginnings(problem, 5)
    lowest = float(VP.sigma(VP.t_min) / (VP.alpha(VP.t_min) + VP.sigma(VP.t_min)))
    made = [child(parents, lowest, rng) for _ in range(300)]
    for each in made:
        assert all(a > b for a, b in pairwise(each.levels)) and each.levels[-1] > lowest * (1 - 1e-9)
        assert all(decision.order <= decision.points <= MOST_VALUES for decision in each.decisions)
    plans = 0
    for each in made:
        try:
            plans += len(each.plan(VP)) == 5
        except ValueError as error:
            assert "multiply its state" in str(error)
    assert plans > 250 and len(set(made)) > 250


@pytest.mark.parametrize("schedule", [VPLinear(), RectifiedFlow(3.0)], ids=["vp", "flow"])
def test_calls_are_at_the_levels_of_a_candidate(schedule):
    top = float(schedule.sigma(schedule.t_max) / (schedule.alpha(schedule.t_max) + schedule.sigma(schedule.t_max)))
    levels = (top, 0.9, 0.6, 0.3, 0.05)
    plan = Candidate(levels, (Decision(1, 1),) * 5).plan(schedule)
    np.testing.assert_allclose((plan.sigma / (plan.alpha + plan.sigma))[:-1], levels, rtol=1e-6)


def test_the_predictor_interpolates_and_knows_where_it_does_not_know():
    rng = np.random.default_rng(0)
    seen, new = rng.random((60, 3)), rng.random((40, 3))

    def f(x):
        return np.sin(3 * x[:, 0]) + x[:, 1] ** 2

    mean, _ = predict(seen, f(seen), new, noise=1e-4)
    assert np.corrcoef(mean, f(new))[0, 1] > 0.95
    at, near = predict(seen, f(seen), seen, noise=1e-4)
    assert np.abs(at - f(seen)).max() < 0.05 and near.max() < 0.1 * f(seen).std()
    assert predict(seen, f(seen), np.full((1, 3), 50.0))[1] == pytest.approx(f(seen).std())


def test_the_ranking_puts_the_promising_first():
    """The error grows with the first level's distance from 0.9, which the predictor has to find out."""

    def candidate(u):
        return Candidate((float(u), 0.3), (Decision(1, 1), Decision(1, 1)))

    measured = {candidate(u): 10 * (u - 0.9) ** 2 for u in np.linspace(0.4, 1.0, 30)}
    measured[candidate(0.39)] = np.inf
    children = [candidate(u) for u in (0.45, 0.6, 0.75, 0.89)]
    assert ranking(measured, children)[0] == children[3] and ranking(measured, children)[-1] == children[0]


def test_says_what_it_cannot_do(problem):
    with pytest.raises(ValueError, match="budget of 4 model calls measures no plan of 5 calls"):
        searched(problem, 5, budget=4)
