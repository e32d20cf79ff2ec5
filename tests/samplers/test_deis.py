"""DEIS: its integrals, its orders, what it is the same as."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from samplers import EDM, Grid, RectifiedFlow, VPDiscrete, VPLinear, build_plan
from samplers.schedule import training_betas
from samplers.solvers.ddim import ddim
from samplers.solvers.deis import deis

VP, SD = VPLinear(), VPDiscrete.scaled_linear()
FLAT = VPDiscrete(SD.betas, interpolation="alpha_bar")


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize("variant", ["tab", "rhoab", "logrho"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order(mixture, z, variant, order):
    exact, errors = mixture.exact(VP, z), []
    for n in (160, 320):
        plan = deis(Grid(VP, end="t_end"), n, order=order, variant=variant)
        errors.append(rmse(plan.run(mixture.model(VP), z), exact))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, f"errors {errors}"


def test_the_published_sum_makes_it_first_order(mixture, z):
    exact, errors = mixture.exact(VP, z), {}
    for wrong in (False, True, "diff-sampler"):
        for n in (160, 320):
            plan = deis(Grid(VP, "quadratic", end="t_end"), n, order=4, as_published=wrong)
            errors[wrong, n] = rmse(plan.run(mixture.model(VP), z), exact)
    assert 10 * errors[False, 320] < errors[False, 160]
    assert errors[True, 320] > 0.4 * errors[True, 160] and errors[True, 320] > 20 * errors[False, 320]
    assert errors["diff-sampler", 320] > 1.2 * errors[False, 320]


@pytest.mark.parametrize("schedule", [VP, SD, FLAT], ids=["vp", "sd", "sd, alpha_bar"])
def test_coefficients_are_the_integrals_of_the_paper(schedule):
    """Eq. 14-15 in time, by adaptive quadrature between the corners; d log alpha / dt by differences."""
    t = [1.0, 0.71, 0.5005, 0.3, 0.2983, 0.05] if schedule is VP else [1.0, 0.9905, 0.98, 0.9793, 0.97, 0.9555]
    plan = deis(Grid(schedule, times=t, end="t_end"), 5, order=4)
    alpha = lambda u: float(schedule.alpha(u))  # noqa: E731

    def slope(u):  # -1/2 d log alpha^2 / dt; alpha^2 or its logarithm is linear between the labels
        if schedule is VP:
            return 0.05 + 9.95 * u
        n = math.floor(u * 1000)
        if schedule is SD:
            return -math.log(alpha((n + 1) / 1000) / alpha(n / 1000)) * 1000
        return -0.5 * (alpha((n + 1) / 1000) ** 2 - alpha(n / 1000) ** 2) * 1000 / alpha(u) ** 2

    for i in range(5):
        known = [t[i - m] for m in range(min(4, i + 1))]
        ends = [t[i], *(n / 1000 for n in range(999, 0, -1) if t[i] > n / 1000 > t[i + 1]), t[i + 1]]
        ends = ends if schedule is not VP else [t[i], t[i + 1]]
        for j, own in enumerate(known):

            def integrand(u, own=own, known=known, to=t[i + 1]):
                basis = math.prod((u - o) / (own - o) for o in known if o != own)
                return alpha(to) / alpha(u) * slope(u) / float(schedule.sigma(u)) * basis

            expected = sum(quad(integrand, a, b, epsabs=1e-13)[0] for a, b in pairwise(ends))
            assert plan.rows[i, 0, 3 + j] == pytest.approx(expected, rel=1e-9, abs=1e-10)
        assert plan.rows[i, 0, 0] == pytest.approx(alpha(t[i + 1]) / alpha(t[i]), rel=1e-12)


def test_logrho_is_the_integral_over_rho():
    """diffusers' DEIS: Lagrange in log rho, integrated in rho."""
    rho = np.array([20.0, 6.0, 2.0, 0.7, 0.1, 0.03])
    plan = deis(Grid(EDM(), times=rho, end="t_end"), 5, order=3, variant="logrho")
    for i in range(5):
        known = [rho[i - m] for m in range(min(3, i + 1))]
        for j, own in enumerate(known):
            basis = lambda u: math.prod(math.log(u / o) / math.log(own / o) for o in known if o != own)  # noqa: B023, E731
            expected = quad(basis, rho[i], rho[i + 1], epsabs=1e-13)[0]
            assert plan.rows[i, 0, 3 + j] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("variant", ["tab", "rhoab", "logrho"])
