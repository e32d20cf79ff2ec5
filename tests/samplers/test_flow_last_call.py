"""Where the last call of a flow model belongs, on a Gaussian mixture whose solution is known."""

import numpy as np
import pytest
import torch

from samplers import Grid, RectifiedFlow, build_plan
from samplers.analytic import GaussianMixture


@pytest.fixture(scope="module")
def flow():
    """Schedule, model, noise and the exact solution at sigma = 0, by shift."""
    rng = np.random.default_rng(3)
    means, stds = rng.uniform(-1, 1, (4, 3)), rng.uniform(0.12, 0.4, (4, 3))
    mixture = GaussianMixture(rng.dirichlet(np.full(4, 2.0)), means, stds)
    z = torch.randn(48, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {}
    for shift in (1.0, 3.0):
        schedule = RectifiedFlow(shift)
        found[shift] = (schedule, mixture.model(schedule, "flow"), z, mixture.exact(schedule, z, t_end=0))
    return found


def error(case, solver, calls, grid, **options):
    schedule, model, z, exact = case
    result = build_plan(schedule, solver, calls, grid, "flow", **options).run(model, z)
    return float((result - exact).square().mean().sqrt())


@pytest.mark.parametrize(("shift", "calls"), [(1.0, 6), (1.0, 10), (1.0, 20), (3.0, 10), (3.0, 20)])
@pytest.mark.parametrize(("solver", "order"), [("unipc", 2), ("unipc", 3), ("dpmpp", 2), ("dpmpp", 3)])
def test_solvers_in_lambda_need_the_call_before_the_end(flow, solver, order, calls, shift):
    uniform = error(flow[shift], solver, calls, None, order=order)
    assert uniform < 0.7 * error(flow[shift], solver, calls, "time", order=order)
    schedule = flow[shift][0]
    given = Grid(schedule, times=np.linspace(1.0, 0.0, calls + 1)[:-1])  # of SD3's pipeline: 1, ..., 1/n
    assert uniform == pytest.approx(error(flow[shift], solver, calls, given, order=order), rel=0.2)


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_a_call_at_the_smallest_time_returns_the_state(flow, solver):
    """The reason: there x_0 is the state up to sigma, so the error of the long step before it stays."""
    schedule, model, z, exact = flow[1.0]
    states = []

    def seen(x, label):
        states.append(x)
        return model(x, label)

    result = build_plan(schedule, solver, 10, "time", "flow", order=3).run(seen, z)
    off = (states[-1] - exact).square().mean().sqrt()
    assert (result - states[-1]).square().mean().sqrt() < 0.05 * off
    assert (result - exact).square().mean().sqrt() > 0.95 * off


def test_a_range_that_ends_above_zero_is_uniform_to_its_end(flow):
    schedule = flow[3.0][0]
    nodes = Grid(schedule, end="t_end", t_start=0.9, t_end=0.3).nodes(6)
    assert nodes.t == pytest.approx(np.linspace(0.9, 0.3, 7))
    assert Grid(schedule).nodes(4).t == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=3e-3)
