"""Starting in the middle of a plan, on the analytic mixture."""

import numpy as np
import pytest
import torch
from ids import named

from samplers import Grid, Nodes, Plan, RectifiedFlow, VPDiscrete, VPLinear
from samplers.plan import row
from samplers.solvers.adams import lms
from samplers.solvers.ddim import ddim
from samplers.solvers.dpmpp import dpmpp
from samplers.solvers.pndm import pndm
from samplers.solvers.rungekutta import dpm2, heun
from samplers.tail import tail

VP = VPLinear()


def plan_of(solver, calls, end="t_end", **options):
    return solver(Grid(VP, end=end), calls, **options)


def run(plan, mixture, x, schedule=VP):
    return plan.run(mixture.model(schedule, plan.prediction), x)


def test_the_beginning_is_the_plan_itself():
    plan = plan_of(dpmpp, 6)
    assert tail(plan, 0) is plan


@pytest.mark.parametrize(("solver", "step"), [(heun, 1), (heun, 3), (dpm2, 2)])
def test_at_the_beginning_of_a_step_it_is_the_plan_of_the_remaining_nodes(solver, step):
    plan = plan_of(solver, 9, end="zero")
    outer = Grid(VP).nodes(5)
    rest = solver(Grid(VP, times=outer.t[step:-1], end="zero"), 9 - 2 * step)
    cut = tail(plan, 2 * step)
    for name in ("t", "label", "rows", "reads", "start"):
        np.testing.assert_allclose(getattr(cut, name), getattr(rest, name), rtol=1e-12, atol=1e-15)


def test_at_a_stage_one_ddim_step_leads_to_the_next_step(mixture, z):
    """dpm2's stage 2i + 1 lies between the nodes i and i + 1: DDIM by its textbook formula, then dpm2."""
    plan = plan_of(dpm2, 8)
    cut = tail(plan, 3)
    assert (cut.label == plan.label[3:]).all() and (cut.t == plan.t[3:]).all() and len(cut) == 5
    x0, eps = mixture.posterior(z, plan.alpha[3], plan.sigma[3])
    torch.testing.assert_close(
        run(cut, mixture, z), run(tail(plan, 4), mixture, plan.alpha[4] * x0 + plan.sigma[4] * eps), rtol=0, atol=1e-11
    )


def test_at_a_stage_at_the_next_nodes_level_nothing_moves(mixture, z):
    """Heun's stage stands where the next step begins: the call there only repeats."""
    plan = plan_of(heun, 8)
    torch.testing.assert_close(run(tail(plan, 3), mixture, z), run(tail(plan, 4), mixture, z), rtol=0, atol=1e-12)


def test_ddim_steps_fill_the_history(mixture, z):
    """A third-order multistep begun at call 4: two DDIM steps, then its own rows over the values seen in this run."""
    plan = plan_of(lms, 9, order=3)
    cut = tail(plan, 4)
    assert (cut.rows[2:] == plan.rows[6:]).all() and (cut.rows[:2] != plan.rows[4:6]).any()
    a, s, x, seen = plan.alpha, plan.sigma, z, []
    for k in range(4, 9):
        x0, eps = mixture.posterior(x, a[k], s[k])
        seen.append(eps)
        if k < 6:
            x = a[k + 1] * x0 + s[k + 1] * eps
            continue
        c = plan.rows[k, 0]
        x = c[0] * x + sum(c[3 + j] * seen[-1 - j] for j in range(3))
    torch.testing.assert_close(run(cut, mixture, z), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("solver", "calls", "first", "options"),
    [(heun, 80, 31, {}), (dpm2, 80, 31, {}), (lms, 40, 13, {"order": 3}), (pndm, 41, 13, {}), (pndm, 41, 1, {})],
    ids=named,
)
def test_it_follows_the_exact_solution(mixture, z, solver, calls, first, options):
    """From the exact state at the level of the call to the exact end; one DDIM step costs O(h^2), as here."""
    plan = plan_of(solver, calls, **options)
    middle = mixture.exact(VP, z, t_end=plan.t[first])
    end = mixture.exact(VP, middle, t_start=plan.t[first])
    error = (run(tail(plan, first), mixture, middle) - end).square().mean().sqrt()
    alone = (
        (run(ddim(Grid(VP, times=plan.t[first:], end="t_end"), calls - first), mixture, middle) - end)
        if (np.diff(plan.t[first:]) < 0).all()
        else torch.tensor(1.0)
    )
    assert error < min(6e-3, 0.3 * alone.square().mean().sqrt())


def test_networks_and_schedules(mixture, z):
    """The same start for every prediction, and on rectified flow."""
    flow = RectifiedFlow(3.0)
    for schedule in (VPDiscrete.scaled_linear(), flow):
        plan = dpm2(Grid(schedule, t_start=0.9, end="t_end"), 8)
        results = [
            tail(plan.for_prediction(kind), 3).run(mixture.model(schedule, kind), z)
            for kind in ("epsilon", "sample", "v_prediction", "flow")
        ]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-10)


def test_impossible_beginnings_are_named():
    plan = plan_of(heun, 6)
    for first in (-1, 6):
        with pytest.raises(ValueError, match=rf" 0 to 5.*{first}"):
            tail(plan, first)
    # a plan that forgets the network's output at its second call: no step can be made from there
    nodes = Nodes.at(VP, [0.9, 0.6, 0.3, 0.1])
    pairs = [(row(1.0, -0.1), row(1.0)), row(0.9, -0.1, -0.1), row(0.8, -0.1)]
    blind = Plan.build("toy", "epsilon", nodes, pairs, reads=[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r" 1 .*\[0, 2\]"):
        tail(blind, 1)
