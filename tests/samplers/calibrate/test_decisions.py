"""The search space of USF: particular decisions are the named solvers, to rounding; any decisions keep their order."""

import math

import numpy as np
import pytest
import torch
from ids import named

from samplers import Grid, Nodes, RectifiedFlow, VPLinear, convert
from samplers.calibrate.decisions import Decision, decided
from samplers.solvers.adams import abm, lms
from samplers.solvers.dpmpp import dpmpp
from samplers.solvers.singlestep import singlestep
from samplers.solvers.unipc import climb, unipc

VP = VPLinear()
N = 9


@pytest.fixture(scope="module")
def exact(mixture, z):
    return mixture.exact(VP, z)


def same(plan, other):
    """Rows equal to 1e-12, with zeros where one has fewer columns."""
    width = max(plan.rows.shape[2], other.rows.shape[2])
    rows = [np.pad(p.rows, ((0, 0), (0, 0), (0, width - p.rows.shape[2]))) for p in (plan, other)]
    return plan.prediction == other.prediction and np.abs(rows[0] - rows[1]).max() < 1e-12


def down(order):
    return [min(order, i + 1, N - i) for i in range(N)]


@pytest.mark.parametrize("end", ["t_end", "zero"])
@pytest.mark.parametrize("target", ["sample", "epsilon"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_and_plus_plus(order, target, end):
    grid = Grid(VP, end=end)
    for solver_type, relaxation in (("midpoint", "bh2"), ("heun", "exact")):
        decisions = [Decision(p, p, target, relaxation=relaxation) for p in down(order)]
        plan = dpmpp(grid, N, order=order, target=target, solver_type=solver_type)
        assert same(decided(grid.nodes(N), decisions), plan)


@pytest.mark.parametrize("end", ["t_end", "zero"])
@pytest.mark.parametrize("target", ["sample", "epsilon"])
@pytest.mark.parametrize("variant", ["bh1", "bh2", "vary_coeff"])
def test_unipc(variant, target, end):
    grid, relaxation = Grid(VP, end=end), "exact" if variant == "vary_coeff" else variant
    for order in (1, 2, 3):
        decisions = [Decision(p, p, target, relaxation=relaxation, corrector=p + 1) for p in climb(order, N, True)]
        assert same(decided(grid.nodes(N), decisions), unipc(grid, N, order=order, variant=variant, target=target))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_adams(order):
    grid = Grid(VP)
    plain = [Decision(min(order, i + 1), min(order, i + 1), "flow") for i in range(N)]
    assert same(decided(grid.nodes(N), plain), lms(grid, N, order=order, space="flow"))
    values = [min(order, i + 1, max(2, N - i)) for i in range(N)]
    corrected = [Decision(p, p, "flow", corrector=p + 1) for p in values]
    assert same(decided(grid.nodes(N), corrected), abm(grid, N, order=order))


@pytest.mark.parametrize(("order", "form"), [(2, "midpoint"), (2, "heun"), (3, "heun")], ids=named)
@pytest.mark.parametrize("target", ["sample", "epsilon"])
def test_single_step_methods_start_further_back(mixture, z, order, form, target):
    plan = singlestep(Grid(VP, end="t_end"), 6, order=order, fixed=True, solver_type=form, target=target)
    relaxation = "bh2" if form == "midpoint" else "exact"
    stages = [Decision(k + 1, k + 1, target, start=k, relaxation=relaxation) for k in range(order)]
    built = decided(Nodes.at(VP, plan.t), stages * (6 // order))
    model = mixture.model(VP, target)
    assert (built.run(model, z) - plan.run(model, z)).abs().max() < 1e-12


def test_a_mixture_of_targets_is_one_plan(mixture, z):
    """A step of each target in turn, each as the plan of its own solver makes it from the same state and history."""
    grid, model = Grid(VP, end="t_end"), mixture.model(VP)
    nodes, targets = grid.nodes(3), ("epsilon", "sample", "flow")
    plan = decided(nodes, [Decision(1, 1, targets[0]), Decision(2, 2, targets[1]), Decision(2, 2, targets[2])])
    alone = {t: decided(nodes, [Decision(1, 1, t), Decision(2, 2, t), Decision(2, 2, t)]) for t in targets}
    x, inputs, outputs = z, [], []
    for i, target in enumerate(targets):
        inputs.append(x)
        outputs.append(model(x, torch.tensor(nodes.label[i])))
        own = alone[target]
        values = [
            convert(inputs[k], outputs[k], "epsilon", target, nodes.alpha[k], nodes.sigma[k]) for k in range(i, -1, -1)
        ]
        row = own.rows[i, 0]
        x = row[0] * x + sum(w * m for w, m in zip(row[3:], values, strict=False))
    assert (plan.for_prediction("epsilon").run(model, z) - x).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("decision", "order"),
    [
        (Decision(2, 4, "sample"), 2),
        (Decision(3, 4, "epsilon"), 3),
        (Decision(2, 3, "flow"), 2),
        (Decision(2, 2, "sample", relaxation="bh1"), 2),
        (Decision(2, 2, "sample", start=1), 2),
        (Decision(2, 3, "flow", corrector=3), 3),
    ],
    ids=named,
)
def test_the_order_is_the_decided_one(mixture, z, exact, decision, order):
    """More points than the order needs leave a smaller error, of which the next order still shows at 160 calls."""
    errors = []
    for n in (80, 160):
        plan = decided(Grid(VP, end="t_end").nodes(n), [decision] * n)
        out = plan.for_prediction("epsilon").run(mixture.model(VP), z)
        errors.append((out - exact).square().mean().sqrt().item())
    assert -0.3 < math.log2(errors[0] / errors[1]) - order < 0.7, errors


@pytest.mark.parametrize("target", ["sample", "epsilon", "flow"])
def test_from_pure_noise_of_a_flow(mixture, z, target):
    """alpha = 0 at the start: the step from there is of first order."""
    schedule = RectifiedFlow()
    plan = decided(Grid(schedule).nodes(20), [Decision(2, 3, target, corrector=2)] * 20)
    out = plan.for_prediction("flow").run(mixture.model(schedule, "flow"), z)
    assert (out - mixture.exact(schedule, z, t_end=0)).square().mean().sqrt() < 0.05


def test_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="8 decisions for 9 steps"):
        decided(Grid(VP).nodes(9), [Decision()] * 8)
    for wrong in ({"order": 3}, {"order": 0}, {"start": -1}, {"corrector": 1}, {"points": 7}):
        with pytest.raises(ValueError, match="a step needs"):
            Decision(**wrong)
    with pytest.raises(ValueError, match="targets are"):
        Decision(target="x0")
