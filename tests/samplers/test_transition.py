"""`Plan.transition`: a step's Gaussian against the papers' formulas, torch's distributions and the executor's draws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ids import named
from torch.distributions import Normal, kl_divergence

from samplers import EDM, Grid, Plan, RectifiedFlow, VPDiscrete, VPLinear, build_plan, convert
from samplers.plan import State, row
from samplers.solvers.renoise import renoise
from samplers.stochastic import euler_maruyama

SD, VP = VPDiscrete.scaled_linear(), VPLinear()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, OUT, OLD, NEXT = (normal(3, 2, 4, seed=seed) for seed in range(4))


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim(eta, prediction):
    """Song, Meng & Ermon 2021, eq. 12 and 16, written on alpha_bar."""
    plan = build_plan(SD, "ddim", 7, "time", prediction, end="t_end", eta=eta)
    for k in range(7):
        now, then = plan.alpha[k] ** 2, plan.alpha[k + 1] ** 2
        std = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        x_0 = convert(X, OUT, prediction, "sample", plan.alpha[k], plan.sigma[k])
        eps = (X - math.sqrt(now) * x_0) / math.sqrt(1 - now)
        mean = math.sqrt(then) * x_0 + math.sqrt(1 - then - std**2) * eps
        step = plan.transition(k)
        close(step.mean(X, OUT), mean)
        assert step.std == pytest.approx(std, rel=1e-9) and step.input == step.constant == 0.0
        y = (NEXT - step.anchor * X) / step.outputs[0]
        close(step.target(X, NEXT), y)
        assert step.weight == pytest.approx(step.outputs[0] ** 2 / (2 * std**2), rel=1e-9)


def test_sde_dpm_solver_of_order_2():
    """Lu et al. 2022, arXiv 2211.01095, SDE-DPM-Solver++(2M): the mean uses the x_0 of the call before as well."""
    plan = build_plan(VP, "dpmpp", 6, end="t_end", prediction="epsilon", eta=1.0, lower_order_final=False)
    k, lam = 3, np.log(plan.alpha / plan.sigma)
    h, r = lam[k + 1] - lam[k], (lam[k] - lam[k - 1]) / (lam[k + 1] - lam[k])
    x_0, alpha, sigma = (X - plan.sigma[k] * OUT) / plan.alpha[k], plan.alpha[k + 1], plan.sigma[k + 1]
    d = (1 + 1 / (2 * r)) * x_0 - OLD / (2 * r)
    mean = sigma / plan.sigma[k] * math.exp(-h) * X + alpha * (1 - math.exp(-2 * h)) * d
    step = plan.transition(k)
    close(step.mean(State(X, X, (OLD,)), OUT), mean)
    assert step.std == pytest.approx(sigma * math.sqrt(1 - math.exp(-2 * h)), rel=1e-9)
    with pytest.raises(ValueError, match="1 earlier outputs"):
        step.mean(X, OUT)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_sa_solver_of_order_1(tau):
    """Xue et al. 2023, arXiv 2309.05019, eq. 9-10 with x_0 constant over the step."""
    plan = build_plan(
        VP, "sa_solver", 6, end="t_end", prediction="sample", predictor_order=1, corrector_order=0, tau=tau
    )
    for k in range(5):  # the last step of 'few_steps' has no noise
        h = math.log(plan.alpha[k + 1] / plan.sigma[k + 1]) - math.log(plan.alpha[k] / plan.sigma[k])
        alpha, sigma, stretch = plan.alpha[k + 1], plan.sigma[k + 1], 1 + tau**2
        mean = sigma / plan.sigma[k] * math.exp(-(tau**2) * h) * X + alpha * (1 - math.exp(-stretch * h)) * OUT
        step = plan.transition(k)
        close(step.mean(X, OUT), mean)
        assert step.std == pytest.approx(sigma * math.sqrt(1 - math.exp(-2 * tau**2 * h)), rel=1e-9)
    assert plan.transition(5).std == 0.0


@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_ancestral_euler(eta):
    """k-diffusion's get_ancestral_step and sample_euler_ancestral: alpha = 1, d = (x - denoised) / sigma."""
    plan = build_plan(EDM(), "euler_ancestral", 6, "karras", "sample", end="t_end", eta=eta, s_noise=1.1)
    for k in range(6):
        now, to = plan.sigma[k], plan.sigma[k + 1]
        up = min(to, eta * math.sqrt(to**2 * (now**2 - to**2) / now**2))
        down = math.sqrt(to**2 - up**2)
        step = plan.transition(k)
        close(step.mean(X, OUT), X + (X - OUT) / now * (down - now), atol=1e-9)
        assert step.std == pytest.approx(1.1 * up, rel=1e-9)


