"""Learned plans on a mixture whose score has a closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from samplers import Plan, build_plan
from samplers.analytic import GaussianMixture
from samplers.calibrate import Batch, GaussNewton, Problem, errors, learned, reference
from samplers.calibrate.learn import Numbers, combined, result
from samplers.schedule import RectifiedFlow, Schedule, VPDiscrete

VP, FLOW = VPDiscrete.scaled_linear(), RectifiedFlow()
STARTS = [(VP, "epsilon", "ipndm", "karras"), (FLOW, "flow", "dpmpp", "time"), (VP, "sample", "abm", "logsnr")]


def mixture() -> GaussianMixture:
    rng = np.random.default_rng(5)
    return GaussianMixture([0.2, 0.5, 0.3], rng.uniform(-1, 1, (3, 8)), rng.uniform(0.1, 0.4, (3, 8)), [0, 1, 0])


def batch(schedule: Schedule, prediction: str, seed: int, size: int = 32) -> Batch:
    noise = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = mixture().model(schedule, prediction, torch.arange(size) % 2, 2.0)
    return Batch(model, noise, reference(model, noise, schedule, prediction, 40))


def problem(schedule: Schedule, prediction: str, batches: int = 5, size: int = 32) -> Problem:
    fitting = tuple(batch(schedule, prediction, i, size) for i in range(batches))
    return Problem(schedule, prediction, fitting, (batch(schedule, prediction, 100, 64),), 2.0)


@pytest.mark.parametrize("schedule, prediction, solver, grid", STARTS[:2])
def test_a_learned_plan_is_at_least_twice_as_accurate_on_new_noises(schedule, prediction, solver, grid):
    cases = problem(schedule, prediction)
    start = build_plan(schedule, solver, 5, grid, prediction, order=2)
    plan = learned(cases, 5, start)
    before, after = errors(start, cases.heldout), errors(plan, cases.heldout)
    assert len(plan) == 5
    assert np.median(after) < 0.5 * np.median(before)


@pytest.mark.parametrize("schedule, prediction, solver, grid", STARTS)
def test_the_numbers_of_a_classical_plan_are_that_plan(schedule, prediction, solver, grid):
    start = build_plan(schedule, solver, 6, grid, prediction, order=2)
    numbers = Numbers.of(start, schedule)
    assert numbers.size == 6 * 11 // 2 + 1  # n (n + 5) / 2, and one gap more, since only their shares count
    same = numbers.plan(np.zeros(numbers.size), "same")
    case = batch(schedule, prediction, 0)
    expected = start.run(case.model, case.noise)
    np.testing.assert_allclose(same.label, start.label, atol=1e-8)
    torch.testing.assert_close(same.run(case.model, case.noise), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result(numbers, np.zeros(numbers.size), case), expected, rtol=1e-9, atol=1e-9)


def test_without_iterations_the_plan_is_the_start():
    cases = problem(VP, "epsilon", 2, 4)
    start = build_plan(VP, "unipc", 4, prediction="epsilon")
    assert learned(cases, 4, start, GaussNewton(iterations=0)) is start


def test_derivatives_per_sample_are_those_of_finite_differences():
    case = batch(FLOW, "flow", 3, 4)
    numbers = Numbers.of(build_plan(FLOW, "ipndm", 4, "beta", "flow", order=2), FLOW)
    delta = 0.02 * np.random.default_rng(0).standard_normal(numbers.size)
    delta[0] = -2.0  # away from the most noise, where the first call's label is cut off
    changes = torch.zeros(4, numbers.size, dtype=torch.float64, requires_grad=True)
    found = result(numbers, delta, case, changes)
    by_sample = torch.autograd.grad(found.sum(), changes)[0].numpy()
    for i in range(numbers.size):
        move = np.zeros(numbers.size)
        move[i] = 1e-5
        ends = [result(numbers, delta + sign * move, case).flatten(1).sum(1).numpy() for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / 2e-5
        if i < len(numbers.gaps):  # the label's derivative is a secant over half a percent of the labels
            np.testing.assert_allclose(by_sample[:, i], expected, atol=0.05 * np.abs(by_sample).max())
        else:
            np.testing.assert_allclose(by_sample[:, i], expected, rtol=1e-6, atol=1e-7)


def test_a_saved_plan_gives_the_same_result(tmp_path):
    cases = problem(VP, "epsilon", 2)
    plan = learned(cases, 4, build_plan(VP, "ipndm", 4, "karras", order=2), GaussNewton(iterations=8))
    plan.save(tmp_path / "plan.safetensors")
    case = cases.heldout[0]
    again = Plan.load(tmp_path / "plan.safetensors").run(case.model, case.noise)
    torch.testing.assert_close(again, plan.run(case.model, case.noise), rtol=0, atol=0)


def test_the_fit_does_not_look_at_the_held_out_noises():
    cases = problem(FLOW, "flow", 2, 8)
    start = build_plan(FLOW, "dpmpp", 4, "time", "flow")
    other = replace(cases, heldout=(batch(FLOW, "flow", 200, 8),))
    one, two = (learned(each, 4, start, GaussNewton(iterations=6)) for each in (cases, other))
    np.testing.assert_array_equal(one.rows, two.rows)
    np.testing.assert_array_equal(one.t, two.t)


@pytest.mark.parametrize(
    "calls, start, wrong",
    [
        (4, build_plan(VP, "ipndm", 5), "makes 5 calls, not 4"),
        (4, build_plan(VP, "ddim", 4, eta=1.0), "adds noise"),
    ],
)
def test_a_start_that_cannot_be_fitted_is_refused(calls, start, wrong):
    with pytest.raises(ValueError, match=wrong):
        learned(problem(VP, "epsilon", 2, 2), calls, start)


def test_one_fitting_batch_is_refused():
    with pytest.raises(ValueError, match="at least two fitting batches"):
        learned(problem(VP, "epsilon", 1, 2), 4)


def test_a_model_without_gradient_is_refused():
    cases = problem(VP, "epsilon", 2, 2)
    frozen = tuple(replace(each, model=torch.no_grad()(each.model)) for each in cases.fitting)
    with pytest.raises(ValueError, match="no gradient by its input"):
        learned(replace(cases, fitting=frozen), 3, build_plan(VP, "ddim", 3), GaussNewton(iterations=1))


def test_combined_rows_give_every_input_of_the_plan():
    plan, case = build_plan(VP, "abm", 6, order=3), batch(VP, "epsilon", 0, 4)
    inputs, outputs = [], []
    state = plan.begin(case.noise)
    for k in range(6):
        outputs.append(case.model(state.input, plan.label[k]))
        state = plan.step(k, state, outputs[-1])
        inputs.append(state.input)
    values = torch.stack([case.noise, *outputs])
    torch.testing.assert_close(
        torch.tensordot(torch.from_numpy(combined(plan)), values, 1), torch.stack(inputs), rtol=1e-9, atol=1e-9
    )
