"""Names known from ComfyUI and k-diffusion: each alias against its published formula, written out here in the levels
sigma of k-diffusion (x = x_0 + sigma eps), and each grid against its own."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from samplers import EDM, Grid, RectifiedFlow, VPDiscrete, build_plan
from samplers.solvers import ALIASES, ELSEWHERE, SOLVERS, find_solver

SIGMAS = np.array([14.0, 6.0, 3.1, 1.7, 0.9, 0.35, 0.1, 0.0])
STEPS = len(SIGMAS) - 1
SD = VPDiscrete.scaled_linear()


@pytest.fixture(scope="module")
def denoise(mixture):
    return lambda x, sigma: mixture.guided(x, 1.0, float(sigma))[0]


@pytest.fixture(scope="module")
def noises(z):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(z.shape, generator=generator, dtype=z.dtype) for _ in range(2 * STEPS)]


def run(mixture, z, noises, solver, **options):
    schedule = EDM(0.002, 14.0)
    plan = build_plan(schedule, solver, sigmas=SIGMAS, prediction="sample", **options)
    return plan.run(mixture.model(schedule, "sample"), z * SIGMAS[0], noise=lambda k: noises[k])


def steps():
    """(i, sigma, next sigma, h, h of the step before) of every step but the one to sigma = 0."""
    lam = -np.log(SIGMAS[:-1])
    for i in range(STEPS - 1):
        yield i, SIGMAS[i], SIGMAS[i + 1], lam[i + 1] - lam[i], lam[i] - lam[i - 1] if i else None


def phi_1(z):
    return (math.exp(z) - 1) / z


def phi_2(z):
    return (math.exp(z) - 1 - z) / z**2


def res_2m(x, denoise, noises):
    """arXiv 2308.02157, two-step form: b_2 = phi_2 / c_2 with c_2 = -h_before / h, b_1 = phi_1 - b_2."""
    old = None
    for i, sigma, _, h, before in steps():
        new = denoise(x, sigma)
        b_2 = phi_2(-h) / (-before / h) if i else 0.0
        x = math.exp(-h) * x + h * ((phi_1(-h) - b_2) * new + b_2 * (old if i else 0.0))
        old = new
    return denoise(x, SIGMAS[-2])


def res_3m(x, denoise, noises):
    """int_0^1 h e^{(u - 1) h} P(u) du, with the polynomial P through the last three values, by QUADPACK."""
    values, lam = [], -np.log(SIGMAS[:-1])
    for i, sigma, _, h, _ in steps():
        values.append(denoise(x, sigma))
        at = [(lam[i - j] - lam[i]) / h for j in range(min(3, i + 1))]
        x = math.exp(-h) * x
        for j, u_j in enumerate(at):

            def basis(u, u_j=u_j, at=at, h=h):
                lagrange = math.prod((u - other) / (u_j - other) for other in at if other != u_j)
                return h * math.exp((u - 1) * h) * lagrange

            x = x + quad(basis, 0, 1, epsabs=1e-14, epsrel=1e-13)[0] * values[-1 - j]
    return denoise(x, SIGMAS[-2])


def res_2s(x, denoise, noises):
    """arXiv 2308.02157, one-step form of order 2 with c_2 = 1/2."""
    for _, sigma, _, h, _ in steps():
        first, c = denoise(x, sigma), 0.5
        middle = math.exp(-c * h) * x + c * h * phi_1(-c * h) * first
        second = denoise(middle, sigma * math.exp(-c * h))
        b_2 = phi_2(-h) / c
        x = math.exp(-h) * x + h * ((phi_1(-h) - b_2) * first + b_2 * second)
    return denoise(x, SIGMAS[-2])


def dpmpp_2m(x, denoise, noises):
    """arXiv 2211.01095, algorithm 2."""
    old = None
    for i, sigma, following, h, before in steps():
        new = denoise(x, sigma)
        r = before / h if i else 1.0
        d = (1 + 1 / (2 * r)) * new - old / (2 * r) if i else new
        x, old = following / sigma * x - math.expm1(-h) * d, new
    return denoise(x, SIGMAS[-2])


def sde_2m(weight):
    """arXiv 2211.01095, SDE-DPM-Solver++(2M): `weight` of the difference quotient times h."""

    def solve(x, denoise, noises):
        old = None
        for i, sigma, following, h, before in steps():
            new = denoise(x, sigma)
            slope = (new - old) / (before / h) if i else 0.0
            x = following / sigma * math.exp(-h) * x - math.expm1(-2 * h) * new + weight(h) * slope
            x, old = x + following * math.sqrt(-math.expm1(-2 * h)) * noises[i], new
        return denoise(x, SIGMAS[-2])

    return solve


def ddpm(x, denoise, noises):
    """arXiv 2006.11239, eq. 6-7, with alpha-bar = 1 / (1 + sigma^2) of the VP form of x."""
    for i, sigma, following, _, _ in steps():
        bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + following**2)
        alpha = bar / bar_next
        x_0, x_vp = denoise(x, sigma), x * math.sqrt(bar)
        mean = (
            math.sqrt(bar_next) * (1 - alpha) / (1 - bar) * x_0 + math.sqrt(alpha) * (1 - bar_next) / (1 - bar) * x_vp
        )
        x_vp = mean + math.sqrt((1 - bar_next) / (1 - bar) * (1 - alpha)) * noises[i]
        x = x_vp / math.sqrt(bar_next)
    return denoise(x, SIGMAS[-2])


def lcm(x, denoise, noises):
    """arXiv 2303.01469, algorithm 1."""
    for i, sigma, following, _, _ in steps():
        x = denoise(x, sigma) + following * noises[i]
    return denoise(x, SIGMAS[-2])


def gradient_estimation(x, denoise, noises):
    """arXiv 2306.04848 with gamma = 2; the last step is Euler's."""
    old = None
    for i, sigma, following, _, _ in steps():
        eps = (x - denoise(x, sigma)) / sigma
        x, old = x + (following - sigma) * (2 * eps - old if i else eps), eps
    return denoise(x, SIGMAS[-2])


