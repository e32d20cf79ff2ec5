"""DPM-Solver and DPM-Solver++: single-step, SDE and adaptive forms, and the call that denoises at the end."""

import math

import numpy as np
import pytest
import torch
from ids import named
from test_orders import moments

from samplers import EDM, Grid, Guidance, RectifiedFlow, VPDiscrete, VPLinear, build_plan, dynamic_threshold, sample
from samplers.adaptive import sample_adaptive
from samplers.analytic import GaussianMixture
from samplers.solvers.denoise import then_denoise
from samplers.solvers.dpmpp import dpmpp
from samplers.solvers.singlestep import order_list, singlestep

VP = VPLinear()
BOTH = [(target, kind) for target in ("sample", "epsilon") for kind in ("midpoint", "heun")]


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def exact(mixture, z):
    return mixture.exact(VP, z)


# -- orders -----------------------------------------------------------------------------------------------------------

FIXED = [
    (singlestep, {"order": p, "fixed": True, "target": target, "solver_type": kind, "as_published": published}, p)
    for p in (2, 3)
    for target, kind in BOTH
    for published in (False, True)
]
MULTISTEP = [
    (dpmpp, {"order": p, "target": target, "solver_type": kind, "lower_order_final": False}, p)
    for p in (2, 3)
    for target, kind in BOTH
]
HALVED = {"order": 3, "target": "epsilon", "lower_order_final": False, "as_published": True}


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    FIXED + MULTISTEP + [(dpmpp, HALVED, 2)],
    ids=named,
)
def test_order_per_call(mixture, z, exact, solver, options, order):
    """On a grid that is not uniform in lambda. Against DOP853 at rtol 1e-12."""
    calls = (120, 240)
    errors = [
        rmse(
            sample(mixture.model(VP), z, schedule=VP, solver=solver, steps=n, grid="quadratic", end="t_end", **options),
            exact,
        )
        for n in calls
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, errors


@pytest.mark.parametrize(("target", "kind"), BOTH)
def test_order_of_the_mix(mixture, z, exact, target, kind):
    """[3, ..., 3, 2] keeps order 3."""
    options = {"schedule": VP, "solver": singlestep, "end": "t_end", "target": target, "solver_type": kind}
    errors = [rmse(sample(mixture.model(VP), z, steps=n, **options), exact) for n in (80, 161)]
    assert abs(math.log(errors[0] / errors[1]) / math.log(161 / 80) - 3) < 0.3


@pytest.mark.parametrize("solver", [dpmpp, singlestep])
def test_flow_from_pure_noise_to_data(mixture, z, solver):
    """From alpha = 0 to sigma = 0, both infinite in lambda. The first-order steps there leave order 2."""
    schedule = RectifiedFlow()
    exact = mixture.exact(schedule, z, t_end=0)
    call = {"schedule": schedule, "solver": solver, "prediction": "flow", "order": 3, "grid": "time"}
    errors = [rmse(sample(mixture.model(schedule, "flow"), z, steps=n, **call), exact) for n in (60, 120)]
    assert errors[1] < errors[0] / 3.5
    for n in range(1, 9):
        assert len(build_plan(schedule, solver, n, prediction="flow", order=min(n, 3))) == n


# -- where the calls are ----------------------------------------------------------------------------------------------


def test_order_list():
    """DPM-Solver-fast; the ends of infinite lambda are of order 1."""
    plain = [order_list(n, 3, False, False, False) for n in range(1, 9)]
    assert plain == [[1], [2], [2, 1], [3, 1], [3, 2], [3, 2, 1], [3, 3, 1], [3, 3, 2]]
    to_zero = [order_list(n, 3, False, False, True) for n in range(1, 9)]
    assert to_zero == [[1], [1, 1], [2, 1], [3, 1], [3, 1, 1], [3, 2, 1], [3, 3, 1], [3, 3, 1, 1]]
    assert order_list(8, 3, False, True, True) == [1, 3, 3, 1]
    assert order_list(5, 2, False, False, False) == [2, 2, 1]
    assert order_list(6, 3, True, False, False) == [3, 3]


def test_calls_inside_a_step():
    """Evenly in lambda by default; the grid's own nodes as published."""
    grid = Grid(VP, "time", end="t_end")
    lam = VP.lam(build_plan(VP, singlestep, 9, grid, fixed=True).t)
    np.testing.assert_allclose(np.diff(lam).reshape(3, 3).std(1), 0, atol=1e-9)
    np.testing.assert_allclose(lam[::3], grid.nodes(9).lam[::3], rtol=1e-12)
    published = build_plan(VP, singlestep, 9, grid, fixed=True, as_published=True)
    np.testing.assert_array_equal(published.t, grid.nodes(9).t)
    fast = build_plan(VP, singlestep, 9, Grid(VP, "logsnr", end="t_end"), as_published=True)  # 3, 3, 2, 1
    ends = VP.lam(fast.t[[0, 3, 6, 8, 9]])
    np.testing.assert_allclose(np.diff(ends), (ends[-1] - ends[0]) / 4, rtol=1e-9)


def test_given_nodes_are_the_steps():
    labels = [999.0, 600.0, 300.0, 100.0]
    schedule = VPDiscrete.scaled_linear()
    plan = build_plan(schedule, singlestep, timesteps=labels, order=2)  # and then sigma = 0
    assert len(plan) == 7
    np.testing.assert_allclose(plan.label[[0, 2, 4, 6]], labels, atol=1e-9)
    middle = (schedule.lam(plan.t[0]) + schedule.lam(plan.t[2])) / 2
    assert schedule.lam(plan.t[1]) == pytest.approx(middle, rel=1e-9)


# -- with noise -------------------------------------------------------------------------------------------------------

NOISY = [
    *(
        (dpmpp, {"order": p, "lower_order_final": False, "target": t}, min(p, 2))
        for p in (1, 2, 3)
        for t in ("sample", "epsilon")
    ),
    *((singlestep, {"order": 2, "fixed": True, "target": target, "solver_type": kind}, 2) for target, kind in BOTH),
    (singlestep, {"order": 2, "fixed": True, "as_published": True}, 1),
]


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("solver", "options", "order"), NOISY, ids=named)
def test_weak_order(solver, options, order, eta):
    """Exact mean and variance of a plan's result on Gaussians (1-D), against those of the data's marginal at t_end.

    The worst of three widths, so that no error is small by a change of its sign.
    """
    errors, grid = [], "logsnr" if options["order"] == 3 else "quadratic"
    for n in (120, 240):
        plan = build_plan(VP, solver, n, grid=grid, end="t_end", eta=eta, **options)
        assert sum(plan.needs_noise(k) for k in range(n)) == n
        gaps = []
        for std in (0.2, 0.5, 1.5):

            def marginal(t, std=std):
                alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
                return 0.7 * alpha, alpha**2 * std**2 + sigma**2

            found = moments(plan, GaussianMixture([1.0], [[0.7]], [[std]]).model(VP), *marginal(VP.t_max))
            (mean, variance), (true_mean, true_variance) = found, marginal(VP.t_min)
            assert mean == pytest.approx(true_mean, abs=1e-12)  # the mean prediction is constant along the path
            gaps.append(abs(variance / true_variance - 1))
        errors.append(max(gaps))
    measured = math.log2(errors[0] / errors[1])
    assert abs(measured - order) < 0.3, errors


