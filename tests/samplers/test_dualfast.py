"""DualFast against the formula, computed step by step from the states and noise predictions themselves."""

import math

import numpy as np
import pytest
import torch

from samplers import EDM, RectifiedFlow, VPLinear, build_plan, dualfast

VP = VPLinear()
PLANS = {
    "ddim": {},
    "dpmpp": {"order": 3},
    "dpmpp eps": {"order": 2, "target": "epsilon"},
    "deis": {"order": 3},
    "ipndm": {},
}


def by_hand(plan, model, x, c, tau):
    """Each step of `plan` from the true x_0 of the states before, plus the first-order term of the new eps."""
    states, outputs, eps = [], [], []
    for k in range(len(plan)):
        alpha, sigma = plan.alpha[k], plan.sigma[k]
        states.append(x)
        out = model(x, torch.tensor(plan.label[k]))
        eps.append(out)
        outputs.append(plan.reads[k, 0] * x + plan.reads[k, 1] * out)
        new = plan.rows[k, 0, 0] * x
        for j, weight in enumerate(plan.rows[k, 0, 3:]):
            if weight:
                new = new + weight * outputs[k - j]
        other = eps[0] if tau == "first" else eps[max(k - 1, 0)]
        new_eps = (1 + c * (1 - plan.t[k] / plan.t[0])) * eps[k] - c * (1 - plan.t[k] / plan.t[0]) * other
        first = plan.alpha[k + 1] * -(sigma / alpha) + plan.sigma[k + 1]  # of eps in a DDIM step
        x = new + first * (new_eps - eps[k])
    return x


@pytest.mark.parametrize("tau", ["previous", "first"])
@pytest.mark.parametrize("solver", PLANS)
def test_formula(mixture, z, solver, tau):
    plan = build_plan(VP, solver.split()[0], 7, **PLANS[solver])
    found = dualfast(plan, 0.4, tau).run(mixture.model(VP), z)
    assert (found - by_hand(plan, mixture.model(VP), z, 0.4, tau)).abs().max() < 1e-10


def test_ddim_step_is_ddim_with_the_new_eps(mixture, z):
    """x_t = alpha_t x_0(eps_new) + sigma_t eps_new (arXiv 2010.02502, eq. 12), on EDM's schedule."""
    schedule = EDM()
    plan = build_plan(schedule, "ddim", 3, "karras")
    x, eps = 80.0 * z, []
    for k in range(3):
        eps.append(mixture.model(schedule)(x, torch.tensor(plan.label[k])))
        c = 0.3 * (1 - plan.sigma[k] / plan.sigma[0])
        new = (1 + c) * eps[k] - c * eps[0]
        x = (x - plan.sigma[k] * new) + plan.sigma[k + 1] * new
    assert (dualfast(plan, 0.3, "first").run(mixture.model(schedule), 80.0 * z) - x).abs().max() < 1e-11


@pytest.mark.parametrize("solver", PLANS)
def test_no_correction_leaves_the_results(mixture, z, solver):
    plan = build_plan(VP, solver.split()[0], 9, prediction="v_prediction", **PLANS[solver])
    model = mixture.model(VP, "v_prediction")
    assert (dualfast(plan, 0.0).run(model, z) - plan.run(model, z)).abs().max() < 1e-10


def test_order(mixture, z):
    """With the previous call, first order; with the first call it converges to something else."""
    exact = mixture.exact(VP, z)

    def error(n, tau):
        plan = dualfast(build_plan(VP, "ddim", n, end="t_end"), 0.5, tau)
        return (plan.run(mixture.model(VP), z) - exact).square().mean().sqrt().item()

    assert abs(math.log2(error(80, "previous") / error(160, "previous")) - 1) < 0.3
    assert error(160, "first") > 0.8 * error(80, "first") > 0.1


def test_saved_and_loaded(mixture, z, tmp_path):
    plan = dualfast(build_plan(VP, "dpmpp", 6), 0.5, "first")
    plan.save(tmp_path / "plan.safetensors")
    again = type(plan).load(tmp_path / "plan.safetensors")
    assert np.array_equal(again.rows, plan.rows)
    assert torch.equal(again.run(mixture.model(VP), z), plan.run(mixture.model(VP), z))


@pytest.mark.parametrize(
    ("plan", "options", "match"),
    [
        (lambda: build_plan(VP, "heun", 7), {}, "heun"),
        (lambda: build_plan(VP, "ddim", 7, eta=1.0), {}, "ddim"),
        (lambda: build_plan(VP, "evodiff", 7), {}, "evodiff"),
        (lambda: build_plan(RectifiedFlow(), "ddim", 7, prediction="flow"), {}, "alpha = 0"),
        (lambda: build_plan(VP, "ddim", 7), {"tau": "last"}, "tau"),
        (lambda: build_plan(VP, "ddim", 7), {"c": math.nan}, "c must"),
    ],
)
def test_what_it_refuses(plan, options, match):
    with pytest.raises(ValueError, match=match):
        dualfast(plan(), **options)
