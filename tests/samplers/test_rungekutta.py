"""Runge-Kutta methods: their orders in every space, EDM's algorithms 1 to 3 written out, churn."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from ids import named
from test_orders import moments

from samplers import EDM, Grid, RectifiedFlow, VPDiscrete, VPLinear, build_plan, sample
from samplers.analytic import GaussianMixture
from samplers.solvers.rungekutta import DEIS_NAMES, TABLEAUX

VP = VPLinear()
CLAIMS = {"euler": 1, "heun": 2, "kutta3": 3, "ralston3": 3, "heun3": 3, "houwen3": 3, "ssp3": 3, "rk4": 4}


@pytest.fixture(scope="module")
def exact(mixture, z):
    return mixture.exact(VP, z)


def order(mixture, z, exact, solver, stages, schedule=VP, prediction="epsilon", **options):
    """Measured from 40 and 80 intervals."""
    settings = {"schedule": schedule, "solver": solver, "prediction": prediction, "end": "t_end", **options}
    runs = [sample(mixture.model(schedule, prediction), z, steps=n * stages, **settings) for n in (40, 80)]
    return math.log2((runs[0] - exact).norm() / (runs[1] - exact).norm())


@pytest.mark.parametrize(
    ("method", "space"), [*((method, "flow") for method in TABLEAUX), ("heun", "time"), ("rk4", "time")]
)
def test_order_of_every_tableau(mixture, z, exact, method, space):
    """In sigma / alpha they are rows of test_orders.py."""
    options = {"method": method, "space": space, "grid": "quadratic" if space == "time" else None}
    measured = order(mixture, z, exact, "runge_kutta", len(TABLEAUX[method].b), **options)
    assert abs(measured - CLAIMS[method]) < 0.3, measured


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("heun", {"alpha": 0.5}),
        ("heun", {"alpha": 2 / 3, "space": "flow"}),
        ("dpm2", {}),
        ("dpm2", {"r": 0.3}),
        ("dpm2", {"r": 1}),
    ],
    ids=named,
)
def test_order_two(mixture, z, exact, solver, options):
    assert abs(order(mixture, z, exact, solver, 2, **options) - 2) < 0.3


@pytest.mark.parametrize("solver", ["heun", "dpm2"])
def test_order_two_from_pure_noise(mixture, z, solver):
    flow = RectifiedFlow(shift=2.0)
    assert abs(order(mixture, z, mixture.exact(flow, z), solver, 2, flow, "flow") - 2) < 0.3


def test_deis_names():
    for theirs, ours in DEIS_NAMES.items():
        stages = len(TABLEAUX[ours].b)
        a, b = (build_plan(VP, "runge_kutta", 2 * stages + 1, method=m) for m in (theirs, ours))
        assert (a.rows == b.rows).all() and int(theirs[0]) == CLAIMS[ours]


@pytest.mark.parametrize("schedule", [VP, VPDiscrete.scaled_linear(), EDM(), RectifiedFlow(3.0)], ids=named)
@pytest.mark.parametrize("end", ["zero", "t_end"])
def test_euler_is_ddim(mixture, z, schedule, end):
    model = mixture.model(schedule, "flow")
    x = z * schedule.init_scale
    settings = {"schedule": schedule, "steps": 7, "prediction": "flow", "end": end}
    ddim = sample(model, x, solver="ddim", **settings)
    for solver, space in (("euler", None), ("euler", "flow"), ("runge_kutta", None)):
        options = {"method": "euler"} if solver == "runge_kutta" else {}
        euler = sample(model, x, solver=solver, space=space, **options, **settings)
        torch.testing.assert_close(euler, ddim, rtol=0, atol=1e-12 * schedule.init_scale)


def test_heun_and_dpm2_at_their_limits(mixture, z):
    """alpha = 1 and r = 1 are both the trapezoid; the tableau is the same method; EDM's t is kappa."""
    run = lambda solver, **options: sample(mixture.model(VP), z, schedule=VP, solver=solver, steps=11, **options)  # noqa: E731
    for other in (run("dpm2", r=1.0), run("runge_kutta", method="heun")):
        torch.testing.assert_close(run("heun"), other, rtol=0, atol=1e-12)
    edm = {"schedule": EDM(), "solver": "heun", "steps": 11, "grid": "karras", "alpha": 0.7}
    a, b = (sample(mixture.model(EDM()), 80 * z, space=space, **edm) for space in ("kappa", "time"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_dpm2_is_dpm_solver_2(mixture, z):
    """Against DPM-Solver-2 (arXiv 2206.00927, algorithm 4) as the paper writes it, in lambda."""
    r, model, nodes = 0.4, mixture.model(VP), Grid(VP, end="t_end").nodes(5)
    x = z
    for i in range(5):
        h = nodes.lam[i + 1] - nodes.lam[i]
        s = VP.t_of_lambda(nodes.lam[i] + r * h)
        eps = model(x, torch.tensor(nodes.label[i]))
        u = VP.alpha(s) / nodes.alpha[i] * x - VP.sigma(s) * math.expm1(r * h) * eps
        slope = model(u, torch.tensor(s)) - eps
        weight = nodes.sigma[i + 1] * math.expm1(h)
        x = nodes.alpha[i + 1] / nodes.alpha[i] * x - weight * eps - weight / (2 * r) * slope
    out = sample(model, z, schedule=VP, solver="dpm2", steps=10, r=r, end="t_end")
    torch.testing.assert_close(out, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [VP, RectifiedFlow(2.0)], ids=["vp", "flow"])
def test_time_is_edm_algorithm_1_for_any_scaling(mixture, z, schedule):
    """Algorithm 3 (alpha = 0.6) with EDM's eq. 4, dx/dt = (sigma'/sigma + s'/s) x - sigma' s / sigma D(x/s; sigma)."""
    s, level = schedule.alpha, lambda t: schedule.sigma(t) / schedule.alpha(t)
    nodes = Grid(schedule, "time", t_start=0.95).nodes(6)

    def slope(x, t, d=1e-6):
        ds, dlevel = ((f(t + d) - f(t - d)) / (2 * d) for f in (s, level))
        clean = mixture.posterior(x / s(t), 1.0, level(t))[0]
        return (dlevel / level(t) + ds / s(t)) * x - dlevel * s(t) / level(t) * clean

    x = z
    for i, (t, end) in enumerate(pairwise(nodes.t)):
        h, d = end - t, slope(x, t)
        x = x + h * (d if i == 5 else (1 - 1 / 1.2) * d + 1 / 1.2 * slope(x + 0.6 * h * d, t + 0.6 * h))
    plan = build_plan(schedule, "heun", 11, Grid(schedule, "time", t_start=0.95), "flow", alpha=0.6, space="time")
    torch.testing.assert_close(plan.run(mixture.model(schedule, "flow"), z), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "schedule",
    [VP, VPDiscrete.scaled_linear(), EDM(), RectifiedFlow(3.0)],
    ids=["vp", "discrete", "edm", "flow"],
)
def test_rates_are_derivatives(schedule):
    t = np.arange(0.1005, 0.9, 0.1)  # between the corners of the discrete schedule
    for rate, f in zip(schedule.rates(t), (schedule.alpha, schedule.sigma), strict=True):
        np.testing.assert_allclose(rate, (f(t + 1e-5) - f(t - 1e-5)) / 2e-5, rtol=1e-7, atol=1e-9)


def test_churn_is_edm_algorithm_2(mixture, z):
    """Written out, on sigma; then the VP form of the same problem with the same draws."""
    n, churn = 6, {"s_churn": 2.0, "s_tmin": 0.05, "s_tmax": 30.0, "s_noise": 1.01}
    draws = torch.randn(n, *z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    levels = np.append(np.geomspace(25, 0.02, n), 0.0)
    x = start = 25 * z
    denoise = lambda x, level: mixture.posterior(x, 1.0, level)[0]  # noqa: E731
    for i, (level, end) in enumerate(pairwise(levels)):
        raised = level * (1 + min(2.0 / n, math.sqrt(2) - 1)) if 0.05 <= level <= 30 else level
        x = x + math.sqrt(raised**2 - level**2) * 1.01 * draws[i]
        d = (x - denoise(x, raised)) / raised
        if end:
            ahead = x + (end - raised) * d
            d = (d + (ahead - denoise(ahead, end)) / end) / 2
        x = x + (end - raised) * d
    noise = lambda k: draws[(k + 1) // 2]  # noqa: E731
    edm = build_plan(EDM(), "heun", 2 * n - 1, sigmas=levels, **churn)
    assert edm.start[:, 1].any() and edm.sigma[0] == pytest.approx(25 * 4 / 3)
    torch.testing.assert_close(edm.run(mixture.model(EDM()), start, noise=noise), x, rtol=0, atol=1e-11)
    assert not edm.needs_noise(2 * n - 3) and edm.sigma[-2] == levels[-2]  # 0.02 lies below s_tmin
    vp = build_plan(VP, "heun", 2 * n - 1, sigmas=levels, **churn)
    out = vp.run(mixture.model(VP), start * VP.alpha(VP.t_of_noise_level(25.0)), noise=noise)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm2"])
def test_churn_keeps_the_moments(solver):
    """On one Gaussian, exactly: adding noise is exact, so the weak order is that of the ODE step."""
    data, stages = GaussianMixture([1.0], [[0.7]], [[0.4]]), 1 if solver == "euler" else 2
    marginal = lambda t: (0.7 * VP.alpha(t), 0.16 * VP.alpha(t) ** 2 + VP.sigma(t) ** 2)  # noqa: E731
    errors = []
    for n in (80, 160):
        plan = build_plan(VP, solver, n * stages, end="t_end", s_churn=20.0)
        mean, variance = moments(plan, data.model(VP), *marginal(VP.t_max))
        assert mean == pytest.approx(marginal(VP.t_min)[0], abs=1e-12)
        errors.append(abs(variance - marginal(VP.t_min)[1]))
    assert abs(math.log2(errors[0] / errors[1]) - stages) < 0.3 and errors[1] < 0.02


def test_churn_stays_on_the_schedule():
    """The first step of Stable Diffusion starts at its noisiest level already; nothing is above label 999."""
    plan = build_plan(VPDiscrete.scaled_linear(), "euler", 10, s_churn=10.0)
    assert plan.label[0] == 999 and (np.diff(plan.label) < 0).all() and not plan.start[:, 1].any()
    plain = build_plan(VPDiscrete.scaled_linear(), "euler", 10)
    assert (plan.label[1:] > plain.label[1:]).all() and plan.stochastic and not plain.stochastic


def test_labels_of_stages_are_exact():
    """Heun's second call and the next step's first share a label to the last bit; nothing is called at sigma = 0."""
    schedule = VPDiscrete.scaled_linear()
    plan = build_plan(schedule, "heun", 9, grid="trailing")
    nodes = Grid(schedule, "trailing").nodes(5)
    assert plan.label.tolist() == [nodes.label[0], *np.repeat(nodes.label[1:5], 2).tolist()]
    assert (plan.sigma[:-1] > 0).all() and plan.sigma[-1] == 0
    middle = build_plan(schedule, "dpm2", 3)
    level = middle.sigma / middle.alpha
    assert level[1] == pytest.approx(math.sqrt(level[0] * level[2]), rel=1e-12)
    assert middle.label[1] == schedule.model_time(middle.t[1]) and middle.label[1] % 1


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("runge_kutta", {"steps": 0}, "at least 1; got 0"),
        ("runge_kutta", {"steps": 7, "method": "rk5"}, "unknown method 'rk5'.*did you mean"),
        ("euler", {"steps": 5, "space": "kapa"}, "did you mean 'kappa'"),
        ("heun", {"steps": 5, "alpha": 0.0}, r"alpha in \(0, 1\]"),
        ("dpm2", {"steps": 5, "r": 1.5}, r"r in \(0, 1\]"),
        ("euler", {"steps": 5, "s_churn": -1.0}, "must not be negative"),
        ("heun", {"sigmas": [9.0, 3.0, 1.0, 0.0], "s_noise": -1.0}, "must not be negative"),
        ("euler", {"steps": 5, "s_churn": 1.0, "t_start": 0.1, "t_end": 0.9, "end": "t_end"}, "from noise to data"),
    ],
)
def test_misuse(solver, options, message):
    with pytest.raises(ValueError, match=message):
        build_plan(VP, solver, **options)


def test_calls_left_over_make_a_first_step_of_lower_order(mixture, z):
    """8 calls of Heun's method to sigma = 0 are Euler's step, then 7 calls on the rest of the grid."""
    plan = build_plan(VP, "heun", 8)
    one = build_plan(VP, "ddim", grid=Grid(VP, times=plan.t[:2], end="t_end"))
    rest = build_plan(VP, "heun", 7, grid=Grid(VP, times=plan.t[[1, 3, 5, 7]], end="zero"))
    model = mixture.model(VP)
    torch.testing.assert_close(plan.run(model, z), rest.run(model, one.run(model, z)), rtol=0, atol=1e-12)


def test_kappa_is_infinite_at_pure_noise():
    with pytest.raises(ValueError, match="space='flow'"):
        build_plan(RectifiedFlow(), "heun", 5, prediction="flow", space="kappa")