def test_the_sde_of_a_flow():
    """Euler-Maruyama with the velocity v (arXiv 2505.05470): with noise g the drift is v + g^2/(2t) (x + (1-t) v)."""
    grid = Grid(RectifiedFlow(t_min=0.05), "time", end="t_end", t_start=0.9)
    plan = build_plan(grid.schedule, euler_maruyama, 6, grid, "flow")
    for k in range(6):
        t, dt = plan.t[k], plan.t[k + 1] - plan.t[k]
        g2 = 2 * t / (1 - t)
        step = plan.transition(k)
        close(step.mean(X, OUT), X + (OUT + g2 / (2 * t) * (X + (1 - t) * OUT)) * dt)
        assert step.std == pytest.approx(math.sqrt(g2 * -dt), rel=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_renoising(prediction):
    plan = build_plan(SD, renoise, 4, "trailing", prediction)
    for k in range(4):
        step = plan.transition(k)
        x_0 = convert(X, OUT, prediction, "sample", plan.alpha[k], plan.sigma[k])
        close(step.mean(X, OUT), plan.alpha[k + 1] * x_0)
        assert step.std == plan.sigma[k + 1]
    assert plan.transition(3).std == 0.0


STOCHASTIC = [  # solver, options, the calls whose draw is no single Gaussian
    ("ddim", {"eta": 0.7}, []),
    ("dpmpp", {"eta": 1.0, "order": 3}, []),
    ("singlestep", {"eta": 1.0, "order": 2, "fixed": True}, [0, 2, 4, 6]),
    ("singlestep", {"eta": 1.0, "order": 2, "fixed": True, "as_published": True}, []),
    ("sa_solver", {"tau": 1.0}, []),
    ("sa_solver", {"tau": 0.5, "pece": True}, []),
    ("sa_solver", {"tau": 0.5, "mode": "more_steps"}, []),
    ("euler", {"s_churn": 3.0}, []),
    ("heun", {"s_churn": 3.0}, []),
    ("dpm2", {"s_churn": 3.0}, []),
    ("runge_kutta", {"s_churn": 3.0}, []),
    ("euler_ancestral", {}, []),
    ("dpm2_ancestral", {}, []),
    ("dpmpp_2s_ancestral", {}, []),
    ("dpmpp_sde", {}, [1, 3, 5, 7]),
    ("dpmpp_sde", {"independent_noise": True}, []),
    ("reverse_diffusion", {}, []),
    ("euler_maruyama", {}, []),
    ("er_sde", {"order": 3}, []),
    ("flow_sde", {}, []),
    ("predictor_corrector", {"corrector": "ald"}, []),
    ("predictor_corrector", {}, [0, 2, 4, 6, 8]),
]
CALLS = {"predictor_corrector": 10, "singlestep": 8}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("solver", "options", "refused"), STOCHASTIC, ids=named)
def test_every_stochastic_solver(solver, options, refused, prediction):
    """In every call the executor's result is the mean without noise, and moves by std with the noise."""
    calls = CALLS.get(solver, 9)
    plan = build_plan(VP, solver, calls, end="t_end", prediction=prediction, **options)
    assert plan.stochastic
    state, none, found = plan.begin(X, torch.zeros_like(X)), torch.zeros_like(X), []
    for k in range(len(plan)):
        out, noise = normal(*X.shape, seed=10 + k), normal(*X.shape, seed=50 + k)
        after = plan.step(k, state, out, noise)
        try:
            step = plan.transition(k)
        except ValueError as error:
            assert f"call {k}" in str(error)
            found.append(k)
        else:
            close(step.mean(state, out), plan.step(k, state, out, none).input)
            close(step.sample(state, out, noise), after.input)
            assert (step.std > 0) == plan.needs_noise(k)
            close(step.mean(state, step.target(state, NEXT)), NEXT, atol=1e-9)
        state = after
    assert found == refused


