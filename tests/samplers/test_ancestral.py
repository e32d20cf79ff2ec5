"""Ancestral samplers and DPM-Solver++(SDE): exact moments, what they are without noise, when they draw."""

import math

import pytest
import torch
from ids import named
from test_orders import moments

from samplers import EDM, RectifiedFlow, VPLinear, build_plan, sample
from samplers.analytic import GaussianMixture

VP, FLOW = VPLinear(), RectifiedFlow(shift=2.0)
TWO_STAGES = ["dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"]


def variance_errors(schedule, solver, sizes, std=0.4, **options):
    """|variance - truth| on N(0.7, std^2), started from its exact marginal. The mean is exact in all these solvers."""
    data = GaussianMixture([1.0], [[0.7]], [[std]])
    errors = []
    for n in sizes:
        plan = build_plan(schedule, solver, n, end="t_end", prediction="flow", **options)
        start, end = (
            (0.7 * schedule.alpha(t), (std * schedule.alpha(t)) ** 2 + schedule.sigma(t) ** 2)
            for t in (schedule.t_max, schedule.t_min)
        )
        mean, variance = moments(plan, data.model(schedule, "flow"), *start)
        assert mean == pytest.approx(end[0], abs=1e-12)
        errors.append(abs(variance - end[1]))
    return errors


@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        ("euler_ancestral", {}, 1),
        ("dpm2_ancestral", {}, 2),
        ("dpmpp_2s_ancestral", {}, 2),
        ("dpmpp_sde", {}, 2),
        ("dpmpp_sde", {"independent_noise": True}, 1),
    ],
    ids=named,
)
def test_weak_order(solver, options, order, eta):
    coarse, fine = variance_errors(VP, solver, (80, 160), eta=eta, **options)
    assert abs(math.log2(coarse / fine) - order) < 0.3, (coarse, fine)


@pytest.mark.parametrize("solver", ["euler_ancestral", *TWO_STAGES])
def test_moments_from_pure_noise(solver):
    """Rectified flow starts at alpha = 0, where sigma / alpha is infinite; the logarithm slows the second order."""
    coarse, fine = variance_errors(FLOW, solver, (80, 160))
    assert math.log2(coarse / fine) > (0.7 if solver == "euler_ancestral" else 1.4)
    assert fine < (0.02 if solver == "euler_ancestral" else 0.005)


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_exact_if_x0_is_known(solver, eta):
    """All data at one point: x_0 is constant, and the exponential step and its noise have no error at all."""
    assert variance_errors(VP, solver, (8,), std=0.0, eta=eta)[0] < 1e-14


@pytest.mark.parametrize("schedule", [VP, EDM(), FLOW], ids=["vp", "edm", "flow"])
def test_euler_ancestral_is_ddim(mixture, z, schedule):
    draws = torch.randn(9, *z.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    settings = {"schedule": schedule, "steps": 9, "prediction": "flow", "noise": lambda k: draws[k]}
    for eta in (0.0, 0.4, 1.0):
        a, b = (
            sample(mixture.model(schedule, "flow"), schedule.init_scale * z, solver=solver, eta=eta, **settings)
            for solver in ("euler_ancestral", "ddim")
        )
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * schedule.init_scale)


def test_without_noise_they_are_the_ode_methods(mixture, z):
    model = mixture.model(VP)
    run = lambda solver, **options: sample(model, z, schedule=VP, solver=solver, steps=9, **options)  # noqa: E731
    torch.testing.assert_close(run("dpm2_ancestral", eta=0.0), run("dpm2"), rtol=0, atol=1e-12)
    torch.testing.assert_close(run("dpmpp_sde", eta=0.0), run("dpmpp_2s_ancestral", eta=0.0), rtol=0, atol=1e-12)
    # DPM-Solver++(2S) at r = 1/2 (arXiv 2211.01095, algorithm 1), written out
    plan = build_plan(VP, "dpmpp_2s_ancestral", 9, eta=0.0)
    x, t, a, s = z, plan.t, plan.alpha, plan.sigma
    clean = lambda x, k: mixture.posterior(x, a[k], s[k])[0]  # noqa: E731
    for k in range(0, 8, 2):
        h = math.log(a[k + 2] / s[k + 2] * s[k] / a[k])
        assert math.log(a[k + 1] / s[k + 1] * s[k] / a[k]) == pytest.approx(h / 2, rel=1e-9)
        u = s[k + 1] / s[k] * x - a[k + 1] * math.expm1(-h / 2) * clean(x, k)
        x = s[k + 2] / s[k] * x - a[k + 2] * math.expm1(-h) * clean(u, k + 1)
    torch.testing.assert_close(run("dpmpp_2s_ancestral", eta=0.0), clean(x, 8), rtol=0, atol=1e-12)
    assert t[-1] == 0.0


def test_they_draw_only_what_they_use():
    """Calls 0, 1 | 2, 3 | 4 -> sigma = 0: noise where a step ends above 0, and in dpmpp_sde at its stage too."""
    drawn = lambda solver, steps=5, **options: [  # noqa: E731
        k for k in range(steps) if build_plan(VP, solver, steps, **options).needs_noise(k)
    ]
    assert drawn("euler_ancestral") == [0, 1, 2, 3]
    assert drawn("dpm2_ancestral") == drawn("dpmpp_2s_ancestral") == [1, 3]
    assert drawn("dpmpp_sde") == drawn("dpmpp_sde", independent_noise=True) == [0, 1, 2, 3]
    for solver in ("euler_ancestral", *TWO_STAGES):
        assert drawn(solver, eta=0.0) == drawn(solver, s_noise=0.0) == []
    rows = [build_plan(VP, "euler_ancestral", 5, s_noise=s).rows[0, 0, 1] for s in (1.0, 1.5)]
    assert rows[1] == pytest.approx(1.5 * rows[0])


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("euler_ancestral", {"eta": -0.1}, "-1|-0.1"),
        ("dpmpp_sde", {"s_noise": -1.0}, "-1|-0.1"),
        ("dpmpp_2s_ancestral", {"eta": 3.0}, "eta = 3"),
        ("euler_ancestral", {"t_start": 0.1, "t_end": 0.9, "end": "t_end"}, "noise"),
    ],
)
def test_misuse(solver, options, message):
    with pytest.raises(ValueError, match=message):
        build_plan(VP, solver, **{"steps": 5, **options})


def test_more_noise_than_ancestral_is_cut(mixture, z):
    """eta = 3: every level is all new noise, and the result is the last x_0, still finite."""
    out = sample(mixture.model(VP), z, schedule=VP, solver="euler_ancestral", steps=6, eta=3.0)
    assert out.isfinite().all() and out.abs().max() < 2
