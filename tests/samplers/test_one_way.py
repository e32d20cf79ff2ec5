"""Nodes run from noise to data, no two alike, whoever is given them; and no grid or solver computes with infinities."""

import itertools

import numpy as np
import pytest
import torch

import samplers
from samplers import (
    EDM,
    Grid,
    RectifiedFlow,
    SolverScheduler,
    VPDiscrete,
    VPLinear,
    build_plan,
    sample,
    sample_adaptive,
)
from samplers.grid import GRIDS, falling
from samplers.schedule import training_betas
from samplers.solvers import SOLVERS
from samplers.stochastic import PREDICTORS

SD = VPDiscrete.scaled_linear()
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
UP = {"sigmas": [0.1, 0.4, 0.8], "timesteps": [100, 400, 900]}
FACES = {
    "Grid": lambda schedule, **given: Grid(schedule, **given),
    "Grid to t_end": lambda schedule, **given: Grid(schedule, end="t_end", **given),
    "build_plan": lambda schedule, **given: build_plan(schedule, "dpmpp", prediction="v_prediction", **given),
    "build_plan of the rule": lambda schedule, **given: build_plan(schedule, prediction="v_prediction", **given),
    "sample": lambda schedule, **given: sample(
        lambda x, t: x, X, schedule=schedule, prediction="v_prediction", **given
    ),
    **{
        name: lambda schedule, solver=name, **given: build_plan(schedule, solver, prediction="v_prediction", **given)
        for name in (*PREDICTORS, "predictor_corrector")
        if name in SOLVERS
    },
}


@pytest.mark.parametrize("name", UP)
@pytest.mark.parametrize("face", FACES)
def test_what_goes_up_is_refused(face, name):
    for schedule, values in itertools.product((SD, RectifiedFlow(3.0), VPLinear(), EDM()), (UP[name], [0.2, 0.5])):
        given = torch.tensor(values) if face == "Grid" else values
        with pytest.raises(ValueError, match=f"{name}.*entry 1"):
            FACES[face](schedule, **{name: given})
    with pytest.raises(ValueError, match=r"times.*entry 1"):
        Grid(SD, times=[0.1, 0.5, 1.0], end="t_end")


@pytest.mark.parametrize("name", UP)
@pytest.mark.parametrize("cls", [SolverScheduler, samplers.Euler, samplers.Heun], ids=lambda c: c.__name__)
def test_what_goes_up_is_refused_in_pipelines(cls, name):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for config in ({}, {"use_karras_sigmas": True}, flow, {**flow, "use_beta_sigmas": True, "shift_terminal": 0.1}):
        scheduler = cls(**config)
        scheduler.set_timesteps(5)
        for values in (UP[name], np.array(UP[name]), torch.tensor(UP[name]), UP[name][:2]):
            with pytest.raises(ValueError, match=f"{name}.*entry 1"):
                scheduler.set_timesteps(**{name: values})
        assert scheduler.plan is None  # not the one of before
        for values, message in (
            ([], name),
            (3.0, f"{name}.*3.0"),
            ([9, 9], f"{name}.*entry 1"),
            ([5, None], f"{name}.*None"),
        ):
            with pytest.raises(ValueError, match=message):
                scheduler.set_timesteps(**{name: values})


def test_towards_noise_by_the_range_alone(mixture, z):
    """The way there and back, which inversion needs, is said by t_start and t_end."""
    model = mixture.model(SD)
    there = build_plan(SD, "dpmpp", 60, t_start=0.05, t_end=0.6, end="t_end")
    back = build_plan(SD, "dpmpp", 60, t_start=0.6, t_end=0.05, end="t_end")
    assert (np.diff(there.t) > 0).all()
    x = 0.3 * z
    assert (back.run(model, there.run(model, x)) - x).abs().max() < 1e-3
    up, _ = sample_adaptive(model, x, schedule=SD, t_start=0.05, t_end=0.6, rtol=1e-5, atol=1e-6)
    assert (up - there.run(model, x)).abs().max() < 1e-3
    for solver in ("euler_ancestral", "reverse_diffusion", "euler_maruyama"):
        with pytest.raises(ValueError, match="noise"):
            build_plan(SD, solver, 6, t_start=0.05, t_end=0.6, end="t_end")


def test_nodes_that_fall_together():
    """A range or a rounding that leaves nothing between two nodes."""
    for make, message in (
        (lambda: Grid(SD, sigmas=[1.0, 0.0285, 0.028]), r"nodes \d+ and \d+"),  # both below the schedule's last level
        (lambda: Grid(SD, "ays", t_start=0.5).nodes(10), r"nodes \d+ and \d+"),
        (lambda: Grid(SD, "leading").nodes(1000), r"nodes \d+ and \d+"),
        (lambda: Grid(SD, "leading", steps_offset=5).nodes(999), "1004.* 0 to 999"),
        (lambda: Grid(SD, timesteps=[500, 200], t_end=0.4, end="t_end"), r"nodes \d+ and \d+"),
        (lambda: Grid(RectifiedFlow(), timesteps=[500, 0]), "sigma = 0"),
        (lambda: Grid(EDM(), sigmas=[1.0, 5e-324]), "sigma = 4.94e-324"),
        (lambda: Grid(EDM(), t_start=float("inf")), "schedule"),
        (lambda: Grid(SD, "karras", rho=0.0), "rho"),
        (lambda: Grid(SD).nodes(10**7), "100000"),
        (lambda: build_plan(RectifiedFlow(), "reverse_diffusion", 1, prediction="flow"), "reverse_diffusion"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert falling("sigmas", (3, 2.5, 0)).tolist() == [3.0, 2.5, 0.0]


SCHEDULES = {
    "linear VP": VPLinear(),
    "DDPM": VPDiscrete(training_betas("linear")),
    "four betas": VPDiscrete(training_betas("linear", 0.1, 0.5, 4)),
    "cosine": VPDiscrete(training_betas("squaredcos_cap_v2")),
    "zero SNR": VPDiscrete(training_betas("scaled_linear", 0.00085, 0.012, zero_snr=True)),
    "zero SNR of linear betas": VPDiscrete(training_betas("linear", zero_snr=True)),
    "EDM": EDM(),
    "wide EDM": EDM(1e-5, 1e5),
    "flow": RectifiedFlow(),
    "steep flow": RectifiedFlow(1e6),
    "flat flow": RectifiedFlow(0.1),
    "short flow": RectifiedFlow(1.0, 5),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_a_plan_or_a_reason(schedule):
    """Every solver on every grid, at numbers of calls where it changes its form: a finite table or a ValueError. That
    numpy has nothing to warn of is in conftest.py. Both ends take turns, so that each grid and each solver has both."""
    made = 0
    for i, kind in enumerate((None, *GRIDS)):
        for j, solver in enumerate((None, *SOLVERS)):
            end = ("zero", "t_end")[(i + j) % 2]
            for calls in (1, 2, 5):
                try:
                    plan = build_plan(schedule, solver, calls, kind, end=end, prediction="v_prediction")
                    made += len(plan) == calls
                except ValueError as error:
                    assert len(str(error)) > 20
    assert made > 150
