"""The statistics in assets/calibrated: they are of the embedded models, and DPM-Solver-v3 solves the ODE with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpo import models
from samplers import SolverScheduler, Statistics, build_plan
from samplers.analytic import GaussianMixture

ASSETS = Path(__file__).resolve().parents[2] / "assets"
FILES = sorted((ASSETS / "calibrated").glob("*/statistics-g*.safetensors"))


@pytest.fixture(scope="module", params=FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def shipped(request):
    """A file's statistics, its path and the schedule of its model."""
    path = request.param
    config = json.loads((ASSETS / path.parent.name / "scheduler" / "scheduler_config.json").read_text())
    return Statistics.load(path), path, SolverScheduler.from_config(config).schedule


def test_there_are_files_of_both_models():
    assert {path.parent.name for path in FILES} == {"tiny-sdxl", "tiny-dit"}


def test_they_belong_to_the_model(shipped):
    statistics, path, schedule = shipped
    assert statistics.model == models.source_of(models.named(str(ASSETS / path.parent.name))).fingerprint()
    assert path.stem == f"statistics-g{statistics.guidance:g}"
    assert statistics.shape == (8, 1, 1)
    assert statistics.lam[-1] == pytest.approx(float(schedule.lam(schedule.t_min)))
    assert path.stat().st_size < 8_192


def test_noise_is_predicted_from_almost_pure_noise(shipped):
    """l = 1 - alpha^2 Var(x_0 | x) / sigma^2 for an ideal network: nearly 1 where there is almost no signal."""
    statistics, _, _ = shipped
    assert np.abs(statistics.l[0] - 1).max() < 0.1


def test_the_solver_converges_whatever_the_statistics_say(shipped):
    """The integrals are exact for any l, s and b, and these only decide what is extrapolated: on another model the
    solver still converges, at least in first order."""
    statistics, _, schedule = shipped
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(3, 8, 1, 1, generator=draw, dtype=torch.float64) / 2
    mixture = GaussianMixture([0.2, 0.5, 0.3], means, torch.full_like(means, 0.4))
    noise = torch.randn(16, 8, 1, 1, generator=draw, dtype=torch.float64) * schedule.init_scale
    model, grid = mixture.model(schedule, statistics.prediction), "time"
    options = {"prediction": statistics.prediction, "end": "t_end"}
    exact = build_plan(schedule, "abm", 400, grid, order=3, **options).run(model, noise)
    errors = []
    for calls in (20, 80):
        plan = build_plan(schedule, "dpm_solver_v3", calls, grid, order=2, statistics=statistics, **options)
        errors.append(float((plan.run(model, noise) - exact).square().mean().sqrt()))
    assert errors[1] < errors[0] / 4 and errors[1] < 0.02, errors