@pytest.mark.parametrize("end", ["t_end", "zero"])
@pytest.mark.parametrize("schedule", [VP, SD, EDM()], ids=["vp", "sd", "edm"])
def test_one_value_is_ddim(schedule, end, variant):
    grid = Grid(schedule, end=end)
    expected = ddim(grid, 9, target="epsilon").rows
    np.testing.assert_allclose(deis(grid, 9, order=1, variant=variant).rows, expected, rtol=1e-12, atol=1e-12)


def test_vp_and_edm_form_are_the_same_method(mixture, z):
    """x / alpha of a VP network is x of an EDM network; VP's time then has to be named."""
    vp = Grid(VP, "quadratic", end="t_end").nodes(8)
    edm = deis(Grid(EDM(), times=vp.sigma / vp.alpha, end="t_end"), 8, order=4, time=VP)
    here = deis(Grid(VP, "quadratic", end="t_end"), 8, order=4)
    a = vp.alpha
    out = here.run(mixture.model(VP), a[0] * z)
    torch.testing.assert_close(edm.run(mixture.model(EDM()), z) * a[-1], out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["tab", "rhoab", "logrho"])
def test_both_ends(mixture, z, variant):
    """From alpha = 0 (in the space 'flow') to sigma = 0."""
    flow = RectifiedFlow(shift=2.0)
    exact = mixture.exact(flow, z, t_end=0.0)
    plan = deis(Grid(flow), 40, order=2, variant=variant)
    assert plan.alpha[0] == 0.0 and plan.sigma[-1] == 0.0
    assert (np.count_nonzero(plan.rows[-1, 0, 3:]) == 2) == (variant != "logrho")
    assert rmse(plan.run(mixture.model(flow, "flow"), z), exact) < 0.01
    cosine = VPDiscrete(training_betas("squaredcos_cap_v2", zero_snr=True))
    plan = deis(Grid(cosine, "trailing"), 20, variant=variant)
    with pytest.warns(UserWarning, match="alpha"):  # so exact a network is rare
        assert torch.isfinite(plan.run(mixture.model(cosine), z)).all()


def test_lower_order_final():
    plan = deis(Grid(SD, end="t_end"), 7, order=4, lower_order_final=True)
    assert [int(np.count_nonzero(r)) for r in plan.rows[:, 0, 3:]] == [1, 2, 3, 4, 3, 2, 1]


def test_interpolation_of_a_discrete_schedule():
    """Both agree at the labels; half-way alpha_bar or its logarithm is the mean."""
    t = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(FLAT.alpha(t), SD.alpha(t), rtol=1e-13)
    ab = SD.alpha(t) ** 2
    np.testing.assert_allclose(FLAT.alpha(t[:-1] + 5e-4) ** 2, (ab[1:] + ab[:-1]) / 2, rtol=1e-12)
    np.testing.assert_allclose(SD.alpha(t[:-1] + 5e-4) ** 2, np.sqrt(ab[1:] * ab[:-1]), rtol=1e-12)
    u = np.linspace(1e-3, 1, 777)
    np.testing.assert_allclose(FLAT.t_of_lambda(FLAT.lam(u)), u, rtol=1e-10)
    inside = u[1:-1]
    (da, ds), h = FLAT.rates(inside), 1e-7
    np.testing.assert_allclose(da, (FLAT.alpha(inside + h) - FLAT.alpha(inside - h)) / (2 * h), rtol=1e-5)
    np.testing.assert_allclose(ds, (FLAT.sigma(inside + h) - FLAT.sigma(inside - h)) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: deis(Grid(SD), 5, order=0), "deis.* 0"),
        (lambda: deis(Grid(SD), 5, variant="rho_ab"), "did you mean 'rhoab'"),
        (lambda: deis(Grid(SD), 5, space="flw"), "did you mean 'flow'"),
        (lambda: deis(Grid(SD), 5, as_published="diff_sampler"), "did you mean 'diff-sampler'"),
        (lambda: deis(Grid(SD), 5, as_published=True), "as_published.*t_end"),
        (lambda: deis(Grid(SD, end="t_end"), 5, variant="logrho", as_published=True), "as_published.*rhoab"),
        (lambda: build_plan(SD, "deis", 5, ordr=3), "did you mean 'order'"),
        (lambda: VPDiscrete(SD.betas, interpolation="alpha"), "did you mean 'log_alpha'|did you mean 'alpha_bar'"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
