"""DDIM, multistep DPM-Solver and the arithmetic below them, against closed forms. Orders: test_orders.py."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from samplers import Grid, RectifiedFlow, VPDiscrete, VPLinear, build_plan, sample
from samplers.analytic import GaussianMixture
from samplers.solvers.expint import phi


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def exact(mixture, z):
    return mixture.exact(VPLinear(), z)


def test_the_solver_in_the_readme(mixture, z, exact):
    """The README's own code: a solver with two calls per step, of order 2, that counts its calls honestly."""
    text = (Path(__file__).parents[2] / "samplers" / "README.md").read_text()
    code = next(block for block in text.split("```python")[1:] if "def heun" in block).split("```")[0]
    space = {}
    exec(code, space)
    model = mixture.model(VPLinear())
    errors = [rmse(space["sample"](model, z, VPLinear(), steps=n, end="t_end"), exact) for n in (80, 160)]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.3
    calls = []
    space["sample"](lambda x, t: calls.append(1) or model(x, t), z, VPLinear(), steps=9)
    assert len(calls) == 9
    with pytest.raises(ValueError, match="'heun' cannot make exactly 8 model calls here; it would make 7"):
        space["sample"](model, z, VPLinear(), steps=8)


def test_exact_solution_is_exact_for_one_gaussian():
    """For one Gaussian the flow is y -> mu + (y - mu) sqrt((std^2 + kappa_t^2) / (std^2 + kappa_s^2)); y = x/alpha."""
    data = GaussianMixture([1.0], [[0.7] * 3], [[0.4] * 3])
    schedule = VPLinear()
    x = torch.randn(5, 3, dtype=torch.float64)
    a, s, b, r = (float(f(t)) for t in (1.0, 1e-3) for f in (schedule.alpha, schedule.sigma))
    stretch = math.sqrt((0.16 + (r / b) ** 2) / (0.16 + (s / a) ** 2))
    torch.testing.assert_close(data.exact(schedule, x), b * (0.7 + (x / a - 0.7) * stretch), rtol=1e-9, atol=1e-9)
    flow = RectifiedFlow()  # from alpha = 0 to sigma = 0: x -> mu + std x
    torch.testing.assert_close(data.exact(flow, x, t_end=0), 0.7 + 0.4 * x, rtol=1e-9, atol=1e-9)


def test_phi_against_quadrature():
    u, w = np.polynomial.legendre.leggauss(40)
    u, w = (u + 1) / 2, w / 2
    for j in (1, 2, 3, 4):
        for z in (-7.0, -1.0001, -0.3, -1e-9, 0.0, 1e-7, 0.5, 2.0):
            integral = (w * np.exp((1 - u) * z) * u ** (j - 1)).sum() / math.factorial(j - 1)
            assert phi(j, z) == pytest.approx(integral, rel=1e-11)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("target", ["sample", "epsilon"])
def test_multistep_integrates_polynomials_exactly(order, target):
    """If the network's quantity is a polynomial in lambda of degree order - 1, a step has no error: by quadrature."""
    schedule = VPLinear()
    grid = Grid(schedule, "quadratic", end="t_end", t_start=0.8, t_end=0.3)
    plan = build_plan(
        schedule,
        "dpmpp",
        order + 1,
        grid,
        target,
        order=order,
        target=target,
        lower_order_final=False,
        solver_type="heun",
    )
    nodes = grid.nodes(order + 1)
    poly = lambda lam: 0.3 - 0.8 * lam + (0.5 * lam**2 if order == 3 else 0.0)  # noqa: E731
    k = order  # the first step with a full history
    state = plan.begin(torch.ones(1, dtype=torch.float64))
    state = state._replace(
        history=tuple(torch.full((1,), poly(nodes.lam[j]), dtype=torch.float64) for j in range(k - 1, -1, -1))
    )
    out = plan.step(k, state, torch.full((1,), poly(nodes.lam[k]), dtype=torch.float64)).input.item()
    s, t = nodes.lam[k], nodes.lam[k + 1]
    x, w = np.polynomial.legendre.leggauss(40)
    lam, w = s + (x + 1) / 2 * (t - s), w / 2 * (t - s)
    if target == "sample":
        truth = nodes.sigma[k + 1] * (1 / nodes.sigma[k] + (w * np.exp(lam) * poly(lam)).sum())
    else:
        truth = nodes.alpha[k + 1] * (1 / nodes.alpha[k] - (w * np.exp(-lam) * poly(lam)).sum())
    assert out == pytest.approx(truth, rel=1e-12)


