"""`flow_sde`: the SDE's equation, its exact moments, the published Euler-Maruyama steps, and what it equals."""

import math

import numpy as np
import pytest
import torch
from test_orders import moments

from samplers import Grid, RectifiedFlow, VPLinear, build_plan
from samplers.analytic import GaussianMixture

FLOW, MEAN, STD = RectifiedFlow(shift=3.0), 0.7, 0.4
LAWS = [("scaled", 0.7), ("scaled", math.sqrt(2)), ("constant", 0.3), ("constant", 0.6)]


def plan(n, noise, law, schedule=FLOW, **options):
    grid = Grid(schedule, "time", end=options.pop("end", "t_end"), **options.pop("grid", {}))
    return build_plan(schedule, "flow_sde", n, grid, "flow", amount=noise, law=law, **options)


def marginal(plan, k):
    return plan.alpha[k] * MEAN, (plan.alpha[k] * STD) ** 2 + plan.sigma[k] ** 2


@pytest.mark.parametrize(("law", "noise"), LAWS)
def test_a_known_image_is_noised_as_the_flow_does(law, noise):
    """With the true x_0 every state has the flow's marginal exactly: mean alpha x_0, variance sigma^2, at any n."""
    for n in (1, 3, 8):
        for end in ("t_end", "zero"):
            steps = plan(n, noise, law, end=end)
            mean, variance = steps.alpha[0] * 1.3, steps.sigma[0] ** 2
            for k in range(n):
                step = steps.transition(k)
                alpha, sigma = steps.alpha[k], steps.sigma[k]
                # v = (x - x_0) / sigma on the line through x_0, an affine function of x
                gain = step.anchor + step.outputs[0] / sigma
                mean = gain * mean - step.outputs[0] / sigma * 1.3
                variance = gain**2 * variance + step.std**2
                assert mean == pytest.approx(steps.alpha[k + 1] * 1.3, abs=1e-12), (alpha, k)
                assert variance == pytest.approx(steps.sigma[k + 1] ** 2, abs=1e-12)
            assert (step.std == 0) == (end == "zero" or noise == 0)


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize(("law", "noise"), LAWS)
def test_its_moments_converge_to_the_flow_s(law, noise, as_published):
    """On Gaussian data, started from the exact marginal at t = 0.9: errors of mean and variance halve with h."""
    data, errors = GaussianMixture([1.0], [[MEAN]], [[STD]]), []
    flow = RectifiedFlow(t_min=0.1)
    for n in (80, 160, 320):
        steps = plan(n, noise, law, flow, as_published=as_published, grid={"t_start": 0.9})
        result = moments(steps, data.model(flow, "flow"), *marginal(steps, 0))
        errors.append(np.abs(np.array(result) - marginal(steps, n)))
    for coarse, fine in ((errors[0], errors[1]), (errors[1], errors[2])):
        assert np.all((fine < 1e-9) | (coarse > 2**0.7 * fine)), errors
    assert errors[-1].max() < 5e-3


def test_at_few_steps_the_published_states_have_too_much_noise():
    """Why Euler-Maruyama is not the default: the variance of a known image after five steps."""
    published, exact = plan(5, 0.7, "scaled", as_published=True), plan(5, 0.7, "scaled")
    assert (published.t == exact.t).all()
    excess = []
    for steps in (published, exact):
        variance = steps.sigma[0] ** 2
        for k in range(5):
            step = steps.transition(k)
            variance = (step.anchor + step.outputs[0] / steps.sigma[k]) ** 2 * variance + step.std**2
        excess.append(variance / steps.sigma[-1] ** 2)
    assert excess[1] == pytest.approx(1, abs=1e-9) and excess[0] > 1.05


@pytest.mark.parametrize(("law", "noise"), LAWS)
def test_the_published_step(law, noise):
    """x + [v + g^2/2t (x + (1 - t) v)] dt + g sqrt(|dt|) z; Flow-GRPO's g at t = 1 has the second node's 1 - t."""
    steps = plan(6, noise, law, as_published=True, end="zero")
    x, v = torch.randn(2, 2, 3, dtype=torch.float64).unbind(0)
    for k in range(6):
        t, dt = steps.sigma[k], steps.sigma[k + 1] - steps.sigma[k]
        g = noise * math.sqrt(t / (1 - (t if k else steps.sigma[1]))) if law == "scaled" else noise
        mean = x + (v + g**2 / (2 * t) * (x + (1 - t) * v)) * dt
        torch.testing.assert_close(steps.transition(k).mean(x, v), mean, rtol=1e-12, atol=1e-12)
        assert steps.transition(k).std == pytest.approx(g * math.sqrt(-dt) if k < 5 else 0.0, rel=1e-12)


def test_what_it_equals():
    """Without noise DDIM; with the scaled law the SA-Solver of order 1 with tau^2 = noise^2 / 2, on any schedule."""
    ode, ddim = plan(6, 0.0, "scaled", end="zero"), build_plan(FLOW, "ddim", 6, Grid(FLOW, "time"), "flow")
    np.testing.assert_allclose(ode.rows, ddim.rows, atol=1e-14)
    one = {"predictor_order": 1, "corrector_order": 0}
    for schedule, kind in ((VPLinear(), "logsnr"), (RectifiedFlow(t_min=0.1), "time")):
        grid = Grid(schedule, kind, end="t_end", t_start=0.9)
        ours = build_plan(schedule, "flow_sde", 6, grid, "sample", amount=0.9)
        theirs = build_plan(schedule, "sa_solver", 6, grid, "sample", tau=0.9 / math.sqrt(2), **one)
        np.testing.assert_allclose(ours.rows[:5], theirs.rows[:5], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"amount": -1.0}, "-1"),
        ({"law": "dance"}, "dance"),
        ({"law": "constant"}, "constant"),
        ({"as_published": True}, "VPLinear"),
    ],
)
def test_what_is_refused(options, names):
    with pytest.raises(ValueError, match=names):
        build_plan(VPLinear(), "flow_sde", 4, **options)