@pytest.mark.parametrize(("solver", "options"), [("sa_solver", {"tau": 1.0}), ("dpmpp_2s_ancestral", {})])
def test_many_draws_of_the_executor(solver, options):
    """Mean and standard deviation of 100,000 draws of one step that uses history, or two calls."""
    plan, n = build_plan(VP, solver, 7, end="t_end", **options), 100_000
    k = next(k for k in range(3, 7) if plan.needs_noise(k))
    state = plan.begin(torch.tensor([[0.3]], dtype=torch.float64))
    for i in range(k):
        state = plan.step(i, state, 0.1 * (i + state.input), normal(1, 1, seed=i))
    many = State(state.input.expand(n, 1), state.anchor.expand(n, 1), tuple(m.expand(n, 1) for m in state.history))
    draws = plan.step(k, many, torch.full((n, 1), -0.4, dtype=torch.float64), normal(n, 1)).input
    step = plan.transition(k)
    mean = step.mean(state, torch.tensor([[-0.4]], dtype=torch.float64)).item()
    assert abs(draws.mean().item() - mean) < 5 * step.std / math.sqrt(n)
    assert abs(draws.std().item() / step.std - 1) < 5 / math.sqrt(2 * n)


def test_densities():
    """Against torch's Normal; and the log-likelihood ratio of two networks as a weighted regression on y*."""
    step = build_plan(SD, "dpmpp", 6, prediction="v_prediction", eta=1.0).transition(2)
    state = State(X, X, (OLD, OLD))
    policy, reference = OUT, OUT + 0.1 * OLD
    log_p, log_ref = (Normal(step.mean(state, out), step.std).log_prob(NEXT).sum((1, 2)) for out in (policy, reference))
    close(step.log_prob(state, policy, NEXT), log_p)
    y = step.target(state, NEXT)
    ratio = step.weight * ((reference - y).square() - (policy - y).square()).sum((1, 2))
    close(ratio, log_p - log_ref, atol=1e-9)
    gaussians = [Normal(step.mean(state, out), step.std) for out in (policy, reference)]
    close(step.kl(policy, reference), kl_divergence(*gaussians).sum((1, 2)))


def test_in_float32_a_step_of_one_call_is_the_plain_expression():
    """Training compares numbers to the last bit: `a x + b out`, then `+ std z`, and `(x' - a x) / b`."""
    step = build_plan(SD, "ddim", 5, prediction="v_prediction", eta=1.0).transition(1)
    x, out, z = (each.float() for each in (X, OUT, NEXT))
    a, (b,), std = step.anchor, step.outputs, step.std
    assert torch.equal(step.mean(x, out), a * x + b * out)
    assert torch.equal(step.sample(x, out, z), a * x + b * out + std * z)
    assert torch.equal(step.target(x, z), (z - a * x) / b)
    assert step.mean(x, out.bfloat16()).dtype == torch.float32


def test_what_is_no_gaussian():
    plan = build_plan(SD, "ddim", 3)
    for use in (lambda s: s.weight, lambda s: s.log_prob(X, OUT, NEXT), lambda s: s.kl(OUT, OLD)):
        with pytest.raises(ValueError, match="std = 0"):
            use(plan.transition(0))
    for k in (-1, 3):
        with pytest.raises(ValueError, match=str(k)):
            plan.transition(k)
    with pytest.raises(ValueError, match="noise="):
        build_plan(SD, "ddim", 3, eta=1.0).transition(0).sample(X, OUT)
    stage = build_plan(VP, "dpmpp_2s_ancestral", 4, end="t_end").transition(1)
    with pytest.raises(ValueError, match="State"):
        stage.mean(X, OUT)
    idle = Plan.build("idle", "epsilon", Grid(SD).nodes(1), [row(1.0, 0.0, noise=1.0)]).transition(0)
    with pytest.raises(ValueError, match="output"):
        idle.target(X, NEXT)
    varied = replace(plan, rows=np.broadcast_to(plan.rows[..., None], (*plan.rows.shape, 4)))
    with pytest.raises(ValueError, match="call 0"):
        varied.transition(0)
