"""The continuous adjoint against the exact gradient of the ODE, by its order, and against `gradients.sample`."""

import math

import pytest
import torch
from ids import named
from scipy.integrate import solve_ivp

from samplers import RectifiedFlow, VPDiscrete, VPLinear, adjoint, build_plan, gradients

VP = VPLinear()
ORDERS = [  # solver of both ways, options, order, calls
    ("ddim", {}, 1, 80),
    ("dpmpp", {"lower_order_final": False}, 2, 80),
    ("singlestep", {"order": 3, "fixed": True}, 3, 81),
    ("unipc", {"order": 2, "lower_order_final": False}, 3, 80),
    ("lms", {"order": 3}, 3, 80),
    ("runge_kutta", {"method": "4rk"}, 4, 160),
]


def loss(x):
    return x.pow(3).sum()


def plans(schedule, solver, calls, **options):
    back = {"t_start": schedule.t_min, "t_end": schedule.t_max}
    return [build_plan(schedule, solver, calls, end="t_end", **options, **way) for way in ({}, back)]


@pytest.fixture(scope="module")
def exact(mixture, z):
    """d loss / dz of the exact solution: the adjoint ODE of x / alpha along sigma / alpha by DOP853, and the solution.

    It shares no code with the solvers, and the start is the exact solution, not one of ours.
    """
    kappa = [float(VP.sigma(t) / VP.alpha(t)) for t in (VP.t_min, VP.t_max)]
    alpha = [float(VP.alpha(t)) for t in (VP.t_min, VP.t_max)]
    end = mixture.exact(VP, z).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(end), end)

    def slope(level, packed):
        y, a = torch.from_numpy(packed).view(2, *z.shape)
        y = y.requires_grad_()
        eps = mixture.posterior(y, 1.0, float(level))[1]
        (pull,) = torch.autograd.grad(eps, y, a)
        return torch.stack([eps.detach(), -pull]).numpy().ravel()

    start = torch.stack([end.detach() / alpha[0], alpha[0] * gradient]).numpy().ravel()
    found = solve_ivp(slope, kappa, start, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return torch.from_numpy(found).view(2, *z.shape)[1] / alpha[1]


def gradient(run, z):
    x = z.clone().requires_grad_()
    return torch.autograd.grad(loss(run(x)), x)[0]


@pytest.mark.parametrize(("solver", "options", "order", "calls"), ORDERS, ids=named)
def test_order(mixture, z, exact, solver, options, order, calls):
    errors = []
    for n in (calls, 2 * calls):
        plan, back = plans(VP, solver, n, **options)
        found = gradient(lambda x: adjoint.sample(plan, back, mixture.model(VP), x), z)  # noqa: B023
        errors.append((found - exact).square().mean().sqrt().item())
    measured = math.log2(errors[0] / errors[1])
    assert abs(measured - order) < 0.35, f"measured {measured:.2f} from errors {errors}"


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_gradients_of_parameters(mixture, z, prediction):
    """Against the exact gradient of the same run; RectifiedFlow starts at alpha = 0."""
    schedule, solver, options = RectifiedFlow(), "abm", {}
    if prediction == "epsilon":
        schedule, solver, options = VP, "unipc", {"lower_order_final": False}
    inner = mixture.model(schedule, prediction)
    weight = torch.tensor(1.02, dtype=torch.float64, requires_grad=True)
    condition = torch.full_like(z, 0.01).requires_grad_()

    def model(x, label):
        return weight * inner(x, label) + condition * torch.tanh(x)

    wanted, errors = (weight, condition), []
    for calls in (25, 50):
        plan, back = plans(schedule, solver, calls, prediction=prediction, order=2, **options)
        found = torch.autograd.grad(loss(adjoint.sample(plan, back, model, z, wanted)), wanted)
        expected = torch.autograd.grad(loss(gradients.sample(plan, model, z)), wanted)
        errors.append([float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 5e-3
        assert coarse > 3 * fine, errors


def test_a_parameter_without_gradient_is_left_alone(mixture, z):
    plan, back = plans(VP, "ddim", 4)
    fixed, x = torch.ones(3), z.clone().requires_grad_()
    loss(adjoint.sample(plan, back, mixture.model(VP), x, (fixed,))).backward()
    assert fixed.grad is None
    assert x.grad.isfinite().all()


def test_bad_plans(mixture, z):
    plan, back = plans(VP, "ddim", 4)
    model = mixture.model(VP)
    with pytest.raises(ValueError, match="sigma = 0"):
        adjoint.sample(build_plan(VP, "ddim", 4), back, model, z)
    with pytest.raises(ValueError, match=r"from t = 0\.001 to 1"):
        adjoint.sample(plan, plan, model, z)
    with pytest.raises(ValueError, match="adds noise"):
        adjoint.sample(build_plan(VP, "ddim", 4, eta=1.0, end="t_end"), back, model, z)
    with pytest.raises(ValueError, match="method"):
        adjoint.published_plan(VPDiscrete.scaled_linear(), 10, "midpoint")
