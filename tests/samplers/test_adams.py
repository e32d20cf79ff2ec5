"""LMS, iPNDM, PNDM, and the first call for free."""

import math

import numpy as np
import pytest
import torch
from ids import named
from scipy.integrate import quad

from samplers import EDM, Grid, RectifiedFlow, VPDiscrete, VPLinear, build_plan
from samplers.solvers.adams import ipndm, lms
from samplers.solvers.afs import without_first_call
from samplers.solvers.deis import deis
from samplers.solvers.dpmpp import dpmpp
from samplers.solvers.pndm import pndm
from samplers.solvers.rungekutta import dpm2, heun

VP, SD = VPLinear(), VPDiscrete.scaled_linear()


def alternating(n):
    """Steps of lambda in the ratio 1:2:1:2..., which never become equal."""
    at = np.cumsum([0.0, *np.resize([1.0, 2.0], n)])
    t = VP.t_of_lambda(VP.lam(1.0) + at / at[-1] * (VP.lam(1e-3) - VP.lam(1.0)))
    return Grid(VP, times=[1.0, *t[1:-1], 1e-3], end="t_end")


CASES = {  # schedule, grid of n intervals
    "uniform": (EDM(), lambda n: Grid(EDM(), "time", t_start=3.0, t_end=0.1, end="t_end")),
    "logsnr": (VP, lambda n: Grid(VP, "logsnr", end="t_end")),
    "alternating": (VP, alternating),
    "flow": (RectifiedFlow(shift=2.0), lambda n: Grid(RectifiedFlow(shift=2.0), end="t_end")),  # from alpha = 0
    "uniform flow to 0": (
        RectifiedFlow(),
        lambda n: Grid(RectifiedFlow(t_min=1.0 / n), "time"),
    ),  # ... and to sigma = 0
}
WRONG = {"variable": True, "as_published": True}


