"""Predictor-corrector sampling (Song et al. 2021) against closed forms on Gaussians and mixtures."""

import math

import numpy as np
import pytest
import torch

from samplers import EDM, Grid, Guidance, RectifiedFlow, VPDiscrete, VPLinear, build_plan
from samplers.analytic import GaussianMixture
from samplers.stochastic import (
    LangevinPlan,
    ancestral_sampling,
    euler_maruyama,
    predictor_corrector,
    reverse_diffusion,
)
from samplers.tail import tail

VP, VE, SD = VPLinear(), EDM(0.01, 50.0), VPDiscrete.scaled_linear()
MEAN, STD = 0.7, 0.4


def marginal(alpha, sigma):
    """Mean and variance of x = alpha x_0 + sigma eps, x_0 ~ N(MEAN, STD^2)."""
    return alpha * MEAN, (alpha * STD) ** 2 + sigma**2


def propagate(plan, mean=None, variance=None):
    """Exact mean and variance of a plan with one call per row on that Gaussian, read off its rows: the model is affine.

    Starts from the exact marginal unless told otherwise.
    """
    exact = marginal(plan.alpha[0], plan.sigma[0])
    mean, variance = exact[0] if mean is None else mean, exact[1] if variance is None else variance
    assert (plan.rows[:, 0] == plan.rows[:, 1]).all() and plan.rows.shape[2] == 4 and not plan.rows[:, 0, 2].any()
    for k in range(len(plan)):
        m, v = marginal(plan.alpha[k], plan.sigma[k])
        keep, noise, _, eps = plan.rows[k, 0]
        slope = plan.sigma[k] / v  # eps(x) = slope (x - m)
        gain = keep + eps * slope
        mean, variance = gain * mean - eps * slope * m, gain**2 * variance + noise**2
    return np.array([mean, variance])


PREDICTORS = [
    (reverse_diffusion, {}),
    (reverse_diffusion, {"probability_flow": True}),
    (ancestral_sampling, {"variance": "small"}),
    (ancestral_sampling, {"variance": "large"}),
    (euler_maruyama, {}),
    (euler_maruyama, {"probability_flow": True}),
]
PROBLEMS = {
    "vp-time": (VP, "time", {}),
    "vp-logsnr": (VP, "logsnr", {}),
    "ve": (VE, "logsnr", {}),
    "flow": (RectifiedFlow(t_min=0.1), "time", {"t_start": 0.9}),
    "sd": (SD, "logsnr", {"t_end": 0.1}),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("predictor", "options"), PREDICTORS)
def test_predictors_have_weak_order_1(predictor, options, problem):
    """From the exact marginal the exact SDE (and ODE) reaches the exact marginal: what is missing halves with h."""
    schedule, kind, ends = PROBLEMS[problem]
    errors = []
    for n in (400, 800):
        plan = build_plan(schedule, predictor, n, Grid(schedule, kind, end="t_end", **ends), **options)
        assert plan.stochastic != ("probability_flow" in options)
        errors.append(np.abs(propagate(plan) - marginal(plan.alpha[-1], plan.sigma[-1])))
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 1e-6 or abs(math.log2(coarse / fine) - 1) < 0.3, f"errors {coarse:.2e}, {fine:.2e}"
    assert errors[1][0] < 0.005 and errors[1][1] < 0.03


@pytest.mark.parametrize("predictor", [reverse_diffusion, euler_maruyama])
@pytest.mark.parametrize("schedule", [VP, EDM()], ids=["vp", "ve"])
def test_probability_flow_solves_the_ode(mixture, z, predictor, schedule):
    """Also Euler-Maruyama's, which the authors' code cannot run. Order 1 against DOP853."""
    x = schedule.init_scale * z
    exact = mixture.exact(schedule, x)
    errors = []
    for n in (200, 400):
        plan = build_plan(schedule, predictor, n, "logsnr", end="t_end", probability_flow=True)
        assert not plan.stochastic
        errors.append((plan.run(mixture.model(schedule), x) - exact).square().mean().sqrt().item())
    assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.3, errors


