"""What diffusers and its pipelines ask of a scheduler: counts, labels, noise, positions, precision, errors."""

import copy

import numpy as np
import pytest
import torch
from tiny_pipes import SD, gen

import samplers
from samplers import Nodes, Plan, SolverScheduler, VPDiscrete
from samplers.plan import row
from samplers.solvers import SOLVERS

SCHEDULE = VPDiscrete.scaled_linear()
MODEL = lambda x: 0.9 * torch.tanh(1.3 * x + 0.1)  # noqa: E731
NOISE = torch.randn(2, 4, 8, 8, generator=gen())
MANY_CALLS = ["heun", "dpm2", "singlestep", "pndm", "dpmpp_2s_ancestral", "runge_kutta"]
CALLS = {"runge_kutta": 10, "predictor_corrector": 10}  # whole steps


def ready(calls=None, solver="dpmpp", begin=None, **config):
    placed = {name: config.pop(name) for name in ("timesteps", "sigmas") if name in config}
    scheduler = SolverScheduler(**SD, solver=solver, **config)
    scheduler.set_timesteps(calls, **placed)
    if begin is not None:
        scheduler.set_begin_index(begin)
    return scheduler


def loop(scheduler, x, first=0, generator=None, edit=None):
    for k, t in enumerate(scheduler.timesteps[first:]):
        x = scheduler.step(MODEL(x), t, x, generator=generator).prev_sample
        x = edit(k, x) if edit else x
    return x


