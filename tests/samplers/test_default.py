"""The default rule: valid everywhere, and as accurate as it is said to be on problems that nobody tuned it for."""

import math

import numpy as np
import pytest
import torch
from sampler_bench import theirs
from sampler_bench.compare import geometric_mean
from sampler_bench.problems import Problem, random_mixture

from samplers import EDM, RectifiedFlow, VPDiscrete, VPLinear, build_plan
from samplers.default import default_solver

SD = VPDiscrete.scaled_linear()
SCHEDULES = {"sd": SD, "linear": VPLinear(), "edm": EDM(), "flow": RectifiedFlow(), "sd3": RectifiedFlow(shift=3.0)}


def plan_for(schedule, calls, guidance, end="t_end"):
    choice = default_solver(calls, guidance, schedule, end)
    return build_plan(schedule, choice.solver, calls, choice.grid, "sample", **choice.options)


def rmse(problem, calls, end="t_end"):
    plan = plan_for(problem.schedule, calls, problem.guidance, end)
    # x_0 prediction: defined at pure noise too, where a flow schedule starts
    model = problem.mixture.model(problem.schedule, "sample", problem.classes, problem.guidance)
    x = plan.run(model, problem.z)
    return float((x - problem.exact[end]).square().mean().sqrt())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("end", ["t_end", "zero"])
def test_every_number_of_calls_and_guidance_gives_a_plan(schedule, end):
    for calls in (1, 2, 3, 4, 5, 8, 13, 50, 200):
        for guidance in (0.0, 1.0, 1.5, 3.0, 7.5, 20.0):
            plan = plan_for(schedule, calls, guidance, end)
            assert len(plan) == calls
            assert plan.t[0] == schedule.t_max and (np.diff(plan.t) < 0).all()
            assert plan.t[-1] == (0.0 if end == "zero" else schedule.t_min)
            assert plan.t[-2] >= schedule.t_min


def test_the_rule_as_documented():
    def of(calls, w):
        choice = default_solver(calls, w, SD)
        return (choice.solver.__name__, choice.options["order"])

    cautious, two, three, four = ("ipndm", 2), ("abm", 2), ("abm", 3), ("abm", 4)
    assert [of(n, 1.0) for n in (2, 3, 5, 6, 8, 9, 20)] == [cautious, two, two, three, three, four, four]
    assert [of(n, 7.5) for n in (5, 7, 8, 14, 15, 21, 22, 50)] == [cautious] * 2 + [two] * 2 + [three] * 2 + [four] * 2
    assert default_solver(20, 1.0, SD).options == {"order": 4, "final_order": 2}
    k = (lambda n: n.sigma / n.alpha)(default_solver(10, 4.0, SD).grid.nodes(10)) ** 0.8
    u = k / (k + 0.8**0.8)  # center 0.4 sqrt(4)
    assert np.allclose(np.diff(u), np.diff(u)[0], rtol=1e-9)
    nodes = [default_solver(10, w, SD).grid.nodes(10).sigma[5] for w in (1.0, 2.0, 3.0, 5.0, 7.5)]
    assert (np.diff(nodes) > 0).all()  # guidance moves the calls to more noise, smoothly
    assert of(10, 0.3) == of(10, 1.0)


@pytest.mark.parametrize("bad", [(0, 1.0), (2.5, 1.0), (5, math.inf), (5, math.nan)])
def test_bad_input(bad):
    with pytest.raises(ValueError, match=r"calls|guidance"):
        default_solver(*bad, SD)
    with pytest.raises(ValueError, match="did you mean 'zero'"):
        default_solver(5, 1.0, SD, "zeros")


@pytest.mark.parametrize("guidance", [1.0, 2.0, 7.5])
@pytest.mark.parametrize("schedule", ["linear", "edm", "sd3"])
def test_converges_on_every_schedule(schedule, guidance):
    problem = Problem("d=2", random_mixture(2, 3, seed=77), guidance, batch=32, schedule=SCHEDULES[schedule])
    coarse, fine = rmse(problem, 20), rmse(problem, 60)
    assert fine < 2e-4 and fine < coarse < 0.05
    assert rmse(problem, 60, "zero") < 2e-3


STRONG = (  # those that win most often in scripts/bench_samplers.py
    "DPMSolverMultistep lu o2 dpmsolver++ end=zero",
    "DPMSolverMultistep karras o3 dpmsolver++ end=zero",
    "UniPCMultistep karras o2 bh2 end=zero",
    "DEISMultistep karras o2",
    "DEISMultistep karras o3",
    "LMSDiscrete karras",
)


@pytest.mark.parametrize("guidance, bar", [(1.0, 0.6), (7.5, 0.6)])
def test_beats_the_best_diffusers_scheduler_of_each_problem(guidance, bar):
    """Mixtures and noise of seeds that the rule was not made with; geometric mean over problems at 8 and 10 calls."""
    shapes = [(2, 3, 4001, False), (16, 5, 4002, False), (16, 5, 4003, True), (6, 4, 4004, False)]
    ratios = []
    for d, k, seed, anisotropic in shapes:
        problem = Problem("", random_mixture(d, k, seed, anisotropic), guidance, seed)
        for calls in (8, 10):
            best = []
            for name in STRONG:
                x, end = theirs.methods()[name](problem, calls)
                best.append(float((x - problem.exact[end]).square().mean().sqrt()))
            ratios.append(rmse(problem, calls) / min(b for b in best if math.isfinite(b)))
    assert geometric_mean(ratios) < bar, ratios


def test_never_explodes_between_guidance_values():
    """Orders jump with guidance and calls; the error must not."""
    mixture = random_mixture(16, 5, 4010)
    for guidance in (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 10.0):
        problem = Problem("", mixture, guidance, 5, batch=32)
        errors = [rmse(problem, calls) for calls in (5, 6, 7, 8, 10, 13, 16, 20)]
        scale = float(torch.sqrt((problem.exact["t_end"] ** 2).mean()))
        assert max(errors) < 0.5 * scale and errors[-1] < 0.02 * scale, (guidance, errors)
