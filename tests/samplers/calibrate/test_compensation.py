"""The search for DC-Solver's ratios: what it finds on a mixture, its loss, its minimiser, its trajectories."""

import numpy as np
import pytest
import torch
from ids import named

from samplers import Grid, RectifiedFlow, VPLinear, build_plan
from samplers.calibrate import Batch, Problem, compensated, errors, reference
from samplers.calibrate.compensation import Base, first_batches, least, search_ratios
from samplers.calibrate.trajectory import trajectory
from samplers.solvers.dc import with_predictor

VP = VPLinear()


def batch(mixture, seed, n=10):
    classes = torch.arange(n) % 2
    x = torch.randn(n, *mixture.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = mixture.model(VP, "epsilon", classes, 3.0)
    return Batch(model, x, reference(model, x, VP, calls=100))


@pytest.fixture(scope="module")
def problem(mixture):
    return Problem(VP, "epsilon", (batch(mixture, 0),), (batch(mixture, 1, 32),), 3.0)


@pytest.mark.parametrize(
    ("base", "options"),
    [("unipc", {"order": 2, "variant": "bh1"}), ("dpmpp", {"order": 2}), ("ipndm", {"order": 2})],
    ids=named,
)
def test_helps_on_held_out_noises(problem, base, options):
    plain = build_plan(VP, base, 6, "time", **options)
    plan = compensated(problem, 6, base, "time", **options)
    gain = [errors(plan, b).mean() / errors(plain, b).mean() for b in (problem.fitting, problem.heldout)]
    assert len(plan) == 6 and max(gain) < 0.95, gain


def test_no_base_is_the_best_of_a_few_on_the_rules_grid(problem):
    seen = []
    plan = compensated(problem, 5, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    rule = build_plan(VP, None, 5, guidance=3.0)
    grid = Grid(VP, times=rule.t[:-1], end="zero")
    assert (plan.t == rule.t).all()
    for base in ("ipndm", "dpmpp"):
        other = compensated(problem, 5, base, grid, order=2)
        assert errors(plan, problem.fitting).mean() <= errors(other, problem.fitting).mean() + 1e-12
    assert errors(plan, problem.heldout).mean() < 0.7 * errors(rule, problem.heldout).mean()
    with pytest.raises(ValueError, match="name it with base="):
        compensated(problem, 5, order=2)


def test_each_ratio_is_the_best_of_its_step(problem):
    """Independent of the search's own state: run the compensated plan and look at the state after each step."""
    plan, _ = with_predictor(Grid(VP, "time"), 6, "dpmpp", {"order": 2})
    subject, only = Base(*[plan.for_prediction("epsilon")] * 2), problem.fitting[0]
    exact = trajectory(only, plan, VP, "epsilon")
    ratios = search_ratios(subject, [only], [exact], least)
    assert (ratios[:2] == 1.0).all() and (ratios[2:] != 1.0).all()

    def gap(i, moved):
        states = []
        subject.with_ratios(moved).run(only.model, only.noise, callback=lambda k, state: states.append(state.input))
        return (states[i] - exact[i + 1]).square().mean().item()

    for i in range(2, 6):
        best = gap(i, ratios)
        for change in (-0.02, 0.02):
            moved = ratios.copy()
            moved[i] += change
            if abs(moved[i] - 1.0) <= 0.5:
                assert gap(i, moved) > best


def test_the_trajectory_of_a_flow_is_the_exact_solution(mixture):
    flow, classes = RectifiedFlow(3.0), torch.arange(10) % 2
    x = torch.randn(10, *mixture.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan, only = build_plan(flow, "ddim", 5, prediction="flow"), Batch(mixture.model(flow, "flow", classes, 3.0), x, x)
    states = trajectory(only, plan, flow, "flow")
    for i in (1, 2, 4):  # sigma / alpha is above 1 in the first of them
        exact = mixture.exact(flow, x, t_end=plan.t[i], classes=classes, scale=3.0)
        assert (states[i] - exact).square().mean().sqrt() < 1e-3


def test_the_trajectory_is_the_exact_solution(mixture, problem):
    plan, only = build_plan(VP, "ddim", 5), problem.fitting[0]
    states = trajectory(only, plan, VP, "epsilon")
    assert len(states) == 6 and states[-1] is only.target
    for i in (1, 4):
        exact = mixture.exact(VP, only.noise, t_end=plan.t[i], classes=torch.arange(10) % 2, scale=3.0)
        assert (states[i] - exact).square().mean().sqrt() < 1e-3
    low = build_plan(VP, "ddim", 5, end="t_end")
    states = trajectory(only, low, VP, "epsilon")
    exact = mixture.exact(VP, only.noise, classes=torch.arange(10) % 2, scale=3.0)
    assert len(states) == 6 and (states[-1] - exact).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize(
    ("function", "minimum"),
    [
        (lambda x: (x - 1.234) ** 2, 1.234),
        (lambda x: (x - 0.93) ** 4 + 0.3 * (x - 0.93) ** 2, 0.93),
        (lambda x: torch.exp(-x), 1.5),
        (lambda x: (x - 0.1) ** 2, 0.5),
    ],
    ids=["parabola", "quartic", "above", "below"],
)
def test_minimiser(function, minimum):
    seen = []
    assert least(lambda x: seen.append(x) or function(x)) == pytest.approx(minimum, abs=2e-3)
    assert len(seen) <= 8


def test_few_takes_whole_batches():
    batches = [Batch(None, torch.zeros(n, 1), None) for n in (4, 4, 4, 4)]
    for samples, count in {9: 3, 100: 4, 4: 1}.items():
        assert first_batches(batches, samples) == batches[:count]


def test_the_loss_has_a_derivative(problem):
    """Against finite differences, through the model: the published search needs it."""
    plan, predictor = (p.for_prediction("epsilon") for p in with_predictor(Grid(VP), 5, "unipc", {"order": 2}))
    only = problem.fitting[0]
    gradients = []

    def watch(loss):
        at = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        loss(at).backward()
        with torch.no_grad():
            numeric = (loss(at + 1e-5) - loss(at - 1e-5)) / 2e-5
        gradients.append((at.grad.item(), numeric.item()))
        return 1.0

    search_ratios(Base(plan, predictor), [only], [trajectory(only, plan, VP, "epsilon", 50)], watch)
    assert len(gradients) == 3
    np.testing.assert_allclose(*zip(*gradients, strict=True), rtol=1e-5)