def test_2m_sde_in_k_diffusion_form(mixture, z):
    """alpha = 1: x <- (b/a) e^-(eta h) x + (1 - e^-(h + eta h)) D' + s_noise b sqrt(1 - e^-(2 eta h)) z, and last D."""
    schedule, eta, s_noise, levels = EDM(), 0.5, 1.003, [80.0, 11.0, 2.5, 0.6, 0.1]
    model, draws = mixture.model(schedule, "sample"), torch.randn(4, *z.shape, dtype=torch.float64)
    options = {"order": 2, "lower_order_final": False, "eta": eta, "s_noise": s_noise}
    plan = build_plan(schedule, "dpmpp", sigmas=[*levels, 0.0], prediction="sample", **options)
    x, old, old_h = 80.0 * z, None, None
    for i, a in enumerate(levels):
        d = model(x, torch.tensor(a, dtype=torch.float64))
        if i == 4:
            x = d
            break
        b = levels[i + 1]
        h = math.log(a / b)
        mixed = d if old is None else d + (d - old) * h / (2 * old_h)
        x = b / a * math.exp(-eta * h) * x + (1 - math.exp(-h - eta * h)) * mixed
        x, old, old_h = x + s_noise * b * math.sqrt(1 - math.exp(-2 * eta * h)) * draws[i], d, h
    torch.testing.assert_close(plan.run(model, 80.0 * z, noise=lambda k: draws[k]), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [dpmpp, singlestep])
