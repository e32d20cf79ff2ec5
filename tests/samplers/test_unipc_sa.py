"""UniPC and SA-Solver: against their papers' formulas written out plainly, exact solutions and exact moments."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from ids import named

from samplers import EDM, Grid, RectifiedFlow, VPDiscrete, VPLinear, build_plan, sample
from samplers.analytic import GaussianMixture
from samplers.solvers.ddim import ddim
from samplers.solvers.sa import sa_solver
from samplers.solvers.unipc import unipc

VP = VPLinear()
FULL = {"lower_order_final": False}
DRAWS = torch.randn(40, 8, 1, 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def quadrature(nodes, kernel, values, slope=None):
    """sum_j m_j int kernel l_j, l_j the Lagrange polynomials over `nodes` (the step starts at 0 and has unit length).

    slope: if given, what the integral of the first power is replaced by.
    """
    u, w = np.polynomial.legendre.leggauss(30)
    u, w = (u + 1) / 2, w / 2
    moments = [(w * kernel(u) * u**k).sum() for k in range(len(nodes))]
    if slope is not None:
        moments[1] = slope
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    return sum(c * m for c, m in zip(weights, values, strict=True))


def textbook_unipc(model, x, nodes, order, variant, data, lower):
    """UniP and UniC as the paper writes them: the system R rho = b with B(h), corrected states, D_j."""
    lam, n, ms = nodes.lam, len(nodes) - 1, []

    def m_at(x, i):
        eps = model(x, torch.tensor(nodes.label[i]))
        return (x - nodes.sigma[i] * eps) / nodes.alpha[i] if data else eps

    ms.append(m_at(x, 0))
    for i in range(1, n + 1):
        p = i if i < order else min(order, n + 1 - i) if lower else order
        h = lam[i] - lam[i - 1]
        hh, top = (-h, nodes.alpha[i]) if data else (h, nodes.sigma[i])
        keep = nodes.sigma if data else nodes.alpha
        flat = keep[i] / keep[i - 1] * x - top * math.expm1(hh) * ms[0]
        r = [(lam[i - 1 - j] - lam[i - 1]) / h for j in range(1, p)] + [1.0]
        d = [(ms[j] - ms[0]) / r[j - 1] for j in range(1, p)]
        big_b = {"bh1": hh, "bh2": math.expm1(hh)}[variant]
        q, b = math.expm1(hh) / hh - 1, []
        for k in range(1, p + 1):
            b.append(q * math.factorial(k) / big_b)
            q = q / hh - 1 / math.factorial(k + 1)
        big_r = np.array([[rj ** (k - 1) for rj in r] for k in range(1, p + 1)])
        rho = [] if p == 1 else [0.5] if p == 2 else np.linalg.solve(big_r[:-1, :-1], b[:-1])
        predicted = flat - top * big_b * sum(c * di for c, di in zip(rho, d, strict=True))
        if i == n:
            return predicted
        new = m_at(predicted, i)
        rho = [0.5] if p == 1 else np.linalg.solve(big_r, b)
        x = flat - top * big_b * sum(c * di for c, di in zip(rho, [*d, new - ms[0]], strict=True))
        ms.insert(0, new)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_unipc_is_the_paper(mixture, z, order, variant, data):
    for lower, n in ((True, 6), (False, 7)):
        grid = Grid(VP, "quadratic", end="t_end", t_start=0.9, t_end=0.05)
        options = {"order": order, "variant": variant, "lower_order_final": lower}
        plan = build_plan(VP, unipc, n, grid, target="sample" if data else "epsilon", **options)
        expected = textbook_unipc(mixture.model(VP), z, grid.nodes(n), order, variant, data, lower)
        close(plan.run(mixture.model(VP), z), expected, 1e-10)


def textbook_sa(model, x, nodes, p, c, tau, data, pece, more, shortcut):
    """SA-Predictor and SA-Corrector with quadrature for their integrals; returns the result and the calls made."""
    lam, alpha, sigma, n, ms, calls = nodes.lam, nodes.alpha, nodes.sigma, len(nodes) - 1, [], 0

    def m_at(x, i, as_data=data):
        nonlocal calls
        calls += 1
        eps = model(x, torch.tensor(nodes.label[i]))
        return (x - sigma[i] * eps) / alpha[i] if as_data else eps

    ms.append(m_at(x, 0))
    for i in range(1, n + 1):
        last = i == n and not more
        climbing = i < max(p, c - 1)
        pi, ci = (min(p, i), min(c, i + 1)) if climbing else (min(p, n - i + 1), min(c, n - i + 2))
        t2 = 0.0 if last else tau(nodes.t[i]) ** 2
        s, h = lam[i - 1], lam[i] - lam[i - 1]
        if data:
            noise = sigma[i] * math.sqrt(1 - math.exp(-2 * t2 * h))
            flat = math.exp(-t2 * h) * sigma[i] / sigma[i - 1] * x + noise * DRAWS[i]
            kernel = lambda u: (1 + t2) * alpha[i] * h * np.exp((1 + t2) * h * (u - 1))  # noqa: B023, E731
        else:
            noise = math.sqrt(t2) * sigma[i] * math.sqrt(math.exp(2 * h) - 1)
            flat = alpha[i] / alpha[i - 1] * x + noise * DRAWS[i]
            kernel = lambda u: -(1 + t2) * alpha[i] * h * np.exp(-s - h * u)  # noqa: B023, E731
        slope = [(1 + t2) * alpha[i] * h / 2 if shortcut and data and k == 2 else None for k in (pi, ci)]
        back = [(lam[i - 1 - j] - s) / h for j in range(i)]
        x = predicted = flat + quadrature(back[:pi], kernel, ms[:pi], slope[0])
        if last:
            return predicted, calls
        new = m_at(predicted, i)
        if c:
            x = flat + quadrature([1.0, *back[: ci - 1]], kernel, [new, *ms[: ci - 1]], slope[1])
        ms.insert(0, m_at(x, i) if pece and i < n else new)
    return m_at(x, n, as_data=True), calls


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("pece", [False, True])
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize(("p", "c"), [(1, 1), (2, 2), (1, 3), (3, 4), (4, 2), (3, 0)])
def test_sa_solver_is_the_paper(mixture, z, p, c, more, pece, data):
    if pece and not c:
        return
    grid = Grid(VP, "quadratic", end="t_end", t_start=0.95, t_end=0.05)
    nodes = grid.nodes(6)
    options = {"predictor_order": p, "corrector_order": c, "mode": "more_steps" if more else "few_steps", "pece": pece}
    taus = {0.0: lambda t: 0.0, 0.7: lambda t: 0.7, (1.0, 0.2, 0.6): lambda t: float(0.2 <= t <= 0.6)}
    for tau, function in taus.items():
        for shortcut in (False, True):
            expected, calls = textbook_sa(
                mixture.model(VP), z, nodes, p, c, function, data, pece, more, shortcut and not more
            )
            calls -= more and not c  # nothing is corrected with the call at the last predicted state
            plan = build_plan(
                VP,
                sa_solver,
                calls,
                grid,
                target="sample" if data else "epsilon",
                tau=tau,
                as_published=shortcut,
                **options,
            )
            draw = (lambda k: DRAWS[(k + 1) // 2 + 1]) if pece else (lambda k: DRAWS[k + 1])
            close(plan.run(mixture.model(VP), z, noise=draw), expected, 1e-9)


ORDERS = [  # solver, options, order, calls
    *[(unipc, {"order": 1, "variant": v}, 2, 80) for v in ("bh1", "bh2", "vary_coeff")],
    *[(unipc, {"order": 2, "variant": v}, 3, 80) for v in ("bh1", "bh2", "vary_coeff")],
    (unipc, {"order": 3}, 4, 80),
    (unipc, {"order": 3, "variant": "vary_coeff"}, 4, 80),
    *[(unipc, {"order": p, "corrector": False}, p, 80) for p in (1, 2, 3)],
    *[(unipc, {"order": p, "target": "epsilon"}, p + 1, 160) for p in (1, 2, 3)],
    *[(unipc, {"order": p, "variant": "vary_coeff", "as_published": True}, 1, 160) for p in (2, 3)],
    *[(sa_solver, {"predictor_order": p, "corrector_order": 0}, p, 80) for p in (1, 2, 3)],
    *[(sa_solver, {"predictor_order": p, "corrector_order": p + 1}, p + 1, 80) for p in (1, 2, 3)],
    (sa_solver, {"predictor_order": 2, "corrector_order": 1}, 1, 80),
    (sa_solver, {"predictor_order": 3, "corrector_order": 3}, 3, 160),
    (sa_solver, {"predictor_order": 2, "corrector_order": 2, "as_published": True}, 2, 80),
    (sa_solver, {"predictor_order": 1, "corrector_order": 2, "pece": True}, 2, 81),
    (sa_solver, {"predictor_order": 3, "corrector_order": 3, "pece": True}, 3, 161),
]


@pytest.fixture(scope="module")
def exact(mixture, z):
    return mixture.exact(VP, z)


def errors_of(solver, model, z, exact, calls, **settings):
    runs = [sample(model, z, solver=solver, steps=n, **settings) for n in calls]
    return [(out - exact).square().mean().sqrt().item() for out in runs]


@pytest.mark.parametrize(("solver", "options", "order", "calls"), ORDERS, ids=named)
def test_order(mixture, z, exact, solver, options, order, calls):
    two = (calls, 2 * calls - options.get("pece", False))
    errors = errors_of(solver, mixture.model(VP), z, exact, two, schedule=VP, end="t_end", **FULL, **options)
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, f"errors {errors}"


@pytest.mark.parametrize("as_published", [False, True])
def test_identities(mixture, z, as_published):
    """At tau = 0 SA-Solver with one value more in the corrector is UniPC: exactly 'vary_coeff', as published 'bh1'."""
    schedule = VPDiscrete.scaled_linear()
    variant = "bh1" if as_published else "vary_coeff"
    for p in (1, 2, 3):
        settings = {"schedule": schedule, "steps": 10, "grid": "time", "end": "t_end"}
        a = sample(mixture.model(schedule), z, solver=unipc, order=p, variant=variant, **settings)
        orders = {"predictor_order": p, "corrector_order": p + 1, "as_published": as_published}
        b = sample(mixture.model(schedule), z, solver=sa_solver, **orders, **settings)
        close(a, b)
        assert (a - z).abs().max() > 0.1


def test_first_order_without_corrector_is_ddim(mixture, z):
    settings = {"schedule": VP, "steps": 8}
    runs = [
        sample(mixture.model(VP), z, solver=solver, **options, **settings)
        for solver, options in (
            (ddim, {}),
            (unipc, {"order": 1, "corrector": False}),
            (unipc, {"order": 1, "disable_corrector": range(8), "target": "epsilon"}),
            (sa_solver, {"predictor_order": 1, "corrector_order": 0}),
        )
    ]
    for run in runs[1:]:
        close(run, runs[0])


def test_disabled_corrector_leaves_out_its_step(mixture, z):
    """Of two steps only the first has a corrector."""
    full, first, second = (
        sample(mixture.model(VP), z, schedule=VP, solver=unipc, steps=2, order=1, disable_corrector=d, end="t_end")
        for d in ((), (0,), (1,))
    )
    close(first, sample(mixture.model(VP), z, schedule=VP, solver=ddim, steps=2, end="t_end"))
    close(second, full)
    assert (full - first).abs().max() > 1e-3


SOLVERS = [(unipc, {"order": 3}), (sa_solver, {}), (sa_solver, {"pece": True, "predictor_order": 2})]


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=named)
def test_prediction_type_and_schedule_form_do_not_matter(mixture, z, solver, options):
    settings = {"schedule": VP, "solver": solver, "steps": 9, **options}
    runs = [
        sample(mixture.model(VP, kind), z, prediction=kind, **settings)
        for kind in ("epsilon", "sample", "v_prediction", "flow", "score")
    ]
    for run in runs[1:]:
        close(run, runs[0], 1e-10)
    edm, n = EDM(0.002, 500), (9 + options.get("pece", False)) // (1 + options.get("pece", False))
    levels = np.geomspace(100, 0.01, n)
    alpha = float(VP.alpha(VP.t_of_noise_level(100.0)))
    for target in ("sample", "epsilon"):
        given = settings | {"sigmas": levels, "end": "zero", "target": target}
        a = sample(mixture.model(VP), z, **given)
        close(sample(mixture.model(edm), z / alpha, **given | {"schedule": edm}), a, 1e-9)


@pytest.mark.parametrize("variant", ["bh1", "bh2", "vary_coeff"])
@pytest.mark.parametrize("target", ["sample", "epsilon"])
def test_step_to_sigma_zero_is_the_last_x0(mixture, z, variant, target):
    """Where B(h) = h is infinite; and the result converges to the exact solution at sigma = 0."""
    edm, seen = EDM(0.002, 80), []

    def model(x, label):
        seen.append(mixture.model(edm, "sample")(x, label))
        return seen[-1]

    exact = mixture.exact(edm, 80 * z, t_end=0)
    out = sample(
        model, 80 * z, schedule=edm, solver=unipc, steps=40, prediction="sample", variant=variant, target=target
    )
    if target == "sample":  # of noise prediction it is that, and the last correction of x
        close(out, seen[-1], 1e-11)
    assert (out - exact).abs().max() < 1e-3


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=named)
def test_start_at_alpha_zero(mixture, z, solver, options):
    """The first value is no derivative, and its lambda is -inf; both ends of the grid are infinite here."""
    flow = RectifiedFlow()
    exact = mixture.exact(flow, z, t_end=0)
    settings = {"schedule": flow, "prediction": "flow", "grid": "time", **options}
    coarse, fine = errors_of(solver, mixture.model(flow, "flow"), z, exact, (41, 161), **settings)
    assert fine < 2e-3 and fine < coarse / 8


def test_corrector_from_alpha_zero(mixture, z):
    """The mean of both ends keeps order 3; without it the first step leaves order 2."""
    flow = RectifiedFlow()
    exact = mixture.exact(flow, z, t_end=0.5)
    settings = {"schedule": flow, "prediction": "flow", "end": "t_end", "t_end": 0.5, "order": 2, **FULL}
    for disabled, order in (((), 3), ((0,), 2)):
        a, b = errors_of(unipc, mixture.model(flow, "flow"), z, exact, (20, 40), disable_corrector=disabled, **settings)
        assert abs(math.log2(a / b) - order) < 0.3


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"tau": 1.0, "predictor_order": 1, "corrector_order": 0}, 1),
        ({"tau": 1.0}, 2),
        ({"predictor_order": 1, "corrector_order": 0}, 1),
        ({"predictor_order": 2, "corrector_order": 0}, 2),
        ({"predictor_order": 1, "corrector_order": 2}, 2),
        ({"predictor_order": 2, "corrector_order": 1}, 1),
        ({}, 2),
        ({"target": "epsilon", "predictor_order": 2, "corrector_order": 3}, 2),
        ({"pece": True}, 2),
        ({"predictor_order": 2, "corrector_order": 3, "mode": "more_steps"}, 2),
        ({"as_published": True, "predictor_order": 2, "corrector_order": 2}, 2),
    ],
    ids=named,
)
def test_moments_on_a_gaussian(options, order):
    """One Gaussian of mean m and deviation s: the network is affine, so a run is affine in x and its noises.

    The SDE's own moments are known: with v = alpha^2 s^2 + sigma^2 a deviation from the marginal shrinks by Phi,
    log Phi = log(alpha_t / alpha_s) - (1 + tau^2) int sigma^2 / v dlambda, whose primitive is
    lambda - log(1 + s^2 e^(2 lambda)) / 2.
    """
    m, s, t_start, t_end, start_mean = 0.7, 0.4, 0.7, 0.02, 0.9
    data, errors = GaussianMixture([1.0], [[m]], [[s]]), []
    (a0, s0), (a1, s1) = ([float(f(t)) for f in (VP.alpha, VP.sigma)] for t in (t_start, t_end))
    v0, v1 = a0**2 * s**2 + s0**2, a1**2 * s**2 + s1**2
    start_var, stretch = 0.5 * v0, 1 + options.get("tau", 0.7) ** 2
    for n in (161, 321):
        plan = build_plan(
            VP, sa_solver, n, end="t_end", t_start=t_start, t_end=t_end, **{"tau": 0.7, **FULL, **options}
        )
        unit = torch.eye(n + 2, dtype=torch.float64).unsqueeze(-1)
        out = plan.run(data.model(VP), unit[0], noise=lambda k: unit[k + 1]).flatten()  # noqa: B023
        free = plan.run(data.model(VP), torch.zeros(1, 1, dtype=torch.float64), noise=lambda k: torch.zeros(1, 1))
        slopes = out - free.flatten()
        moments = free.item() + slopes[0] * start_mean, slopes[0] ** 2 * start_var + slopes[1:].square().sum()

        lam = VP.lam(np.array([t_start, plan.t[-2], t_end]))  # 'few_steps' has tau = 0 after the second of them
        change = np.diff(lam - 0.5 * np.log1p(s**2 * np.exp(2 * lam)))
        shrink = a1 / a0 * math.exp(-(change * [stretch, 1 if plan.sigma[-1] else stretch]).sum())
        truth = [a1 * m + shrink * (start_mean - a0 * m), v1 + shrink**2 * (start_var - v0)]
        if plan.sigma[-1] == 0.0:  # 'more_steps' ends with x_0 = m + gain (x - alpha m)
            gain = a1 * s**2 / v1
            truth = [m + gain * (truth[0] - a1 * m), gain**2 * truth[1]]
        errors.append([abs(float(a) - b) for a, b in zip(moments, truth, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        # at tau = 1 the mean of x_0 is a martingale, and no method errs in it
        assert math.log2(coarse / fine) > order - 0.3 or fine < 1e-13, errors
    assert errors[1][0] < 1e-3 and errors[1][1] < 0.03 * truth[1]


@pytest.mark.parametrize("end", ["zero", "t_end"])
def test_steps_are_model_calls(mixture, z, end):
    settings = {"schedule": VP, "end": end}
    cases = [(unipc, {"order": p}, (p, p + 1, 9)) for p in (1, 3, 5)]
    cases += [(sa_solver, {"tau": 1.0}, (3, 4, 9)), (sa_solver, {"pece": True}, (3, 9))]
    cases += [(sa_solver, {"mode": "more_steps"}, (3, 4, 9)), (sa_solver, {"mode": "more_steps", "pece": True}, (3, 9))]
    cases += [(sa_solver, {"mode": "more_steps", "corrector_order": 0}, (3, 9))]
    for solver, options, numbers in cases:
        for n in numbers:
            calls = []
            model = lambda x, t: calls.append(float(t)) or mixture.model(VP)(x, t)  # noqa: B023, E731
            out = sample(
                model, z, solver=solver, steps=n, generator=torch.Generator().manual_seed(0), **settings, **options
            )
            assert len(calls) == n and torch.isfinite(out).all()
            assert all(a >= b for a, b in pairwise(calls))


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (unipc, {"order": 0}, "unipc.* 0"),
        (unipc, {"variant": "bh3"}, "did you mean 'bh"),
        (unipc, {"target": "noise"}, "target.*noise"),
        (unipc, {"steps": 0}, "0|2.5"),
        (unipc, {"schedule": RectifiedFlow(), "target": "epsilon"}, "alpha = 0"),
        (sa_solver, {"predictor_order": 0}, "predictor_order.* 0"),
        (sa_solver, {"corrector_order": -1}, "corrector_order.* -1"),
        (sa_solver, {"mode": "few_step"}, "did you mean 'few_steps'"),
        (sa_solver, {"tau": -1.0}, "-1|-0.1"),
        (sa_solver, {"tau": (-1.0, 0.0, 1.0)}, "-1|-0.1"),
        (sa_solver, {"pece": True, "steps": 6}, "sa_solver.* 5.* 6"),
        (sa_solver, {"mode": "more_steps", "predictor_order": 1, "steps": 2}, "sa_solver.* 3.* 2"),
        (sa_solver, {"mode": "more_steps", "pece": True, "steps": 4}, "sa_solver.* 5.* 4"),
        (sa_solver, {"pece": True, "corrector_order": 0}, "corrector_order"),
        (sa_solver, {"tau": 1.0, "t_start": 0.2, "t_end": 0.8, "end": "t_end"}, "noise"),
    ],
)
def test_misuse(z, solver, options, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x, t: x, z, solver=solver, **{"schedule": VP, "steps": 5, **options})
