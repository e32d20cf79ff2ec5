"""ER-SDE against its SDE: from one point, the mean and variance of what a linear model makes of it."""

import math

import pytest
from scipy.integrate import solve_ivp
from test_orders import moments

from samplers import VPLinear, build_plan
from samplers.analytic import GaussianMixture

VP = VPLinear()
MEAN, STD, START = 0.7, 0.4, 1.9
LOG_PHI = {  # the derivative of log phi in kappa
    "ode": lambda k: 1 / k,
    "sde": lambda k: 2 / k,
    "er_sde": lambda k: 1 / k + 0.3 * k**-0.7 * math.exp(k**0.3) / (math.exp(k**0.3) + 10),
}


def exact(phi):
    """Mean and variance at t_min of x = START at t_max, by the moment equations of the reverse SDE in y = x / alpha.

    dy = phi' / phi (y - x_0(y)) dk + sqrt(2 k (k phi' / phi - 1)) dw, k falling: the drift is that of the probability
    flow, (y - x_0) / k, plus half the variance rate of the noise times minus the score, (y - x_0) / k^2.
    """
    t = (VP.t_max, VP.t_min)
    (a, b), (alpha, end) = ([float(f(each)) for each in t] for f in (lambda t: math.exp(-VP.lam(t)), VP.alpha))

    def slope(k, state):
        mean, variance = state
        rate, keeps = LOG_PHI[phi](k), k**2 / (STD**2 + k**2)  # y - x_0(y) = keeps (y - MEAN)
        return [rate * keeps * (mean - MEAN), 2 * rate * keeps * variance - 2 * k * (k * rate - 1)]

    mean, variance = solve_ivp(slope, (a, b), [START / alpha, 0.0], "DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    return end * mean, end**2 * variance


@pytest.mark.parametrize("phi", LOG_PHI)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_steps_converge_to_the_transition_of_the_sde(phi, order):
    """Not only its marginals: those would also hold for another amount of noise."""
    model, truth, errors = GaussianMixture([1.0], [[MEAN]], [[STD]]).model(VP), exact(phi), []
    for calls in (80, 160):
        plan = build_plan(VP, "er_sde", calls, end="t_end", order=order, phi=phi)
        result = moments(plan, model, START, 0.0)
        errors.append([abs(a - b) for a, b in zip(result, truth, strict=True)])
    claimed = order if phi == "ode" else min(order, 2)
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 1e-11 or math.log2(coarse / fine) > claimed - 0.3, (coarse, fine)
