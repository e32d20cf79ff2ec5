"""What must not change a result, for every solver: the prediction type, and the form (VP, VE) of the same problem."""

import numpy as np
import pytest
import torch

from samplers import EDM, Grid, RectifiedFlow, VPLinear, build_plan
from samplers.solvers import SOLVERS

KINDS = ("epsilon", "sample", "v_prediction", "flow", "score")
FORM = {"deis": {"variant": "rhoab"}}  # its default, tab, interpolates in the schedule's own t: another method per form
FORM |= {"predictor_corrector": {"predictor": "ancestral_sampling"}}
OF_X = ("reverse_diffusion", "euler_maruyama")  # Euler steps of x itself, so another method in each form
BIASED = ("evodiff",)  # on grids whose steps in lambda change: its ratio R of outputs is then not 1
LEVELS = np.geomspace(100, 0.01, 9)


def plan_on(schedule, solver, **options):
    return build_plan(schedule, solver, grid=Grid(schedule, sigmas=LEVELS), **options)


def draws(x, seed=3):
    """Noise by call index, the same in every run."""
    return lambda k: torch.randn(
        x.shape, generator=torch.Generator().manual_seed(seed * 1000 + k + 1), dtype=torch.float64
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_prediction_type(mixture, z, solver):
    schedule = VPLinear()
    plan = plan_on(schedule, solver)
    runs = [plan.run(mixture.model(schedule, kind), z, prediction=kind, noise=draws(z)) for kind in KINDS]
    scale = runs[0].abs().max()  # stochastic solvers may be far from the data with so few calls
    for run in runs[1:]:
        assert (run - runs[0]).abs().max() < 1e-11 * max(1.0, scale)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in OF_X])
def test_vp_and_edm_form_are_the_same_problem(mixture, z, solver):
    """x / alpha of the VP run is the VE run: same noise levels, same draws."""
    vp, edm = VPLinear(), EDM(0.002, 500)
    alpha = float(vp.alpha(vp.t_of_noise_level(LEVELS[0])))
    options = FORM.get(solver, {})
    a = plan_on(vp, solver, **options).run(mixture.model(vp), z, noise=draws(z))
    b = plan_on(edm, solver, **options).run(mixture.model(edm), z / alpha, noise=draws(z))
    assert (a - b).abs().max() < 1e-10 * max(1.0, a.abs().max())


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "euler_maruyama"])  # singular at alpha = 0
def test_rectified_flow_from_pure_noise(mixture, z, solver):
    """alpha is exactly 0 at the start and sigma exactly 0 at the end: nothing infinite, and the result is the data."""
    schedule = RectifiedFlow(shift=2.0)
    times = np.append(np.linspace(1, 0.01, 40), 0.0)
    plan = build_plan(schedule, solver, grid=Grid(schedule, times=times[:-1], end="zero"), prediction="flow")
    out = plan.run(mixture.model(schedule, "flow"), z, noise=draws(z))
    if not plan.stochastic:
        exact = mixture.exact(schedule, z, t_end=0)
        assert (out - exact).square().mean().sqrt() < (0.25 if solver in BIASED else 0.08)
    assert out.isfinite().all() and out.abs().max() < 3.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_are_counted_and_steps_are_calls(mixture, z, solver):
    """For every number of calls: a plan of exactly that many, or an error that says which numbers are possible."""
    schedule, made = VPLinear(), 0
    for n in range(1, 14):
        for end in ("zero", "t_end"):
            try:
                plan = build_plan(schedule, solver, n, end=end)
            except ValueError as error:
                assert "calls" in str(error), error
                continue
            labels = []
            model = mixture.model(schedule)
            out = plan.run(lambda x, t: labels.append(float(t)) or model(x, t), z, noise=draws(z))  # noqa: B023
            assert len(labels) == n == len(plan) and out.isfinite().all()
            assert labels == pytest.approx(list(plan.label), rel=1e-12)
            made += 1
    assert made >= 6
