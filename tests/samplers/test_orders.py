"""The order of every solver: deterministic ones against the exact solution, stochastic ones by their exact moments.

A new solver is one row in ORDERS (or WEAK).
"""

import math

import numpy as np
import pytest
import torch
from ids import named
from scipy.interpolate import CubicSpline

from samplers import Statistics, VPLinear, build_plan, sample
from samplers.analytic import GaussianMixture
from samplers.calibrate import Batch, Problem, estimate
from samplers.solvers import SOLVERS

VP = VPLinear()
FULL = {"lower_order_final": False}
OF_MODEL = {"statistics": "mixture"}  # see `fitted`
METHODS = (("euler", 1, 80), ("2heun", 2, 80), ("3kutta", 3, 81), ("4rk", 4, 160))
ORDERS = [  # solver, options, claimed order, calls
    ("ddim", {}, 1, 80),
    ("dpmpp", {"order": 1}, 1, 80),
    ("dpmpp", {"order": 2, **FULL}, 2, 80),
    ("dpmpp", {"order": 2, "solver_type": "heun", **FULL}, 2, 80),
    ("dpmpp", {"order": 3, **FULL}, 3, 80),
    ("dpmpp", {"order": 3, "as_published": True, **FULL}, 2, 80),
    ("dpmpp", {"order": 2, "target": "epsilon", **FULL}, 2, 80),
    ("dpmpp", {"order": 3, "target": "epsilon", **FULL}, 3, 80),
    ("singlestep", {"order": 1}, 1, 80),
    ("singlestep", {"order": 2, "fixed": True}, 2, 80),
    ("singlestep", {"order": 2, "fixed": True, "solver_type": "heun"}, 2, 80),
    ("singlestep", {"order": 3, "fixed": True}, 3, 81),
    ("singlestep", {"order": 3, "fixed": True, "solver_type": "heun"}, 3, 81),
    ("singlestep", {"order": 3, "fixed": True, "target": "epsilon"}, 3, 81),
    ("unipc", {"order": 1, "corrector": False}, 1, 80),
    ("unipc", {"order": 2, "corrector": False, **FULL}, 2, 80),
    ("unipc", {"order": 3, "corrector": False, **FULL}, 3, 80),
    ("unipc", {"order": 1, **FULL}, 2, 80),
    ("unipc", {"order": 2, **FULL}, 3, 80),
    ("unipc", {"order": 2, "variant": "bh1", **FULL}, 3, 80),
    ("unipc", {"order": 2, "variant": "vary_coeff", **FULL}, 3, 80),
    ("unipc", {"order": 3, **FULL}, 4, 160),
    ("unipc", {"order": 3, "variant": "bh1", **FULL}, 4, 160),
    ("unipc", {"order": 3, "variant": "vary_coeff", **FULL}, 4, 160),
    ("unipc", {"order": 3, "variant": "vary_coeff", "as_published": True, **FULL}, 1, 160),
    ("unipc", {"order": 3, "target": "epsilon", **FULL}, 4, 320),
    ("dc_solver", {"variant": "bh1", **FULL}, 4, 160),  # with ratios: test_dc.py
    ("dc_solver", {"base": "dpmpp", **FULL}, 2, 80),
    ("dpm_solver_v3", {"order": 1, "corrector": "none", **OF_MODEL}, 1, 80),
    ("dpm_solver_v3", {"order": 2, "corrector": "none", **OF_MODEL, **FULL}, 2, 80),
    ("dpm_solver_v3", {"order": 3, "corrector": "none", **OF_MODEL, **FULL}, 3, 80),
    ("dpm_solver_v3", {"order": 3, "corrector": "none", "pseudo": True, **OF_MODEL, **FULL}, 2, 80),
    ("dpm_solver_v3", {"order": 3, "corrector": "same", **OF_MODEL, **FULL}, 3, 160),
    ("dpm_solver_v3", {"order": 1, "corrector": "full", **OF_MODEL}, 2, 80),
    ("dpm_solver_v3", {"order": 2, "corrector": "full", **OF_MODEL, **FULL}, 3, 80),
    ("dpm_solver_v3", {"order": 3, "corrector": "full", **OF_MODEL, **FULL}, 4, 80),
    ("dpm_solver_v3", {"order": 3, "corrector": "full", **FULL}, 4, 160),
    ("sa_solver", {"predictor_order": 1, "corrector_order": 0}, 1, 80),
    ("sa_solver", {"predictor_order": 2, "corrector_order": 2, **FULL}, 2, 320),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 3, **FULL}, 3, 160),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 4, **FULL}, 4, 160),
    ("sa_solver", {"predictor_order": 2, "corrector_order": 3, "pece": True, **FULL}, 3, 159),
    ("deis", {"order": 1}, 1, 80),
    ("deis", {"order": 2}, 2, 80),
    ("deis", {"order": 3}, 3, 80),
    ("deis", {"order": 4}, 4, 80),
    ("deis", {"order": 4, "variant": "rhoab"}, 4, 80),
    ("deis", {"order": 4, "variant": "logrho"}, 4, 160),
    ("lms", {"order": 2}, 2, 80),
    ("lms", {"order": 3}, 3, 80),
    ("lms", {"order": 4}, 4, 80),
    ("abm", {"order": 1, "final_order": 1}, 2, 80),
    ("abm", {"order": 2}, 3, 80),
    ("abm", {"order": 3, "final_order": 3}, 4, 80),
    ("abm", {"order": 2, "space": "kappa"}, 3, 80),
    ("ipndm", {"order": 4}, 2, 80),
    ("ipndm", {"order": 3, "variable": True}, 3, 80),
    ("ipndm", {"order": 4, "variable": True}, 4, 80),
    ("ipndm", {"order": 4, "variable": True, "as_published": True}, 3, 160),
    ("pndm", {}, 2, 80),
    ("pndm", {"skip_prk": False}, 2, 160),
    ("euler", {}, 1, 80),
    ("euler", {"space": "flow"}, 1, 80),
    ("heun", {}, 2, 80),
    ("heun", {}, 2, 81),  # a call left over: Euler's first step
    ("heun", {"space": "flow"}, 2, 80),
    ("dpm2", {}, 2, 80),
    ("dpm2", {}, 2, 81),
    *[("runge_kutta", {"method": m}, o, c) for m, o, c in METHODS],
    ("reverse_diffusion", {"probability_flow": True}, 1, 160),
    ("euler_maruyama", {"probability_flow": True}, 1, 80),
    ("predictor_corrector", {"corrector": "none", "probability_flow": True}, 1, 160),
    *[("er_sde", {"order": p, "phi": "ode"}, p, 160) for p in (1, 2, 3)],
    ("er_sde", {"order": 3, "phi": "ode", "as_published": True}, 2, 160),
    ("gradient_estimation", {}, 1, 80),
    ("evodiff", {}, 1, 80),
    ("evodiff", {"as_published": True, "lower_order_final": False}, 1, 80),
    ("flow_sde", {"amount": 0.0}, 1, 80),
]
WEAK = [  # solver, options, claimed weak order, calls
    ("ddim", {"eta": 1.0}, 1, 80),
    ("dpmpp", {"order": 1, "eta": 1.0}, 1, 80),
    ("dpmpp", {"order": 2, "eta": 1.0, **FULL}, 2, 80),
    ("singlestep", {"order": 2, "fixed": True, "eta": 1.0}, 2, 80),
    ("sa_solver", {"predictor_order": 1, "corrector_order": 0, "tau": 1.0}, 1, 80),
    ("sa_solver", {"tau": 1.0, **FULL}, 2, 80),
    ("euler", {"s_churn": 10.0}, 1, 80),
    ("heun", {"s_churn": 10.0}, 1, 80),
    ("euler_ancestral", {}, 1, 80),
    ("dpm2_ancestral", {}, 2, 160),
    ("dpmpp_2s_ancestral", {}, 2, 160),
    ("dpmpp_sde", {}, 2, 160),
    ("dpmpp_sde", {"independent_noise": True}, 1, 160),
    ("reverse_diffusion", {}, 1, 80),
    ("euler_maruyama", {}, 1, 80),
    ("predictor_corrector", {"corrector": "none"}, 1, 80),
    ("er_sde", {"order": 1}, 1, 80),
    ("er_sde", {"order": 2}, 2, 80),
    ("er_sde", {"order": 3}, 2, 80),
    ("er_sde", {"order": 2, "phi": "sde"}, 2, 80),
    ("flow_sde", {"amount": 0.7}, 1, 80),
    ("flow_sde", {"amount": math.sqrt(2)}, 1, 80),
]