def er_sde(x, denoise, noises, published=False):
    """arXiv 2309.06169, ER-SDE-Solver-3 with phi(k) = k (exp(k^0.3) + 10), the integrals by QUADPACK. The slope of the
    polynomial through three values is not the last difference quotient, which the paper takes."""
    phi = lambda k: k * (math.exp(k**0.3) + 10)  # noqa: E731
    accurate = {"epsabs": 1e-14, "epsrel": 1e-13}
    values, quotients = [], []
    for i, s, t, _, _ in steps():
        values.append(denoise(x, s))
        r = phi(t) / phi(s)
        x = r * x + (1 - r) * values[-1] + math.sqrt(t**2 - (r * s) ** 2) * noises[i]
        if i >= 1:
            quotients.append((values[-1] - values[-2]) / (s - SIGMAS[i - 1]))
            slope, curve = quotients[-1], 0.0
            if i >= 2:
                curve = (quotients[-1] - quotients[-2]) / ((s - SIGMAS[i - 2]) / 2)
                slope = slope if published else slope + curve * (s - SIGMAS[i - 1]) / 2
            x = x + (t - s + phi(t) * quad(lambda k: 1 / phi(k), t, s, **accurate)[0]) * slope
            x = x + ((t - s) ** 2 / 2 + phi(t) * quad(lambda k, s=s: (k - s) / phi(k), t, s, **accurate)[0]) * curve
    return denoise(x, SIGMAS[-2])


def dpm_2(x, denoise, noises):
    """arXiv 2206.00927, algorithm 1 with r = 1/2, in sigma (k-diffusion's `dpm_2`)."""
    for _, sigma, following, _, _ in steps():
        middle = math.sqrt(sigma * following)
        half = x + (middle - sigma) * (x - denoise(x, sigma)) / sigma
        x = x + (following - sigma) * (half - denoise(half, middle)) / middle
    return denoise(x, SIGMAS[-2])