@pytest.mark.parametrize(
    ("solver", "options", "case", "order"),
    [
        *[(ipndm, {"order": k}, "uniform", k) for k in (1, 2, 3, 4)],
        *[(ipndm, {"order": k}, "logsnr", min(k, 2)) for k in (1, 2, 3, 4)],
        *[(ipndm, {"order": k}, "alternating", 1) for k in (2, 3, 4)],
        *[(ipndm, {"order": k, "variable": True}, "alternating", k) for k in (2, 3, 4)],
        *[(ipndm, {"order": k, **WRONG}, "alternating", order) for k, order in ((2, 2), (3, 2), (4, 0))],
        *[(ipndm, {"order": 4, **WRONG}, "uniform", 3)],
        *[(lms, {"order": k}, "logsnr", k) for k in (1, 2, 3, 4)],
        (lms, {"order": 2}, "flow", 2),
        *[(lms, {"order": k}, "uniform flow to 0", 2) for k in (2, 3, 4)],  # the first step is Euler's
        *[(pndm, {"skip_prk": skip}, case, 2) for skip in (True, False) for case in ("logsnr", "flow")],
        *[(pndm, {"skip_prk": skip}, "uniform flow to 0", 4) for skip in (True, False)],
    ],
    ids=named,
)
def test_order(mixture, z, solver, options, case, order):
    """What is claimed, and that the published forms have less."""
    schedule, grid = CASES[case]
    extra = 0 if solver is not pndm else 1 if options["skip_prk"] else 9
    errors = []
    for n in (100, 200):
        g = grid(n)
        x = z * (float(schedule.sigma(g.t_start)) if schedule.alpha(g.t_start) == 1 else 1.0)
        plan = solver(g, n + extra, **options)
        assert len(plan) == n + extra
        out = plan.run(mixture.model(schedule, plan.prediction), x)
        exact = mixture.exact(schedule, x, g.t_start, 0.0 if plan.sigma[-1] == 0 else g.t_end)
        errors.append((out - exact).square().mean().sqrt().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, f"errors {errors}"


def test_coefficients_are_the_integrals_of_the_lagrange_polynomials():
    """k-diffusion's definition of LMS, by adaptive quadrature; and 5 values, one more than the tables have."""
    sigma = np.array([9.0, 6.0, 3.5, 3.0, 1.2, 0.4, 0.0])
    plan = lms(Grid(EDM(), sigmas=sigma), 6, order=5)
    for i in range(6):
        for j in range(5):
            others = [sigma[i - m] for m in range(min(5, i + 1)) if m != j]
            basis = lambda u: np.prod([(u - o) / (sigma[i - j] - o) for o in others])  # noqa: B023, E731
            expected = quad(basis, sigma[i], sigma[i + 1], epsabs=1e-14)[0] if j <= i else 0.0
            assert plan.rows[i, 0, 3 + j] == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert (plan.rows[:, 0, 0] == 1).all()


def test_identities():
    """What are the same methods under other names, to rounding."""
    logsnr = Grid(VP, "logsnr", end="t_end")
    two = dpmpp(logsnr, 12, order=2, target="epsilon", lower_order_final=False)
    np.testing.assert_allclose(ipndm(logsnr, 12, order=2).rows, two.rows, rtol=1e-12, atol=1e-12)
    for grid in (logsnr, Grid(SD, "karras"), Grid(RectifiedFlow())):
        v = ipndm(grid, 9, variable=True)
        np.testing.assert_allclose(v.rows, lms(grid, 9).rows, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(v.rows, deis(grid, 9, order=4, variant="rhoab").rows, rtol=1e-11, atol=1e-11)
    uniform = Grid(EDM(), "time", t_start=2.0, t_end=0.5, end="t_end")
    np.testing.assert_allclose(ipndm(uniform, 9).rows, lms(uniform, 9).rows, rtol=1e-12, atol=1e-12)
    # the published coefficients are right for two values, and for three equal steps
    np.testing.assert_allclose(ipndm(logsnr, 9, order=2, **WRONG).rows, lms(logsnr, 9, order=2).rows, rtol=1e-12)
    np.testing.assert_allclose(ipndm(uniform, 9, order=3, **WRONG).rows, lms(uniform, 9, order=3).rows, rtol=1e-12)
    published = ipndm(uniform, 4, **WRONG).rows[3, 0, 3:] / -0.375
    np.testing.assert_allclose(published, np.array([57, -65, 43, -11]) / 24, rtol=1e-12)


def test_the_step_to_zero_uses_the_history():
    plan = lms(Grid(VP, "karras"), 8, order=3, lower_order_final=False)
    assert plan.sigma[-1] == 0 and plan.rows[-1, 0, 3:].all()
    lowered = lms(Grid(VP, "karras"), 8, order=3, lower_order_final=True)
    assert [int(np.count_nonzero(r)) for r in lowered.rows[:, 0, 3:]] == [1, 2, 3, 3, 3, 3, 2, 1]


def transfer(schedule, x, e, s, t):
    """Liu et al. eq. 11 as printed, in alpha_bar; VP only."""
    a, b = float(schedule.alpha(s)) ** 2, float(schedule.alpha(t)) ** 2
    return math.sqrt(b / a) * x - (b - a) / (math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b))) * e