def test_ddim_is_one_method(mixture, z):
    """DDIM on eps, on x_0, DPM-Solver++ of order 1 and Euler on sigma / alpha are the same numbers."""
    schedule = VPDiscrete.scaled_linear()
    model = mixture.model(schedule)
    runs = [
        sample(model, z, schedule=schedule, solver="ddim", steps=7),
        sample(model, z, schedule=schedule, solver="ddim", steps=7, target="epsilon"),
        sample(model, z, schedule=schedule, solver="dpmpp", steps=7, order=1),
    ]
    nodes = Grid(schedule).nodes(7)
    y = z / nodes.alpha[0]
    for i in range(7):
        kappa = nodes.sigma / nodes.alpha
        y = y + (kappa[i + 1] - kappa[i]) * model(nodes.alpha[i] * y, torch.tensor(nodes.label[i]))
    for run in runs:
        torch.testing.assert_close(run, y, rtol=0, atol=1e-12)


def test_ddim_on_a_flow_is_its_euler(mixture, z):
    schedule = RectifiedFlow(shift=2.0)
    model = mixture.model(schedule, "flow")
    nodes, x = Grid(schedule).nodes(6), z
    for i in range(6):
        x = x + (nodes.sigma[i + 1] - nodes.sigma[i]) * model(x, torch.tensor(nodes.label[i]))
    ours = sample(model, z, schedule=schedule, solver="ddim", steps=6, prediction="flow")
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def test_ancestral_ddim_has_the_ddpm_moments():
    """eta = 1 on a Gaussian: mean and variance follow DDPM's posterior (arXiv 2006.11239, eq. 6-7)."""
    mean, std, n, batch = 0.7, 0.4, 12, 40000
    data = GaussianMixture([1.0], [[mean]], [[std]])
    schedule = VPDiscrete.scaled_linear()
    labels = np.linspace(999, 0, n).round()
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, generator=gen, dtype=torch.float64)
    out = sample(data.model(schedule), x, schedule=schedule, solver="ddim", eta=1.0, timesteps=labels, generator=gen)
    m, v = 0.0, 1.0
    ab = np.append(np.cumprod(1 - schedule.betas)[labels.astype(int)], 1.0)
    for a, b in pairwise(ab):
        gain = np.sqrt(a) * std**2 / (a * std**2 + 1 - a)  # E[x_0 | x] = mean + gain (x - sqrt(a) mean)
        beta = 1 - a / b
        on_x0, on_x = np.sqrt(b) * beta / (1 - a), np.sqrt(a / b) * (1 - b) / (1 - a)
        slope = on_x0 * gain + on_x
        m = on_x0 * (mean - gain * np.sqrt(a) * mean) + slope * m
        v = slope**2 * v + beta * (1 - b) / (1 - a)
    assert out.mean().item() == pytest.approx(m, abs=4 * math.sqrt(v / batch))
    assert out.var().item() == pytest.approx(v, abs=4 * v * math.sqrt(2 / batch))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"solver": "dpmp"}, "did you mean 'dpmpp'"),
        ({"grid": "karas"}, "did you mean 'karras'"),
        ({"prediction": "v_predicton"}, "did you mean 'v_prediction'"),
        ({"ordre": 2}, "option of solver 'dpmpp' 'ordre': did you mean 'order'"),
        ({"order": 4}, "orders 1, 2 and 3"),
        ({"solver_type": "middlepoint"}, "did you mean 'midpoint'"),
        ({"target": "noise"}, "unknown target 'noise'"),
        ({"steps": 0}, "at least 1"),
        ({"solver": "ddim", "eta": -1.0}, "must not be negative"),
        ({"sigmas": [3.0, 5.0, 1.0]}, "strictly monotone"),
        ({"grid": Grid(VPLinear()), "end": "zero"}, "Grid object.* end"),
    ],
)
def test_misuse(mixture, z, call, message):
    with pytest.raises(ValueError, match=message):
        sample(mixture.model(VPLinear()), z, schedule=VPLinear(), **{"steps": 5, "solver": "dpmpp", **call})
    with pytest.raises(ValueError, match="alpha = 0"):
        sample(lambda x, t: x, z, schedule=RectifiedFlow(), steps=3, prediction="epsilon")
    with pytest.raises(ValueError, match="pass steps="):
        build_plan(VPLinear())
    with pytest.raises(ValueError, match="make 2 intervals, this solver needs 5"):
        sample(lambda x, t: x, z, schedule=VPLinear(), steps=5, sigmas=[3.0, 1.0])