def test_rows_are_the_papers():
    """VP, eq. 46 and eq. 4 with beta_i = 1 - (alpha_i / alpha_{i-1})^2, written on the score; VE with app. F's."""
    grid = Grid(VP, "time", end="t_end")
    nodes, i = grid.nodes(30), 7
    beta = 1 - (nodes.alpha[i] / nodes.alpha[i + 1]) ** 2
    x, score, z = 0.3, -1.7, 0.9
    apply = lambda plan, sigma: plan.rows[i, 0] @ [x, z, 1.0, -sigma * score]  # noqa: E731
    reverse = apply(reverse_diffusion(grid, 30), nodes.sigma[i])
    assert reverse == pytest.approx((2 - math.sqrt(1 - beta)) * x + beta * score + math.sqrt(beta) * z, rel=1e-12)
    ancestral = apply(ancestral_sampling(grid, 30, variance="large"), nodes.sigma[i])
    assert ancestral == pytest.approx((x + beta * score) / math.sqrt(1 - beta) + math.sqrt(beta) * z, rel=1e-12)
    t, dt = nodes.t[i], nodes.t[i] - nodes.t[i + 1]
    b = 0.1 + 19.9 * t  # eq. 33; eq. 6 and 11
    em = apply(euler_maruyama(grid, 30), nodes.sigma[i])
    assert em == pytest.approx(x + (0.5 * b * x + b * score) * dt + math.sqrt(b * dt) * z, rel=1e-9)
    grid = Grid(VE, "logsnr", end="t_end")
    nodes = grid.nodes(30)
    s, t = nodes.sigma[i], nodes.sigma[i + 1]
    ancestral = apply(ancestral_sampling(grid, 30), s)
    std = math.sqrt(t**2 * (s**2 - t**2) / s**2)
    assert ancestral == pytest.approx(x + (s**2 - t**2) * score + std * z, rel=1e-12)