@pytest.mark.parametrize("skip_prk", [True, False])
@pytest.mark.parametrize("schedule", [VP, SD], ids=["vp", "sd"])
def test_pndm_is_the_papers_algorithm(mixture, z, schedule, skip_prk):
    n = 7
    plan = pndm(Grid(schedule, "time", end="t_end"), n + (1 if skip_prk else 9), skip_prk=skip_prk)
    model, seen = mixture.model(schedule), []

    def eps(x, t):
        seen.append(float(schedule.model_time(t)))
        return model(x, torch.tensor(seen[-1], dtype=torch.float64))

    x, history = z, []
    t = np.linspace(schedule.t_max, schedule.t_min, n + 1)
    for i in range(n):
        phi = lambda e, to=t[i + 1], x=x, i=i: transfer(schedule, x, e, t[i], to)  # noqa: E731
        mid, e = (t[i] + t[i + 1]) / 2, eps(x, t[i])
        history = [e, *history]
        if i < 3 and not skip_prk:  # eq. 13
            e2 = eps(phi(e, mid), mid)
            e3 = eps(phi(e2, mid), mid)
            e = (e + 2 * e2 + 2 * e3 + eps(phi(e3), t[i + 1])) / 6
        elif i == 0:
            e = (e + eps(phi(e), t[1])) / 2
        elif i < 3:
            e = (3 * e - history[1]) / 2 if i == 1 else (23 * e - 16 * history[1] + 5 * history[2]) / 12
        else:  # eq. 12
            e = (55 * e - 59 * history[1] + 37 * history[2] - 9 * history[3]) / 24
        x = phi(e)
    assert plan.label == pytest.approx(seen)
    torch.testing.assert_close(plan.run(model, z), x, rtol=0, atol=1e-12)


def test_first_call_for_free(mixture, z):
    """Against loops by hand: a multistep method, one of two stages, and a plan whose m is not eps."""
    sigma = np.geomspace(80.0, 0.02, 6)
    grid, model, start = Grid(EDM(), times=sigma, end="t_end"), mixture.model(EDM()), 80.0 * z

    def slope(x, i):
        return x / math.sqrt(1 + 80.0**2) if i == 0 else model(x, torch.tensor(sigma[i]))

    two = trapezoid = one = start
    history = []
    for i in range(5):
        h = sigma[i + 1] - sigma[i]
        history = [slope(two, i), *history]
        two = two + h * (history[0] if i == 0 else 1.5 * history[0] - 0.5 * history[1])
        d = slope(trapezoid, i)
        trapezoid = trapezoid + h * (d + slope(trapezoid + h * d, i + 1)) / 2
        one = one + h * slope(one, i)
    for plan, expected, calls in (
        (ipndm(grid, 5, order=2), two, 4),
        (heun(grid, 10), trapezoid, 9),
        (lms(grid, 5, order=1, space="flow"), one, 4),
        (dpmpp(grid, 5, order=1), one, 4),
    ):
        free = without_first_call(plan)
        assert len(free) == calls
        torch.testing.assert_close(free.for_prediction("epsilon").run(model, start), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lms(Grid(SD), 5, order=0), "lms.* 0"),
        (lambda: lms(Grid(SD), 5, space="kapa"), "did you mean 'kappa'"),
        (lambda: lms(Grid(RectifiedFlow()), 5, space="kappa"), "alpha = 0.*flow"),
        (lambda: ipndm(Grid(SD), 5, order=5), "ipndm.* 5"),
        (lambda: ipndm(Grid(SD), 5, as_published=True), "variable=True"),
        (lambda: pndm(Grid(SD), 1), "pndm.* 2.* 1"),
        (lambda: pndm(Grid(SD), 10, skip_prk=False), "skip_prk=False.* 8, 12.* 10"),
        (lambda: pndm(Grid(SD), 12, skip_prk=False), "pndm.*sigma = 0.*t_end"),
        (lambda: pndm(Grid(SD), 2), "pndm.*sigma = 0.*t_end"),
        (lambda: without_first_call(lms(Grid(SD), 1)), "without_first_call"),
        (lambda: without_first_call(build_plan(SD, "ddim", 5, eta=1.0)), "ddim"),
        (lambda: without_first_call(lms(Grid(RectifiedFlow()), 5)), "alpha = 0"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fewest_calls(mixture, z):
    assert len(pndm(Grid(SD), 3)) == 3 and len(pndm(Grid(SD), 13, skip_prk=False)) == 13
    assert len(pndm(Grid(SD, end="t_end"), 4, skip_prk=False)) == 4
    free = without_first_call(dpm2(Grid(VP, end="t_end"), 2))  # one call left, at the middle
    assert torch.isfinite(free.run(mixture.model(VP), z)).all()