@pytest.fixture(scope="module")
def exact(mixture, z):
    return mixture.exact(VP, z)


@pytest.fixture(scope="module")
def fitted(mixture):
    """The mixture's statistics, by a spline at so many levels that the corners between them do not count."""
    draw = torch.Generator().manual_seed(0)
    which, (x0, e) = (
        torch.multinomial(mixture.weights, 64, True, generator=draw),
        torch.randn(2, 64, 1, 1, 2, generator=draw, dtype=torch.float64),
    )
    batch = Batch(mixture.model(VP), e, mixture.means[which] + mixture.stds[which] * x0)
    found = estimate(Problem(VP, "epsilon", (batch,), (batch,)), 40)
    lam = np.linspace(found.lam[0], found.lam[-1], 8001)
    return Statistics(lam, *(CubicSpline(found.lam, getattr(found, name))(lam) for name in "lsb"))


def test_every_solver_is_here():
    assert {row[0] for row in ORDERS + WEAK} == set(SOLVERS)


@pytest.mark.parametrize(("solver", "options", "order", "calls"), ORDERS, ids=named)
def test_order(mixture, z, exact, fitted, solver, options, order, calls):
    """Against DOP853 at rtol 1e-12 (GaussianMixture.exact), which shares no code with the solvers."""
    options = {**options, "statistics": fitted} if "statistics" in options else options
    errors = []
    odd = calls % 2 and solver in ("heun", "dpm2", "sa_solver")  # stays odd
    for n in (calls, 2 * calls - odd):
        out = sample(mixture.model(VP), z, schedule=VP, solver=solver, steps=n, end="t_end", **options)
        errors.append((out - exact).square().mean().sqrt().item())
    measured = math.log2(errors[0] / errors[1])
    assert abs(measured - order) < 0.3, f"measured {measured:.2f} from errors {errors}"