@pytest.mark.parametrize("target", ["sample", "epsilon"])
def test_noise_at_the_ends(solver, target):
    """The step to sigma = 0 adds none; with eta = 1 the step from alpha = 0 forgets the state: all noise is new."""
    plan = build_plan(VP, solver, 6, target=target, eta=1.0)
    assert [plan.needs_noise(k) for k in range(6)] == [True] * 5 + [False]
    if target == "sample":
        flow = build_plan(RectifiedFlow(), solver, 6, prediction="flow", eta=1.0)
        np.testing.assert_array_equal(flow.rows[0, 0, :2], [0.0, flow.sigma[1]])  # anchor, noise


def test_stages_share_one_path():
    """Where the network's quantity is 0, a step of several stages is one exact step: the noises add up to its own."""
    model = lambda x, t: torch.zeros_like(x)  # noqa: E731
    for order in (2, 3):
        plan = build_plan(VP, singlestep, order, "time", "sample", end="t_end", order=order, fixed=True, eta=0.7)
        _, variance = moments(plan, model, 0.0, 0.0)
        h = float(VP.lam(plan.t[-1]) - VP.lam(plan.t[0]))
        assert variance == pytest.approx(float(plan.sigma[-1]) ** 2 * -math.expm1(-1.4 * h), rel=1e-12)


# -- adaptive ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["dpm_solver", "k_diffusion"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("target", ["sample", "epsilon"])
def test_adaptive(mixture, z, exact, order, target, controller):
    """The error follows rtol down, and the counts are those of the model."""
    calls, inner, errors = [], mixture.model(VP), []

    def model(x, t):
        calls.append(float(t))
        return inner(x, t)

    for tolerance in (1e-1, 1e-2, 1e-3):
        calls.clear()
        options = {
            "order": order,
            "target": target,
            "controller": controller,
            "rtol": tolerance,
            "atol": tolerance / 10,
        }
        out, effort = sample_adaptive(model, z, schedule=VP, **options)
        assert effort.calls == len(calls) == order * (effort.accepted + effort.rejected)
        starts = calls[::order]
        assert len(starts) - len(set(starts)) == effort.rejected  # a rejected step begins again where it began
        errors.append(rmse(out, exact))
    assert errors[0] < 0.1 and errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4


def test_adaptive_takes_what_sample_takes(mixture, z):
    classes = torch.arange(8) % 2
    exact = mixture.exact(VP, z, classes=classes, scale=3.0)
    guidance = Guidance(3.0, mixture.model(VP, "v_prediction"))
    call = {"schedule": VP, "rtol": 1e-3, "atol": 1e-4, "prediction": "v_prediction", "guidance": guidance}
    model = mixture.model(VP, "v_prediction", classes)
    assert rmse(sample_adaptive(model, z, **call)[0], exact) < 1e-3
    out, _ = sample_adaptive(model, z.bfloat16(), **call | {"rtol": 0.05, "atol": 0.0078})
    assert out.dtype == torch.bfloat16 and rmse(out.double(), exact) < 0.1
    bounded, _ = sample_adaptive(model, z, **call, threshold=dynamic_threshold, denoise=True)
    assert bounded.abs().max() <= 1.0


def test_adaptive_towards_noise_and_denoised(mixture, z, exact):
    model, tight = mixture.model(VP), {"rtol": 1e-4, "atol": 1e-5}
    back, _ = sample_adaptive(model, exact, schedule=VP, t_start=VP.t_min, t_end=1.0, **tight)
    assert rmse(back, z) < 1e-3
    at_end, effort = sample_adaptive(model, z, schedule=VP, **tight)
    clean, one_more = sample_adaptive(model, z, schedule=VP, denoise=True, **tight)
    assert one_more.calls == effort.calls + 1
    x0, _ = mixture.posterior(at_end, float(VP.alpha(VP.t_min)), float(VP.sigma(VP.t_min)))
    torch.testing.assert_close(clean, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("controller", "same"), [("dpm_solver", True), ("k_diffusion", False)])