def test_attributes():
    scheduler = SolverScheduler(**SD)
    x = NOISE
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000
    assert scheduler.scale_model_input(x, 3) is x and scheduler.step_index is scheduler.begin_index is None
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="run set_timesteps before step"):
        scheduler.step(x, 0, x)
    scheduler = ready(5)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 5 and len(scheduler.sigmas) == 6
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.step_index == (i or None)
        assert scheduler.step(x, t, x, return_dict=False)[0].shape == x.shape
    with pytest.raises(ValueError, match="all 5 steps are done"):
        scheduler.step(x, t, x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_counts_calls(solver):
    """One label per call; the same labels by number, by labels and by sigmas."""
    n = CALLS.get(solver, 9)
    scheduler = ready(n, solver)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == len(scheduler.plan) == n
    assert scheduler.timesteps.dtype == torch.float32 and len(scheduler.sigmas) == n + 1 and scheduler.sigmas[-1] == 0
    generator = gen(1)
    assert torch.isfinite(loop(scheduler, NOISE, generator=generator)).all()
    plan = scheduler.plan
    if solver in ("pndm", "singlestep", "predictor_corrector"):
        return  # several numbers of calls make as many steps, or a step calls twice at one node
    ends = np.flatnonzero([k == 0 or (plan.rows[k - 1, 0] == plan.rows[k - 1, 1]).all() for k in range(n)])
    for given in ({"timesteps": plan.label[ends]}, {"sigmas": [*(plan.sigma / plan.alpha)[ends], 0.0]}):
        again = ready(solver=solver, **given)
        np.testing.assert_allclose(again.plan.rows, plan.rows, rtol=1e-7, atol=1e-7)
        assert again.num_inference_steps == n


def test_numbers_of_calls_that_a_solver_cannot_make():
    with pytest.raises(ValueError, match=r"pndm.* makes 2, 3, 4, ... model calls, not 1"):
        ready(1, "pndm")
    with pytest.raises(ValueError, match=r"exactly one of .* makes 5 calls where num_inference_steps is 3"):
        ready(3, "heun", sigmas=[9.0, 3.0, 1.0])
    assert len(ready(5, "heun", sigmas=[9.0, 3.0, 1.0]).timesteps) == 5


def toy(grid, steps):
    """Three calls per step; the second goes up in time, the third repeats its label."""
    if steps % 3:
        raise ValueError(f"toy makes 3, 6, 9, ... calls, not {steps}")
    nodes = grid.nodes(steps // 3)
    t = np.concatenate([np.append([a, min(1.0, a + 0.05)], min(1.0, a + 0.05)) for a in nodes.t[:-1]])
    stay, step = (row(0.9, 0.1), row(1.0)), row(0.8, 0.05, 0.05, 0.05)
    every = Nodes.at(grid.schedule, np.append(t, grid.t_end))
    return Plan.build("toy", "epsilon", every, [stay, stay, step] * (steps // 3))


def test_labels_may_repeat_and_go_up(monkeypatch):
    """Position is counted, never searched: the same label names three calls and the run still meets each once."""
    monkeypatch.setitem(SOLVERS, "toy", toy)
    scheduler = ready(9, "toy", final_sigmas_type="sigma_min")
    labels = scheduler.timesteps.tolist()
    assert labels[1] == labels[2] and labels[4] > labels[3]
    outs = {}
    for begin in (None, 0):
        scheduler = ready(9, "toy", final_sigmas_type="sigma_min", begin=begin)
        outs[begin] = loop(scheduler, NOISE)
    state = scheduler.plan.begin(NOISE)
    for k in range(9):
        state = scheduler.plan.step(k, state, MODEL(state.input))
    assert torch.equal(outs[None], state.input) and torch.equal(outs[0], state.input)


@pytest.mark.parametrize("begin", [1, 2, 4, 7])
@pytest.mark.parametrize("solver", ["dpmpp", "unipc", *MANY_CALLS])
def test_begin_index_and_label_lead_to_the_same_run(solver, begin):
    """Pipelines that set no begin index are found by their first label (its first place, if it repeats)."""
    calls = CALLS.get(solver, 9)
    counted = ready(calls, solver, begin=begin)
    searched = ready(calls, solver)
    found = searched.timesteps.tolist().index(searched.timesteps[begin])
    x = NOISE
    a = loop(counted, x, begin, gen(1))
    b = loop(searched, x, found, gen(1))
    assert counted.step_index == searched.step_index == calls
    if found == begin:
        assert torch.equal(a, b)


def test_add_noise():
    x = torch.randn(3, 4, 8, 8, generator=gen())
    noise = torch.randn(3, 4, 8, 8, generator=gen(1))
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    labels = torch.tensor([0, 500, 999])
    a = alpha_bar[labels].view(3, 1, 1, 1)
    expected = a.sqrt() * x + (1 - a).sqrt() * noise
    scheduler = SolverScheduler(**SD)
    torch.testing.assert_close(scheduler.add_noise(x, noise, labels), expected.float())
    torch.testing.assert_close(scheduler.add_noise(x.double(), noise.double(), labels), expected)
    assert scheduler.add_noise(x.bfloat16(), noise.bfloat16(), labels).dtype == torch.bfloat16
    flow = SolverScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    torch.testing.assert_close(flow.scale_noise(x, torch.tensor([250.0]), noise), 0.75 * x + 0.25 * noise)


def test_exact_times_between_integer_labels():
    """Labels are what the network is told; the plan's own times are continuous, and given ones are kept exactly."""
    plan = ready(7).plan
    np.testing.assert_allclose(np.diff(SCHEDULE.lam(plan.t[:7]), 2), 0, atol=1e-9)
    assert (plan.label != plan.label.round()).any()
    given = ready(timesteps=[999, 600.25, 20]).plan
    np.testing.assert_allclose(given.label, [999, 600.25, 20], rtol=1e-14)
    np.testing.assert_allclose(given.sigma[1], SCHEDULE.sigma(0.60125), rtol=1e-14)


def test_dynamic_shift():
    flow = SolverScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True, solver="heun"
    )
    with pytest.raises(ValueError, match="pass mu="):
        flow.set_timesteps(4)
    flow.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.0)
    s, e = np.array([1.0, 0.75, 0.5, 0.25]), np.e
    shifted = e * s / (1 + (e - 1) * s)
    np.testing.assert_allclose(flow.timesteps, 1000 * shifted[[0, 1, 1, 2, 2, 3, 3]], rtol=1e-6)
    flow.set_timesteps(7, mu=1.0)
    assert len(flow.timesteps) == 7


def test_noise_before_the_first_call_is_part_of_the_latents():
    """EDM's churn raises the first level; the pipeline's noise is drawn at it (init_noise_sigma), in one go."""
    scheduler = ready(sigmas=[2.0, 1.0, 0.3], solver="heun", solver_options={"s_churn": 1.0})
    plan = scheduler.plan
    assert plan.start[0, 1] > 0 and plan.sigma[0] / plan.alpha[0] == pytest.approx(2 * (1 + 1 / 3))
    assert scheduler.init_noise_sigma == pytest.approx(np.hypot(*plan.start[0]))
    out = loop(scheduler, NOISE, generator=gen(1))
    g, state = gen(1), samplers.State(NOISE, NOISE, ())
    for k in range(5):
        noise = torch.randn(NOISE.shape, generator=g) if plan.needs_noise(k) else None
        state = plan.step(k, state, MODEL(state.input), noise)
    torch.testing.assert_close(out, state.input, rtol=0, atol=1e-6)


def test_state_is_float32_in_a_half_precision_pipeline():
    """The pipeline holds bf16 latents; the scheduler keeps its own state in float32 while the latents are its own."""
    noise = NOISE.bfloat16()
    exact = loop(ready(30), noise.double())
    assert exact.dtype == torch.float64
    kept, rounded = ready(30), ready(30)
    assert loop(kept, noise).dtype == torch.bfloat16
    loop(rounded, noise, edit=lambda k, x: x.clone())  # what a scheduler without a state of its own would step from
    error = [(s._run.state.input.double() - exact).abs().mean() for s in (kept, rounded)]
    assert error[0] < 0.7 * error[1]


@pytest.mark.parametrize("solver", ["dpmpp", "heun", "unipc", "pndm"])
def test_latents_changed_by_the_pipeline_are_taken_over(solver):
    """Inpainting blends, callbacks edit: also in place."""
    for dtype in (torch.float32, torch.bfloat16):
        results = [
            loop(ready(7, solver), NOISE.to(dtype), edit=edit)
            for edit in (lambda k, x: x.add_(1.0) if k == 2 else x, lambda k, x: x + 1.0 if k == 2 else x)
        ]
        assert torch.equal(*results)
        assert (results[0] - loop(ready(7, solver), NOISE.to(dtype))).abs().mean() > 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_edit_at_any_call_is_carried_to_the_end(solver):
    """For a network that answers eps = 0 the state only scales with alpha, for x_0 = 0 with sigma: so does an edit."""
    n = 12  # whole steps of one, two, three or four calls
    for prediction, scale in (("epsilon", "alpha"), ("sample", "sigma")):
        probe = ready(n, solver, prediction_type=prediction, final_sigmas_type="sigma_min")
        if probe.plan.stochastic or (probe.plan.reads[:, 0] != 0).any():
            continue  # the other kind of network, which this solver's own quantity makes exact
        for k in range(n - 1):
            scheduler = copy.copy(probe)
            x = NOISE.double()
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(torch.zeros_like(x), t, x).prev_sample + (1.0 if i == k else 0.0)
            level = getattr(probe.plan, scale)
            expected = level[-1] * (NOISE.double() / level[0] + 1.0 / level[k + 1])
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)


def test_two_requests_run_interleaved_on_one_plan():
    first = ready(7, "sa_solver", solver_options={"tau": 0.5})
    second = copy.copy(first)
    assert second.plan is first.plan
    x, y = NOISE, 2.0 * NOISE
    g, h = gen(1), gen(2)
    for t in first.timesteps:
        x = first.step(MODEL(x), t, x, generator=g).prev_sample
        y = second.step(MODEL(y), t, y, generator=h).prev_sample
    for start, out, seed in ((NOISE, x, 1), (2.0 * NOISE, y, 2)):
        assert torch.equal(out, loop(ready(7, "sa_solver", solver_options={"tau": 0.5}), start, generator=gen(seed)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"num_inference_steps": 3, "timesteps": [5, 3]}, "exactly one of"),
        ({"sigmas": [3.0], "timesteps": [5, 3]}, "exactly one of"),
        ({"sigmas": [1.0, 2.0, 0.1]}, "strictly monotone"),
        ({"sigmas": [0.0]}, "at least"),
        ({"sigmas": [1e5, 1.0]}, "outside the schedule"),
        ({"timesteps": [2000, 3]}, "outside the schedule"),
        ({"timesteps": [7, 7]}, "strictly monotone"),
    ],
)
def test_bad_set_timesteps(call, message):
    if call == {"sigmas": [0.0]}:
        message = "need a value above 0"
    with pytest.raises(ValueError, match=message):
        SolverScheduler(**SD, solver="dpmpp").set_timesteps(**call)


