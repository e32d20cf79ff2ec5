"""Semi-discrete transport against exact solutions: quantiles in one dimension, an assignment in more."""

import os

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm

from samplers import VPLinear
from samplers.calibrate import Transport, fit_transport, latents_at


def gen(seed):
    return torch.Generator().manual_seed(seed)


def test_one_dimension():
    """The cells are the intervals between the quantiles i / n, whatever the points."""
    points = torch.tensor([[3.0], [-1.0], [0.5], [-2.5], [0.7]])
    fitted = fit_transport(points, 0.5, gen(0), iterations=1500, batch=2000)
    order = points[:, 0].argsort()
    y, h = points[order, 0].double(), fitted.heights[order]
    edges = (h[:-1] - h[1:]) / (y[1:] - y[:-1])  # where <z, y_j> + h_j of neighbours are equal
    assert np.abs(edges.numpy() - norm.ppf([0.2, 0.4, 0.6, 0.8])).max() < 0.02
    assert torch.equal(fitted(torch.tensor([[-3.0], [0.0], [3.0]])), torch.tensor([[-2.5], [0.5], [3.0]]))


def test_against_an_assignment():
    """On a sample of noises: the dual value is a lower bound of the optimal cost, and the fit comes close to it."""
    n, copies = 12, 50
    points = 2.0 * torch.randn(n, 1, 2, 2, generator=gen(1)) + 1.0
    fitted = fit_transport(points, 0.5, gen(2), iterations=1500, batch=2000)
    z = torch.randn(n * copies, 4, generator=gen(3)).double()
    y = points.flatten(1).double()
    cost = torch.cdist(z, y).square() / 2
    rows, columns = linear_sum_assignment(cost.repeat(1, copies).numpy())
    exact = float(cost.repeat(1, copies)[rows, columns].mean())

    def dual(heights):
        psi = heights + y.square().sum(1) / 2
        return float((cost - psi + psi.mean()).min(1).values.mean())

    assert dual(fitted.heights) <= exact + 1e-9
    assert exact - dual(fitted.heights) < 0.01 * exact < exact - dual(torch.zeros(n))
    ours = fitted.cell(z.view(-1, 1, 2, 2).float())
    assert (ours.numpy() == columns[np.argsort(rows)] % n).mean() > 0.9


def test_masses():
    points = torch.randn(40, 16, generator=gen(4))
    fresh = torch.randn(40_000, 16, generator=gen(5))
    fitted = fit_transport(points, 0.5, gen(6), iterations=600)
    assert fitted.mass_error(fresh) < 0.03
    assert Transport(points, torch.zeros(40).double(), 0.5).mass_error(fresh) > 0.1


def test_latents_and_plan(mixture):
    """Latents at the level have the marginal of the forward process, and the plan begins there."""
    schedule, clean = VPLinear(), torch.full((20_000, 2), 3.0)
    level = latents_at(clean, schedule, 0.4, gen(7))
    alpha, sigma = float(schedule.alpha(0.4)), float(schedule.sigma(0.4))
    assert abs(level.mean() - 3 * alpha) < 0.02 and abs(level.std() - sigma) < 0.02
    fitted = Transport(level[:10], torch.zeros(10).double(), 0.4)
    plan = fitted.plan(schedule, "dpmpp", 4)
    assert len(plan) == 4 and plan.t[0] == pytest.approx(0.4) and plan.sigma[-1] == 0


def test_file(tmp_path):
    fitted = Transport(torch.randn(6, 2, 3, generator=gen(8)), torch.randn(6, generator=gen(9)).double(), 0.7)
    fitted.save(tmp_path / "x.safetensors")
    again = Transport.load(tmp_path / "x.safetensors")
    assert torch.equal(again.points, fitted.points) and torch.equal(again.heights, fitted.heights) and again.t == 0.7
    assert os.listdir(tmp_path) == ["x.safetensors"]
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-5])
    (tmp_path / "other").write_bytes(b"hello")
    for name in ("cut", "other", "missing"):
        with pytest.raises(ValueError, match=name):
            Transport.load(tmp_path / name)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="two finite"):
        fit_transport(torch.full((3, 2), torch.nan), 0.5, gen(0))
    with pytest.raises(ValueError, match="shape"):
        Transport(torch.zeros(2, 3), torch.zeros(2).double(), 0.5)(torch.zeros(1, 4))