def test_adaptive_norms(mixture, z, controller, same):
    """The authors' controller looks at the worst sample, so easy ones change nothing; k-diffusion averages."""
    easy = z[4:5].expand(40, -1, -1, -1)
    model, options = mixture.model(VP), {"schedule": VP, "controller": controller}
    alone = sample_adaptive(model, z, **options)[0]
    beside = sample_adaptive(model, torch.cat([z, easy]), **options)[0][:8]
    assert torch.allclose(alone, beside, rtol=0, atol=1e-12) == same


# -- the last call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", dpmpp, singlestep, "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_then_denoise(mixture, z, solver, prediction):
    """The x_0 of the exact posterior at the state that the plan ends in, for one more call."""
    plan = build_plan(VP, solver, 6, prediction=prediction, end="t_end")
    longer, model = then_denoise(plan, VP), mixture.model(VP, prediction)
    assert len(longer) == 7
    x0, _ = mixture.posterior(plan.run(model, z), float(VP.alpha(VP.t_min)), float(VP.sigma(VP.t_min)))
    torch.testing.assert_close(longer.run(model, z), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        longer.for_prediction("score").run(mixture.model(VP, "score"), z), x0, rtol=0, atol=1e-10
    )
    with pytest.raises(ValueError, match="sigma = 0"):
        then_denoise(longer, VP)


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"solver": singlestep, "steps": 2.5}, "2.5"),
        ({"solver": singlestep, "order": 4}, " 4"),
        ({"solver": singlestep, "solver_type": "taylor"}, "solver_type.*taylor"),
        ({"solver": singlestep, "target": "epsilom"}, "did you mean 'epsilon'"),
        ({"solver": singlestep, "fixed": True, "steps": 11}, " 11.* 10.* 13"),
        ({"solver": singlestep, "fixed": True, "order": 2, "end": "t_end"}, " 5.* 4.* 6"),
        ({"solver": singlestep, "sigmas": [10.0, 1.0, 0.1], "steps": 3}, " 3 .* 2"),
        ({"solver": dpmpp, "eta": -0.1}, "eta.* -0.1"),
        ({"solver": dpmpp, "eta": 1.0, "t_start": 0.1, "t_end": 0.9, "end": "t_end"}, "noise"),
    ],
)
def test_misuse(mixture, z, call, message):
    with pytest.raises(ValueError, match=message):
        sample(mixture.model(VP), z, schedule=VP, **{"steps": 5, **call})
    with pytest.raises(ValueError, match="alpha = 0"):
        build_plan(RectifiedFlow(), singlestep, 5, prediction="flow", target="epsilon")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"order": 1}, " 1"),
        ({"controller": "pid"}, "controller.*pid"),
        ({"rtol": -1.0}, "rtol=.*atol="),
        ({"rtol": 0.0, "atol": 0.0}, "rtol=.*atol="),
        ({"t_start": 0.5, "t_end": 2.0}, "schedule"),
        ({"schedule": RectifiedFlow()}, "lambda.*t_start"),
    ],
)
def test_adaptive_misuse(mixture, z, call, message):
    with pytest.raises(ValueError, match=message):
        sample_adaptive(mixture.model(VP), z, **{"schedule": VP, **call})


def test_adaptive_failures_say_where(mixture, z):
    with pytest.raises(RuntimeError, match=r"18.*max_calls = 20.*t = 0\.\d+"):
        sample_adaptive(mixture.model(VP), z, schedule=VP, rtol=1e-9, atol=1e-9, max_calls=20)
    calls = []

    def broken(x, t):
        calls.append(1)
        return x * math.nan if len(calls) == 8 else mixture.model(VP)(x, t)

    with pytest.raises(FloatingPointError, match=r" 6 calls.*call 1 of 3"):
        sample_adaptive(broken, z, schedule=VP)
