"""A calibration from beginning to end on a mixture whose errors are known, and what is refused."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from samplers import RectifiedFlow, VPDiscrete, build_plan, default_solver
from samplers.calibrate import METHODS, Batch, Problem, errors, fit, ratio, reference

SD = VPDiscrete.scaled_linear()


def batch(mixture, n, seed, schedule=SD, prediction="epsilon"):
    model = mixture.model(schedule) if prediction == "epsilon" else mixture.model(schedule, prediction)
    noise = torch.randn(n, 1, 1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(model, noise, reference(model, noise, schedule, prediction, 60))


@pytest.fixture(scope="module")
def problem(mixture):
    return Problem(SD, "epsilon", (batch(mixture, 48, 1), batch(mixture, 16, 2)), (batch(mixture, 32, 3),), 1.0)


def rms(values):
    return np.sqrt(np.mean(values**2))


def test_every_number_is_what_an_independent_run_gives(problem):
    done = []
    found = fit(problem, "classical", 5, progress=lambda *at: done.append(at), model="sha256:0", settings={"seed": 3})
    plan, origin = found.plan, found.plan.origin
    for part, errors_of, number in (("fitting", found.fitted, 64), ("heldout", found.heldout, 32)):
        each = [(plan.run(b.model, b.noise) - b.target).flatten(1).norm(dim=1) / 2**0.5 for b in getattr(problem, part)]
        np.testing.assert_allclose(errors_of, torch.cat(each), rtol=1e-9)
        assert len(errors_of) == number
    assert (origin.method, origin.model, origin.calls, origin.guidance) == ("classical", "sha256:0", 5, 1.0)
    assert (origin.n_fitted, origin.n_heldout, origin.prediction) == (64, 32, "epsilon")
    assert origin.fitted_error == pytest.approx(rms(found.fitted))
    assert origin.heldout_error == origin.classical_error == pytest.approx(rms(found.heldout))
    rule = build_plan(SD, None, 5)
    np.testing.assert_allclose(found.default, errors(rule, problem.heldout), rtol=1e-9)
    assert origin.settings["default_error"] == pytest.approx(rms(found.default)) and origin.settings["seed"] == 3
    assert done[-1][0] == done[-1][1] == len(done) and origin.same_schedule(SD) and origin.seconds > 0


def test_classical_is_the_best_on_the_fitted_samples_alone(problem):
    plan = METHODS["classical"](problem, 6)
    mine = rms(errors(plan, problem.fitting))
    for solver, options in {"ddim": {}, "dpmpp": {"order": 2}, "unipc": {"order": 2}, None: {}}.items():
        assert mine <= rms(errors(build_plan(SD, solver, 6, **options), problem.fitting)) + 1e-12
    elsewhere = replace(problem.heldout[0], target=torch.zeros_like(problem.heldout[0].target))
    blind = replace(problem, heldout=(elsewhere,))  # the choice must not look there
    assert METHODS["classical"](blind, 6).name == plan.name
    assert len(METHODS["classical"](problem, 1)) == 1


def test_a_flow_has_candidates_too(mixture):
    flow = RectifiedFlow(3.0)
    batches = tuple(batch(mixture, 8, seed, flow, "flow") for seed in (1, 2))
    with pytest.warns(UserWarning, match="8 samples"):
        found = fit(Problem(flow, "flow", batches[:1], batches[1:]), "classical", 6)
    assert found.plan.prediction == "flow" == found.plan.origin.prediction
    assert found.plan.origin.heldout_error < rms(errors(build_plan(flow, "ddim", 6, prediction="flow"), batches[1:]))


def test_few_samples_are_warned_of_with_the_error_to_expect(mixture):
    few = Problem(SD, "epsilon", (batch(mixture, 4, 1),), (batch(mixture, 16, 2),))
    with pytest.warns(UserWarning) as caught:
        found = fit(few, "classical", 4)
    assert f"{found.plan.origin.heldout_error:.4g}" in str(caught[0].message) and "4 samples" in str(caught[0].message)
    many = Problem(SD, "epsilon", (batch(mixture, 64, 1),), (batch(mixture, 64, 2),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(many, "classical", 4)


def test_a_plan_that_is_worse_than_a_classical_one_is_warned_of_with_both_errors(problem):
    with pytest.warns(UserWarning) as caught:
        found = fit(problem, lambda problem, calls: build_plan(SD, "ddim", calls, "time"), 5)
    said, origin = " ".join(str(each.message) for each in caught), found.plan.origin
    assert origin.heldout_error > origin.classical_error
    assert f"{origin.heldout_error:.4g}" in said and f"{origin.classical_error:.4g}" in said


def test_methods_that_are_none(problem):
    with pytest.raises(ValueError, match=r"clasical.*'classical'"):
        fit(problem, "clasical", 5)
    for method in (lambda problem, calls: None, lambda problem, calls: build_plan(SD, "ddim", calls + 1)):
        with pytest.raises(ValueError, match="not a plan of 5 calls"):
            fit(problem, method, 5)
    with pytest.raises(ValueError, match="at least 1"):
        fit(problem, "classical", 0)


def test_a_model_that_fails_names_the_call(problem):
    bad = Batch(lambda x, t: x / 0.0, problem.heldout[0].noise, problem.heldout[0].target)
    with pytest.raises(FloatingPointError, match="call 0 of 5"):
        fit(Problem(SD, "epsilon", problem.fitting, (bad,)), lambda problem, calls: build_plan(SD, "ddim", calls), 5)


def test_the_ratio_and_its_interval():
    draw = np.random.default_rng(1)
    other = draw.uniform(1, 2, 4000)
    one = other * draw.choice([0.3, 0.5], 4000)
    value, low, high = ratio(one, other)
    assert value == pytest.approx(rms(one) / rms(other)) and low < value < high and high - low < 0.02
    # all samples of a group alike: the interval is that of the groups, sqrt(40) times as wide
    groups = np.repeat(np.arange(100), 40)
    alike = np.repeat(one[:100] / other[:100], 40)
    wide, narrow = (np.diff(ratio(alike, np.ones(4000), by)[1:])[0] for by in (groups, None))
    assert wide / narrow == pytest.approx(40**0.5, rel=0.15)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_reference_takes_the_solver_of_the_guidance(guidance):
    """At 7.5 a trained model's references of order 4 were off by 0.4: high orders need weak guidance."""
    z = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(x, label):
        return torch.tanh(2 * x) + 0.001 * float(label)

    found = reference(model, z, SD, "epsilon", 20, guidance)
    rule = default_solver(19, guidance, SD, images=True)
    low = rule.solver(rule.grid, 19, **rule.options).run(model, z, prediction="epsilon")
    alpha, sigma = (float(value(SD.t_min)) for value in (SD.alpha, SD.sigma))
    expected = (low - sigma * model(low, SD.model_time(SD.t_min))) / alpha
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (rule.solver.__name__, rule.options["order"]) == {1.0: ("abm", 3), 7.5: ("ipndm", 2)}[guidance]