def test_ancestral_is_ddim_with_full_noise():
    for schedule in (VP, VE, SD):
        ours, ddim = build_plan(schedule, ancestral_sampling, 9), build_plan(schedule, "ddim", 9, eta=1.0)
        ddim = ddim.for_prediction("epsilon")
        anchor = ddim.rows[:, 0, 0] + ddim.rows[:, 0, 3] * ddim.reads[:, 0]
        theirs = np.stack([anchor, ddim.rows[:, 0, 1], ddim.rows[:, 0, 3] * ddim.reads[:, 1]])
        np.testing.assert_allclose(ours.rows[:, 0, [0, 1, 3]].T, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("predictor", [reverse_diffusion, ancestral_sampling, euler_maruyama])
def test_the_last_step_denoises(predictor):
    """To sigma = 0: the posterior mean, no noise. To t_end: a noisy state."""
    plan = build_plan(VP, predictor, 6)
    x = torch.randn(4, 1, dtype=torch.float64)
    data = GaussianMixture([1.0], [[MEAN]], [[STD]])
    k = len(plan) - 1
    after = plan.step(k, plan.begin(x), data.model(VP)(x, torch.tensor(plan.label[k])))
    torch.testing.assert_close(after.input, data.posterior(x, plan.alpha[k], plan.sigma[k])[0])
    assert not plan.needs_noise(k)
    assert build_plan(VP, predictor, 6, end="t_end").needs_noise(5)


def test_annealed_langevin_is_stationary():
    """Variance V of N(m, V) under x + e score + sqrt(2 e) z goes to V / (1 - e / 2V), whatever it was before."""
    snr, inner = 0.16, 4000
    for schedule, level in ((VP, 0.3), (VE, 0.5)):
        grid = Grid(schedule, times=[level, 0.9 * level], end="t_end")
        plan = build_plan(schedule, predictor_corrector, inner, grid, predictor="none", corrector="ald", snr=snr,
                          corrector_steps=inner)  # fmt: skip
        assert type(plan).__name__ == "Plan" and set(plan.t) == {level}  # linear, and it stays where it is
        m, v = marginal(plan.alpha[0], plan.sigma[0])
        e = 2 * (snr * plan.sigma[0]) ** 2
        for start in ((m, v), (m + 3.0, 5 * v)):
            np.testing.assert_allclose(propagate(plan, *start), [m, v / (1 - e / (2 * v))], rtol=1e-6)


def test_the_corrector_repairs_a_wrong_marginal():
    """Few predictor steps, and a start that is too wide: correctors bring both moments closer, and more do more."""
    for schedule in (VP, VE):
        gaps = []
        for inner in (0, 1, 4):
            how = {"corrector": "ald", "corrector_steps": inner} if inner else {"corrector": "none"}
            plan = build_plan(schedule, predictor_corrector, 8 * (1 + inner), end="t_end", snr=0.3, **how)
            m, v = marginal(plan.alpha[0], plan.sigma[0])
            gaps.append(np.abs(propagate(plan, m + 0.3 * v**0.5, 2 * v) - marginal(plan.alpha[-1], plan.sigma[-1])))
        assert gaps[0][1] > 1.3 * gaps[1][1] > 1.8 * gaps[2][1], gaps
        assert gaps[0][0] > gaps[1][0] > gaps[2][0], gaps


def one_langevin_step(x, noise, *, as_published=False, snr=0.2, scale=1.0):
    """One Langevin corrector at t = 1 on data N(0, 1/4) per dimension; also the level's sigma and variance."""
    grid = Grid(VP, "time") if as_published else Grid(VP, "time", end="t_end")
    how = {"corrector_steps": 25} if as_published else {}  # of the ladder of 25 levels
    plan = build_plan(VP, predictor_corrector, 25 * (26 if as_published else 2), grid, snr=snr,
                      as_published=as_published, **how)  # fmt: skip
    assert isinstance(plan, LangevinPlan)
    eps = x * float(plan.sigma[0] / (0.25 * plan.alpha[0] ** 2 + plan.sigma[0] ** 2))
    return plan.step(0, plan.begin(x), scale * eps, noise).input, -eps / float(plan.sigma[0])


def test_langevin_step_sizes():
    """Algorithm 4's rule written down per sample; as published with the batch's mean norms and alpha_i = 1 - beta_i."""
    x, noise = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out, score = one_langevin_step(x, noise)
    for b in range(5):
        size = 2 * (0.2 * math.sqrt(12) / score[b].norm()) ** 2
        torch.testing.assert_close(out[b], x[b] + size * score[b] + (2 * size).sqrt() * noise[b])
    out, score = one_langevin_step(x, noise, as_published=True)
    norms = [torch.tensor([v.norm() for v in batch]).mean() for batch in (noise, score)]
    size = 2 * (1 - 20 / 25) * (0.2 * norms[0] / norms[1]) ** 2
    torch.testing.assert_close(out, x + size * score + (2 * size).sqrt() * noise)


def test_langevin_has_its_moments():
    """20,000 samples of one step at a fixed x, d = 16: E x' = x (1 - e/V), Var x' = 2 e; z-tests at 5 standard errors.

    With ||z|| instead of sqrt(d) the variance would be (d + 2) / d = 1.125 times as large: 11 standard errors.
    """
    n, d = 20_000, 16
    x = torch.linspace(0.5, 1.5, d, dtype=torch.float64).expand(n, d)
    noise = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, score = one_langevin_step(x, noise)
    size = (2 * 0.2**2 * d / score[0].square().sum()).item()
    assert (out.mean(0) - x[0] - size * score[0]).abs().max() < 5 * math.sqrt(2 * size / n)
    variance = out.var(0, unbiased=False).mean() / (2 * size)
    assert abs(variance - 1) < 5 * math.sqrt(2 / (n * d))


def test_langevin_keeps_a_gaussian():
    """2,000 chains of N(m, V) in d = 256 start 1.5 times too wide; 150 correctors at one level, snr 0.16.

    In equilibrium E[d V / ||x - m||^2] = 1 / (1 + snr^2) exactly (E ||x'||^2 = E ||x||^2 solved for it). Its standard
    error is the chains' own: they are independent because step sizes are per sample.
    """
    n, d, snr, inner, t = 2000, 256, 0.16, 150, 0.3
    grid = Grid(VP, times=[t, 0.2], end="t_end")
    plan = build_plan(VP, predictor_corrector, inner, grid, predictor="none", snr=snr, corrector_steps=inner)
    m, v = marginal(plan.alpha[0], plan.sigma[0])
    rng = torch.Generator().manual_seed(2)
    x = m + math.sqrt(1.5 * v) * torch.randn(n, d, generator=rng)
    model = lambda x, label: float(plan.sigma[0] / v) * (x - m)  # noqa: E731
    out = plan.run(model, x, generator=rng)
    statistic = (d * v / (out - m).square().sum(1)).double()
    gap = statistic.mean() - 1 / (1 + snr**2)
    assert abs(gap) < 5 * statistic.std() / math.sqrt(n)
    assert 5 * statistic.std() / math.sqrt(n) < 0.015  # and the interval tells: the published bias is 0.025


def test_batches_and_forms_of_the_problem(mixture):
    """A sample's result does not depend on its batch, nor on whether the problem is written as VP or as VE."""
    x = torch.randn(6, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    draws = torch.randn(20, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    options = {"predictor": "ancestral_sampling", "corrector_steps": 1, "snr": 0.1}
    plan = build_plan(VP, predictor_corrector, 20, **options)
    together = plan.run(mixture.model(VP), x, noise=lambda k: draws[k])
    alone = plan.run(mixture.model(VP), x[2:3], noise=lambda k: draws[k][2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-12, atol=1e-12)
    levels = (plan.sigma / plan.alpha)[:-1:2]
    edm = build_plan(EDM(), predictor_corrector, 20, Grid(EDM(), sigmas=levels), **options)
    other = edm.run(mixture.model(EDM()), x / plan.alpha[0], noise=lambda k: draws[k])
    torch.testing.assert_close(other, together, rtol=1e-9, atol=1e-9)
    published = build_plan(VP, predictor_corrector, 50, Grid(VP, "time"), as_published=True)
    noise = lambda k: draws[k % 20]  # noqa: E731
    together = published.run(mixture.model(VP), x, noise=noise)
    alone = published.run(mixture.model(VP), x[2:3], noise=lambda k: noise(k)[2:3])
    assert (together[2:3] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", [VP, SD, VE], ids=["vp", "sd", "ve"])
def test_samples_have_the_mixtures_moments(mixture, schedule):
    """Predictor-corrector end to end: mean and covariance of 4,000 samples of the mixture, 60 calls, 5 standard errors.

    Guidance with scale 1 and predictions other than epsilon go the same way.
    """
    n = 4000
    rng = torch.Generator().manual_seed(5)
    x = schedule.init_scale * torch.randn(n, 1, 1, 2, dtype=torch.float64, generator=rng)
    plan = build_plan(schedule, predictor_corrector, 60, corrector="ald", snr=0.1, prediction="sample")
    out = plan.run(
        mixture.model(schedule, "sample"), x, generator=rng, guidance=Guidance(1.0, mixture.model(schedule, "sample"))
    ).view(n, 2)
    means, w = mixture.means.view(3, 2), mixture.weights
    mean = w @ means
    second = w[:, None, None] * (means[:, :, None] * means[:, None] + torch.diag_embed(mixture.stds.view(3, 2) ** 2))
    cov = second.sum(0) - torch.outer(mean, mean)
    assert (out.mean(0) - mean).abs().max() < 5 * (cov.diag() / n).sqrt().max() + 0.02  # 0.02: the bias of 30 steps
    assert (out.T.cov() - cov).abs().max() < 5 * cov.max() * math.sqrt(2 / n) + 0.06


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_the_state_stays_wide(mixture, z, dtype, bound):
    plan = build_plan(SD, predictor_corrector, 20, corrector_steps=1, snr=0.05)
    draws = torch.randn(20, *z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    exact = plan.run(mixture.model(SD), z, noise=lambda k: draws[k])
    states = set()
    out = plan.run(
        mixture.model(SD),
        z.to(dtype),
        noise=lambda k: draws[k],  # float64 noise does not widen it either
        callback=lambda k, state: states.add(state.input.dtype),
    )
    assert out.dtype == dtype and states == {torch.float32}
    assert (out.double() - exact).abs().max() < bound


def test_a_zero_score_moves_nothing():
    """An untrained network (output 0) has no step size; the sample stays, and nothing becomes NaN."""
    x = torch.randn(2, 3, 4)
    plan = build_plan(VP, predictor_corrector, 4, predictor="none")
    assert torch.equal(plan.run(lambda x, t: torch.zeros_like(x), x), x)


def test_the_loop_compiles_without_graph_breaks():
    plan = build_plan(SD, predictor_corrector, 6)
    net, draws = torch.nn.Conv2d(4, 4, 3, padding=1), torch.randn(6, 1, 4, 8, 8)
    run = lambda x: plan.run(lambda v, t: net(v), x, noise=lambda k: draws[k], check_finite=False)  # noqa: E731
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x))


def test_model_calls_are_what_steps_says(mixture, z):
    for options, each in (
        ({}, 2),
        ({"corrector_steps": 3}, 4),
        ({"corrector": "none"}, 1),
        ({"predictor": "none", "corrector_steps": 2}, 2),
    ):
        calls = []
        plan = build_plan(VP, predictor_corrector, 12, **options)
        plan.run(lambda x, t, seen=calls: seen.append(float(t)) or mixture.model(VP)(x, t), z)
        assert len(calls) == len(plan) == 12 and len(set(calls)) == 12 // each
        if options.get("predictor") != "none":
            assert plan.sigma[-1] == 0.0


def test_non_finite_output_is_placed():
    plan = build_plan(VP, predictor_corrector, 6)
    broken = lambda x, t: x * float("nan") if t < 0.99 * plan.t[0] else x  # noqa: E731
    with pytest.raises(FloatingPointError, match=rf"call 2 of 6 .*sigma {plan.sigma[2]:.4g}\)"):
        plan.run(broken, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (predictor_corrector, {"snr": 0.0}, "snr.* 0"),
        (predictor_corrector, {"snr": float("nan")}, "snr.*nan"),
        (predictor_corrector, {"steps": 7}, " 2 .* 7.* 6 .* 8"),
        (predictor_corrector, {"steps": 2, "corrector_steps": 2}, " 3 .* 2.* 3"),
        (predictor_corrector, {"steps": 0}, " 0"),
        (
            predictor_corrector,
            {"predictor": "reverse"},
            "unknown predictor 'reverse': did you mean 'reverse_diffusion'",
        ),
        (predictor_corrector, {"corrector": "langevn"}, "unknown corrector 'langevn': did you mean 'langevin'"),
        (predictor_corrector, {"corrector_steps": 0}, "corrector_steps.* 0"),
        (predictor_corrector, {"predictor": "none", "corrector": "none"}, "none"),
        (predictor_corrector, {"predictor": "ancestral_sampling", "probability_flow": True}, "ancestral_sampling"),
        (predictor_corrector, {"snrr": 0.1}, "did you mean 'snr'"),
        (reverse_diffusion, {"steps": 0}, "0|2.5"),
        (reverse_diffusion, {"as_published": True}, "beta_max = 20.* 8"),
        (reverse_diffusion, {"as_published": True, "grid": "logsnr"}, "as_published.*VPLinear.*EDM"),
        (ancestral_sampling, {"variance": "larger"}, "did you mean 'large'"),
    ],
)
def test_misuse(solver, options, message):
    with pytest.raises(ValueError, match=message):
        build_plan(VP, solver, **{"steps": 8, "grid": "time"} | options)


def test_what_a_grid_must_have():
    flow = RectifiedFlow()
    assert np.isfinite(build_plan(flow, reverse_diffusion, 8).rows).all()  # alpha = 0 at the start is fine here
    with pytest.raises(ValueError, match=r"ancestral_sampling.*alpha = 0.*ddim"):
        build_plan(flow, ancestral_sampling, 8)
    with pytest.raises(ValueError, match=r"alpha = 0.*reverse_diffusion"):
        build_plan(flow, euler_maruyama, 8)
    back = Grid(VP, "time", end="t_end", t_start=0.1, t_end=0.9)
    for predictor in (reverse_diffusion, ancestral_sampling, euler_maruyama):
        with pytest.raises(ValueError, match="noise"):
            build_plan(VP, predictor, 8, back)


def test_a_tail_is_the_rest_of_the_plan(mixture, z):
    """Begun in the middle (image-to-image), correctors stay correctors."""
    plan = build_plan(VP, predictor_corrector, 12, corrector_steps=2, snr=0.05)
    states, draws = [], torch.randn(12, *z.shape, dtype=torch.float64)
    whole = plan.run(mixture.model(VP), z, noise=lambda k: draws[k], callback=lambda k, state: states.append(state))
    for first in (3, 4, 5):
        rest = tail(plan, first).run(mixture.model(VP), states[first - 1].input, noise=lambda k: draws[first + k])  # noqa: B023
        torch.testing.assert_close(rest, whole)


def test_a_langevin_plan_is_not_a_table(tmp_path):
    with pytest.raises(ValueError, match="saved"):
        build_plan(VP, predictor_corrector, 8).save(tmp_path / "plan.safetensors")
    build_plan(VP, predictor_corrector, 8, corrector="ald").save(tmp_path / "plan.safetensors")
