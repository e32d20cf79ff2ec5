"""EVODiff against its formulas in plain numpy, and as a plan whose steps depend on the state."""

import math

import numpy as np
import pytest
import torch

from samplers import EDM, SolverScheduler, VPDiscrete, build_plan, then_denoise
from samplers.solvers.evodiff import EVODiffPlan


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def project(a, b):
    """<a, b> / <b, b> over height and width, in [-2, 2]."""
    return np.clip((a * b).sum((2, 3), keepdims=True) / (b * b).sum((2, 3), keepdims=True), -2, 2)


def by_hand(model, x, s, final):
    """The steps of the authors' code on EDM's schedule; s: sigma at the nodes. final: 'first', 'published', 'full'."""
    n = len(s) - 1
    m = [model(x, s[0])]
    x = s[1] / s[0] * x + s[1] * (1 / s[1] - 1 / s[0]) * m[0]
    if n > 1 or final == "full":
        m.insert(0, model(x, s[1]))
    for i in range(2, n + 1):
        t, s0, s1, m0, m1 = s[i], s[i - 1], s[i - 2], m[0], m[1]
        rho, h = t / s0, 1 / t - 1 / s0
        xe = rho * x + t * h * m0
        if i == n and final != "full":
            if final == "published":
                rd = 1 - 0.5 * math.sqrt(rho if rho < 0.5 else rho - 0.5)
                xe = (1 - math.sqrt(t * s0)) * xe + 0.5 * t * h * (m0 - rd * m1)
            return xe
        rl, tn = math.log(s1 / s0) / math.log(s0 / t), (t + s[-1]) / (s[0] + s[-1])
        w, balance = 0.5 * (1 - tn**2), math.sqrt(rho / (s0 / s1))
        r1 = (1 - w) * balance + w * project(m0, m1)
        d1 = m0 - r1 * m1
        ri = np.clip(sigmoid(0.25 * np.abs(r1)) * rl, 0.25 * rl, 1.5 * rl)
        xp = xe + 0.5 * t * h / ri * d1
        mt = model(xp, t)
        m.insert(0, mt)
        d2 = mt - ((1 - w) * balance + w * project(mt, m0)) * m0
        bp, bn = d1 / (rl * h), rl / h * d2
        eta = 0.5 * sigmoid(np.abs(0.5 * project(bn + bp, bn - bp)))
        bt = -eta / rl * d1 + rl * (1 - eta) * d2
        zs = np.abs(project(xp - xe - 0.5 * t * h / ri * bt, d1) / (h * t)) - 0.5
        zeta = sigmoid(zs) if n <= 20 else sigmoid(-zs * sigmoid(project(m0, (m0 - m1) / h) * (2 - rho**2)))
        x = xe + 0.5 * t * h / zeta * bt
    return x


CASES = [(7, "first"), (7, "published"), (7, "full"), (24, "full"), (2, "first"), (1, "first")]


@pytest.mark.parametrize(("steps", "final"), CASES)
def test_formulas(mixture, z, steps, final):
    schedule, denoise = EDM(), mixture.model(EDM(), "sample")

    def model(x, sigma):
        return denoise(torch.from_numpy(x), torch.tensor(sigma, dtype=torch.float64)).numpy()

    options = {"as_published": final == "published", "lower_order_final": final != "full"}
    plan = build_plan(schedule, "evodiff", steps + (final == "full"), end="t_end", **options)
    found = plan.run(denoise, 80.0 * z, prediction="sample")
    expected = by_hand(model, 80.0 * z.numpy(), plan.sigma[: steps + 1], final)
    assert np.abs(found.numpy() - expected).max() < 1e-10


def test_samples_do_not_see_their_batch(mixture, z):
    plan = build_plan(EDM(), "evodiff", 8)
    together, model = plan.run(mixture.model(EDM()), 80.0 * z), mixture.model(EDM())
    apart = torch.cat([plan.run(model, 80.0 * each[None]) for each in z])
    assert (together - apart).abs().max() < 1e-11


def test_it_is_no_linear_map_of_the_noise():
    """A linear network and twice the noise: a table of numbers gives twice the result, this solver does not when the
    projections change."""
    plan = build_plan(VPDiscrete.scaled_linear(), "evodiff", 8)
    x = torch.randn(2, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = x[:1], x[1:]

    def model(x, t):
        return x * torch.tensor([0.9, 0.3], dtype=x.dtype)

    total, parts = plan.run(model, a + b), plan.run(model, a) + plan.run(model, b)
    assert (total - parts).abs().max() > 1e-3
    ddim = build_plan(VPDiscrete.scaled_linear(), "ddim", 8)
    assert (ddim.run(model, a + b) - ddim.run(model, a) - ddim.run(model, b)).abs().max() < 1e-12


def test_scheduler_steps_it_as_any_plan(mixture, z):
    """The pipeline's loop gives what `run` gives, from the start and from the middle (image-to-image)."""
    scheduler = SolverScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver="evodiff")
    scheduler.set_timesteps(8)
    model = mixture.model(scheduler.schedule)
    for first in (0, 3):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(first)
        x = z
        for t in scheduler.timesteps[first:].double():
            x = scheduler.step(model(x, t), t, x).prev_sample
        plan = scheduler._run.plan
        assert isinstance(plan, EVODiffPlan) and len(plan) == 8 - first
        assert (x - plan.run(model, z, prediction="epsilon")).abs().max() < 1e-4


def test_nan_free_where_an_output_is_zero():
    plan = build_plan(EDM(), "evodiff", 8, prediction="sample")
    out = plan.run(lambda x, t: torch.zeros_like(x), 80 * torch.ones(1, 1, 2, 2).double())
    assert (out == 0).all()


def test_denoised_and_what_it_refuses(mixture, z, tmp_path):
    plan = build_plan(EDM(), "evodiff", 6, end="t_end")
    longer = then_denoise(plan, EDM())
    last = mixture.model(EDM(), "sample")(plan.run(mixture.model(EDM()), 80 * z), torch.tensor(0.002).double())
    assert (longer.run(mixture.model(EDM()), 80 * z) - last).abs().max() < 1e-10
    with pytest.raises(ValueError, match="no table to save"):
        plan.save(tmp_path / "x")
    with pytest.raises(ValueError, match="evodiff"):
        plan.transition(2)
    with pytest.raises(ValueError, match="end='t_end'"):
        build_plan(EDM(), "evodiff", 6, lower_order_final=False)
    with pytest.raises(ValueError, match="calls"):
        build_plan(EDM(), "evodiff", 1, lower_order_final=False, end="t_end")
    assert not list(tmp_path.iterdir())