def test_bad_step():
    x = NOISE
    with pytest.raises(ValueError, match=r"returned shape \(2, 8, 8, 8\) for input \(2, 4, 8, 8\)"):
        ready(3).step(x.repeat(1, 2, 1, 1), 999, x)
    with pytest.raises(ValueError, match=r"model_output \(torch.int64 on cpu\) does not go with"):
        ready(3).step(x.long(), 999, x)
    with pytest.raises(ValueError, match=r"model_output .* on meta.* does not go with the sample .* on cpu"):
        ready(3).step(x.to("meta"), 999, x)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.int64"):
        ready(3).step(x, 999, x.long())
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        ready(3, "euler_ancestral").step(x, 999, x, generator=[gen()] * 3)
    with pytest.raises(ValueError, match="begin at 0 to 2, not at 3"):
        ready(3, begin=3).step(x, 999, x)
    with pytest.raises(ValueError, match="'unipc' has no option 'eta'"):
        ready(3, "unipc").step(x, 999, x, eta=1.0)


def test_learned_variance_is_left_out():
    outs = []
    for kind in (None, "learned_range"):
        scheduler = ready(4, variance_type=kind)
        x = NOISE
        for t in scheduler.timesteps:
            out = MODEL(x)
            x = scheduler.step(torch.cat([out, 9 * out], 1) if kind else out, t, x).prev_sample
        outs.append(x)
    assert torch.equal(*outs)


def test_looking_labels_up_one_by_one():
    """Code that calls `step` for single labels, as diffusers' common tests do: each lookup is a run of its own."""
    scheduler = ready(5)
    last = float(scheduler.timesteps[-1])
    outs = [scheduler.step(MODEL(NOISE), last, NOISE).prev_sample for _ in range(2)]
    assert torch.equal(*outs)