def half_of_noise(h):
    """Of the 'midpoint' form."""
    return -math.expm1(-2 * h) / 2


def exact_of_noise(h):
    """int_0^1 of 2 h e^{2 (u - 1) h} u: the 'heun' form."""
    return 2 * h * (2 * h - 1 + math.exp(-2 * h)) / (2 * h) ** 2


FORMULAS = {
    "res_2m": res_2m,
    "res_multistep": res_2m,
    "res_3m": res_3m,
    "res_2s": res_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": sde_2m(half_of_noise),
    "dpmpp_2m_sde_gpu": sde_2m(half_of_noise),
    "dpmpp_2m_sde_heun": sde_2m(exact_of_noise),
    "ddpm": ddpm,
    "lcm": lcm,
    "dpm_2": dpm_2,
    "gradient_estimation": gradient_estimation,
    "er_sde": er_sde,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_alias_is_the_published_formula(mixture, z, denoise, noises, name):
    result = run(mixture, z, noises, name)
    expected = FORMULAS[name](z * SIGMAS[0], denoise, noises)
    assert (result - expected).abs().max() < 1e-12 * expected.abs().max()


def test_er_sde_as_published(mixture, z, denoise, noises):
    result = run(mixture, z, noises, "er_sde", as_published=True)
    expected = er_sde(z * SIGMAS[0], denoise, noises, published=True)
    assert (result - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (result - run(mixture, z, noises, "er_sde")).abs().max() > 1e-4


def test_third_order_sde_is_k_diffusions(mixture, z, denoise, noises):
    """With as_published, whose second derivative is halved; k-diffusion's 3M SDE, arXiv 2211.01095 app."""
    x, values, hs = z * SIGMAS[0], [], []
    for i, sigma, following, h, _ in steps():
        values.append(denoise(x, sigma))
        e, phi_2_ = 2 * h, math.expm1(-2 * h) / (2 * h) + 1
        x = math.exp(-e) * x - math.expm1(-e) * values[-1]
        if i >= 2:
            r_0, r_1 = hs[-1] / h, hs[-2] / h
            d_0, d_1 = (values[-1] - values[-2]) / r_0, (values[-2] - values[-3]) / r_1
            first = d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1)
            second = (d_0 - d_1) / (r_0 + r_1)
            x = x + phi_2_ * first - (phi_2_ / e - 0.5) * second
        elif i == 1:
            x = x + phi_2_ * (values[-1] - values[-2]) / (hs[-1] / h)
        x = x + following * math.sqrt(-math.expm1(-2 * h)) * noises[i]
        hs.append(h)
    expected = denoise(x, SIGMAS[-2])
    for name in ("dpmpp_3m_sde", "dpmpp_3m_sde_gpu"):
        result = run(mixture, z, noises, name, as_published=True)
        assert (result - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_builds_a_plan_and_its_options_can_be_changed(name):
    plan = build_plan(SD, name, 9)
    solver, options = ALIASES[name]
    if solver in SOLVERS:
        assert (plan.rows == build_plan(SD, solver, 9, **options).rows).all()
    for option, value in options.items():
        assert find_solver(name).keywords[option] == value
    if "order" in options:
        changed = build_plan(SD, name, 9, order=1)
        assert not np.array_equal(changed.rows, plan.rows)


def test_names_do_not_hide_one_another():
    assert not (ALIASES.keys() | ELSEWHERE.keys()) & SOLVERS.keys() and not ALIASES.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("euler_cfg_pp", "CFGPlusPlus"), ("res2m", "'res_2m'"), ("dpm++_2m", "'dpmpp_2m'"), *ELSEWHERE.items()],
)
def test_other_names_say_what_to_use(name, hint):
    with pytest.raises(ValueError, match=name.replace("+", r"\+")) as raised:
        find_solver(name)
    assert hint in str(raised.value)


