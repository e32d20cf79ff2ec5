"""Every stochastic plan as a source of transitions: densities, divergences, and where the gradient goes."""

import math

import pytest
import torch
from ids import named
from torch.distributions import Normal, kl_divergence

from diffpo.common.errors import DiffpoError
from diffpo.config import RolloutSettings
from diffpo.problems.transitions import sampler_plan, sampler_steps, without_history
from samplers import RectifiedFlow, VPDiscrete

SD, FLOW = VPDiscrete.scaled_linear(), RectifiedFlow(shift=3.0)
PLANS = [  # step, options, flows too
    ("ddim", {}),
    ("dpmpp", {"order": 1, "eta": 1.0}),
    ("dpmpp", {"order": 2, "eta": 1.0}),
    ("sa_solver", {"tau": 0.8}),
    ("euler_ancestral", {}),
    ("flow_sde", {"amount": 0.9}),
    ("er_sde", {"order": 2}),
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settings(step, options, **more):
    return RolloutSettings(step=step, step_options=options, steps=6, eta=0.7, **more)


@pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize(("step", "options"), PLANS, ids=named)
def test_ratios_and_divergences_are_those_of_the_executors_gaussian(step, options, schedule):
    """To 1e-10 in float64, along a trajectory: the Gaussian is read off the executor's own draws."""
    prediction = "flow" if schedule is FLOW else "epsilon"
    plan, _ = sampler_plan(settings(step, options), schedule, prediction)
    steps = sampler_steps(settings(step, options), schedule, prediction)
    x = random(2, 3, 4)
    state, noisy = plan.begin(x, random(2, 3, 4, seed=7)), 0
    for k, each in enumerate(steps):
        out, other, z = (random(2, 3, 4, seed=10 * k + i) for i in range(3))
        zero, one = torch.zeros_like(z), torch.ones_like(z)
        quiet = [plan.step(k, state, each_out, zero).input for each_out in (out, other)]
        std = (plan.step(k, state, out, one).input - quiet[0]).flatten()[0].item()
        after = plan.step(k, state, out, z)
        if abs(std) > 1e-9:
            noisy += 1
            mine, theirs = (Normal(mean, abs(std)) for mean in quiet)
            ratio = (mine.log_prob(after.input) - theirs.log_prob(after.input)).mean((1, 2))
            y = each.transition.target(state, after.input)
            errors = [(each_out - y).square().mean((1, 2)) for each_out in (out, other)]
            torch.testing.assert_close(each.transition.weight * (errors[1] - errors[0]), ratio, rtol=1e-10, atol=1e-10)
            drift = (out - other).square().mean((1, 2))
            kl = kl_divergence(mine, theirs).mean((1, 2))
            torch.testing.assert_close(each.transition.weight * drift, kl, rtol=1e-10, atol=1e-10)
            density = mine.log_prob(after.input).sum((1, 2))
            torch.testing.assert_close(
                each.transition.log_prob(state, out, after.input), density, rtol=1e-10, atol=1e-10
            )
        state = after
    assert noisy >= 4


def test_the_gradient_goes_through_the_newest_output_only():
    """SDE-DPM-Solver++(2M): the regression has the gradient of the step's density with earlier outputs held, and the
    density of the whole trajectory has another one."""
    chosen = settings("dpmpp", {"order": 2, "eta": 1.0})
    plan, _ = sampler_plan(chosen, SD, "epsilon")
    steps = sampler_steps(chosen, SD, "epsilon")
    assert not without_history(steps) and without_history(sampler_steps(settings("ddim", {}), SD, "epsilon"))
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def walk(held):
        state, total, k = plan.begin(random(1, 2, 3)), 0.0, 0
        for k in range(3):
            given = state._replace(history=tuple(m.detach() for m in state.history)) if held else state
            given = given._replace(input=given.input.detach(), anchor=given.anchor.detach())
            out = theta * given.input + 0.1 * k
            after = plan.step(k, given, out, random(1, 2, 3, seed=k + 1))
            total = total + steps[k].transition.log_prob(given, out, after.input.detach()).sum()
            state = after
        return torch.autograd.grad(total, theta)[0].item()

    state, regressed = plan.begin(random(1, 2, 3)), 0.0
    for k in range(3):
        out = theta * state.input + 0.1 * k
        after = plan.step(k, state, out.detach(), random(1, 2, 3, seed=k + 1))
        y = steps[k].transition.target(state, after.input)
        regressed = regressed - steps[k].transition.weight * (out - y).square().sum()
        state = after
    assert torch.autograd.grad(regressed, theta)[0].item() == pytest.approx(walk(held=True), rel=1e-9)
    assert abs(walk(held=False) / walk(held=True) - 1) > 1e-3


@pytest.mark.parametrize(
    ("step", "options", "names"),
    [
        ("flow_sdf", {}, "flow_sde"),
        ("flow_sde", {"amount": -1.0}, "amount"),
        ("flow_sde", {"amout": 1.0}, "amout"),
        ("dpmpp_sde", {}, "between the timesteps"),
        ("heun", {"s_churn": 3.0}, "between the timesteps"),
        ("dpmpp", {"eta": 0.0}, "step_options"),
        ("predictor_corrector", {"corrector": "langevin"}, "rollout.step=predictor_corrector"),
    ],
)
def test_what_gives_no_transitions_is_refused_by_name(step, options, names):
    with pytest.raises(DiffpoError, match=names):
        sampler_steps(settings(step, options), SD, "epsilon")


@pytest.mark.parametrize(("step", "options"), [("ddim", {}), ("flow_sde", {}), ("dpmpp", {"eta": 1.0})], ids=named)
def test_a_window_has_the_solvers_noise_inside_and_its_ode_outside(step, options):
    """MixGRPO: row by row."""
    mixed, _ = sampler_plan(settings(step, options, window=2), FLOW, "flow", range(1, 3))
    noisy, _ = sampler_plan(settings(step, options), FLOW, "flow")
    name = {"ddim": "eta", "flow_sde": "amount", "dpmpp": "eta"}[step]
    quiet_settings = settings(step, {**options, name: 0.0}) if step != "ddim" else RolloutSettings(steps=6, eta=0.0)
    quiet, _ = sampler_plan(quiet_settings, FLOW, "flow")
    for k in range(6):
        source = noisy if k in (1, 2) else quiet
        assert (mixed.rows[k] == source.rows[k]).all(), k
        assert (mixed.transition(k).std > 0) == (k in (1, 2))
    assert math.isclose(mixed.transition(1).std, noisy.transition(1).std)