def moments(plan, model, mean, variance):
    """Exact mean and variance of a plan's result for x ~ N(mean, variance) in one dimension and an affine model.

    The result is affine in x and in every noise drawn, so one batch with a unit in one place each gives all of it.
    """
    draws = {k: i for i, k in enumerate([k for k in range(-1, len(plan)) if k < 0 or plan.needs_noise(k)], start=2)}
    basis = torch.eye(2 + len(draws), dtype=torch.float64)

    def noise(k):
        return basis[draws[k]].reshape(-1, 1)

    out = plan.run(model, basis[1].reshape(-1, 1), noise=noise).flatten()
    slopes = out[1:] - out[0]
    return (out[0] + slopes[0] * mean).item(), (slopes[0] ** 2 * variance + slopes[1:].square().sum()).item()


@pytest.mark.parametrize(("solver", "options", "order", "calls"), WEAK, ids=named)
def test_weak_order(solver, options, order, calls):
    """Mean and variance on one Gaussian: started from the exact marginal, the exact SDE keeps it to the end."""
    mean, std = 0.7, 0.4
    data = GaussianMixture([1.0], [[mean]], [[std]])

    def marginal(t):
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        return alpha * mean, alpha**2 * std**2 + sigma**2

    truth, errors = marginal(VP.t_min), []
    for n in (calls, 2 * calls):
        plan = build_plan(VP, solver, n, end="t_end", **options)
        assert plan.stochastic
        result = moments(plan, data.model(VP), *marginal(VP.t_max))
        errors.append([abs(a - b) for a, b in zip(result, truth, strict=True)])
    for what, coarse, fine in zip(("mean", "variance"), *errors, strict=True):
        assert fine < 1e-12 or math.log2(coarse / fine) > order - 0.3, f"{what}: errors {coarse:.2e}, {fine:.2e}"
    assert errors[1][1] < 0.1 * std**2