def test_a_wrong_option_of_an_alias_is_refused():
    with pytest.raises(ValueError, match="must be a number"):
        build_plan(SD, "dpmpp_2m", 8, order="2")
    with pytest.raises(ValueError, match="dpmpp_2m"):
        build_plan(SD, "dpmpp_2m", 8, ordre=2)


def labels(kind, n, schedule=SD, **options):
    return Grid(schedule, kind, **options).nodes(n).label[:n]


def test_grids_of_the_labels():
    """ComfyUI's simple, sgm_uniform, normal and ddim_uniform on 1000 labels."""
    k = np.arange(10)
    assert np.allclose(labels("simple", 10), 999 - 100 * k, atol=1e-9)
    assert np.allclose(labels("sgm_uniform", 10), 999 * (1 - k / 10), atol=1e-9)
    assert np.allclose(labels("time", 10), 999 * (1 - k / 9), atol=1e-9)
    assert np.allclose(labels("ddim_uniform", 10), 901 - 100 * k, atol=1e-9)


@pytest.mark.parametrize(("kind", "a", "b"), [("beta_time", 0.6, 0.6), ("beta57", 0.5, 0.7)])
def test_beta_grids(kind, a, b):
    """arXiv 2407.12173: equal parts of the density t^(a-1) (1-t)^(b-1) lie between the times, by QUADPACK."""
    t = labels(kind, 12)[::-1] / 999
    parts = [quad(lambda x: 1.0, low, high, weight="alg", wvar=(a - 1, b - 1))[0] for low, high in [(0.0, 1.0)]]
    middle = [quad(lambda x: x ** (a - 1) * (1 - x) ** (b - 1), *ends)[0] for ends in itertools.pairwise(t[:-1])]
    assert np.allclose(middle, parts[0] / 12, rtol=1e-7) and t[-1] == 1
    assert Grid(SD, kind).nodes(12).sigma[-1] == 0 and Grid(SD, kind, end="t_end").nodes(12).t[-1] == SD.t_min


def test_kl_optimal_is_uniform_in_the_angle():
    nodes = Grid(EDM(0.03, 15.0), "kl_optimal", end="t_end").nodes(7)
    high, low = math.atan(15.0), math.atan(0.03)
    assert np.allclose(nodes.sigma, np.tan(high + np.arange(8) / 7 * (low - high)), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11])
def test_linear_quadratic(n):
    """A line to 0.025, then the parabola fixed by its value and slope at the join and its value at the end."""
    sigma = Grid(RectifiedFlow(t_min=0.0), "linear_quadratic").nodes(n).sigma
    half = n // 2
    assert sigma[0] == 1 and sigma[-1] == 0
    if half:
        assert np.allclose(sigma[: half + 1], 1 - 0.025 * np.arange(half + 1) / half, atol=1e-12)
        system = [[half**2, half, 1], [2 * half, 1, 0], [n**2, n, 1]]
        parabola = np.linalg.solve(system, [1 - 0.025, -0.025 / half, 0.0])
        assert np.allclose(sigma[half:], np.polyval(parabola, np.arange(half, n + 1)), atol=1e-12)


def test_tangent():
    """Two arctangents that join at w = 1/2, sigma = 1/2; each is steepest at 0.6 of its half."""
    n = 40
    sigma = Grid(RectifiedFlow(3.0, t_min=0.0), "tangent").nodes(n).sigma
    assert np.allclose(sigma[[0, n // 2, n]], [1, 0.5, 0], atol=1e-12)
    below = np.arctan(4 * (0.6 - np.arange(21) / 20))
    piece = (below - below[-1]) / (below[0] - below[-1]) / 2
    assert np.allclose(sigma[: n // 2 + 1], 0.5 + piece, atol=1e-12)
    assert np.allclose(sigma[n // 2 :], piece, atol=1e-12)
    steps = -np.diff(sigma)
    assert np.argmax(steps[:20]) in (11, 12) and np.argmax(steps[20:]) in (11, 12)
