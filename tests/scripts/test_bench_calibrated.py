"""The bench of calibrated plans, on its smallest cell: nothing is computed twice, and a ratio is what it says."""

import json

import bench_calibrated
import numpy as np
import pytest
import torch
from calibrated_bench import methods, report, worlds
from calibrated_bench.store import content_of
from sampler_bench import problems, theirs

from diffpo.common.rng import generator
from samplers import VPDiscrete, build_plan
from samplers.calibrate import baseline, errors

SETTINGS = ("DDIM trailing to_one=True", "UniPCMultistep linspace o2 bh2 end=sigma_min", "EulerDiscrete karras")


def settled(problem, calls):
    """A method of calibration, for the test."""
    plan = build_plan(problem.schedule, "dpmpp", calls, order=2)
    assert np.isfinite(errors(plan, problem.fitting)).all()
    return plan


@pytest.fixture
def made(monkeypatch):
    """Few methods; the list gets the batch size of every model call."""
    calls, model = [], problems.Problem.model
    every = {name: method for name, method in theirs.methods().items() if name in SETTINGS}

    def counted(self, x, label):
        calls.append(len(x))
        return model(self, x, label)

    monkeypatch.setattr(problems.Problem, "model", counted)
    monkeypatch.setattr(theirs, "methods", lambda prediction: every)
    monkeypatch.setattr(methods, "CLASSICAL", (("dpmpp", {"order": 2}),))
    monkeypatch.setattr(methods, "COMFYUI", ())
    monkeypatch.setattr(methods, "DUALFAST", ())
    monkeypatch.setattr(methods, "METHODS", {"settled": settled, "classical": baseline})
    return calls


def test_a_cell_end_to_end(made, tmp_path, capsys):
    arguments = "--models gmm2a --guidance 3 --calls 4 --prompts 6 --select 4 --fit 8".split()
    arguments += ["--out", str(tmp_path), "--methods", "default rule", "samplers", "diffusers", "settled"]
    bench_calibrated.main(arguments)
    assert sum(made) > 0
    spent = len(made)
    bench_calibrated.main(arguments)
    assert len(made) == spent  # all is cached
    bench_calibrated.main([*arguments, "--prompts", "8"])
    assert set(made[spent:]) == {2}  # the two new samples of each method alone

    # the ratio of the rule to a diffusers scheduler, without the bench's code for batches, caches and errors
    (cell,) = report.cells(tmp_path, report.Selected(["gmm2a"], [3.0], [4], [], 8))
    schedule, mixture = VPDiscrete.scaled_linear(), problems.MIXTURES["gmm2a"]()
    draws = [torch.randn(2, generator=generator(0, "calibrated bench heldout", i)) for i in range(8)]
    z, classes = torch.stack(draws).double() * schedule.init_scale, torch.arange(8) % 2
    model = mixture.model(schedule, "epsilon", classes, 3.0)
    exact = {end: mixture.exact(schedule, z, None, t, classes, 3.0) for end, t in (("zero", 0), ("t_end", None))}
    rule = build_plan(schedule, None, 4, guidance=3.0).run(model, z) - exact["zero"]
    named = cell.about["uncalibrated"]["diffusers UniPCMultistep"]["name"]

    class Plain:
        prediction = "epsilon"

    Plain.z, Plain.model = z, staticmethod(model)
    x, end = theirs.run(*theirs.settings()[named], Plain, 4)
    other = x - exact[end]
    value, low, high = cell.ratio("default rule", "diffusers UniPCMultistep")
    assert value == pytest.approx(float(rule.norm() / other.norm()), rel=1e-5)
    assert low <= value <= high
    middle = cell.median_ratio("default rule", "diffusers UniPCMultistep")[0]
    assert middle == pytest.approx(np.median(rule.norm(dim=1)) / np.median(other.norm(dim=1)), rel=1e-5)

    # chosen on other prompts than those that are reported
    chosen = cell.about["uncalibrated"]
    assert cell.rival == min(chosen, key=lambda family: chosen[family]["select"])
    cost = cell.about["calibrated"]["settled"]
    assert cost["calls"] == 4 * 4  # four batches, four calls; measuring the plan does not count
    assert cost["samples"] == 2 * cost["calls"]  # of two samples each
    capsys.readouterr()
    bench_calibrated.main([*arguments, "--prompts", "8", "--table"])
    text = capsys.readouterr().out
    assert f"{cell.rmse(cell.rival):.4f}" in text and "nothing" in text.split("Missing:")[1]
    assert len(json.loads(next(tmp_path.glob("*/cell-4.json")).read_text())["calibrated"]) == 1


def test_splits_share_no_prompt_and_no_noise():
    world = worlds.world("gmm2a", 3.0, worlds.Options())
    select, heldout = (world.part(split, 0, 4).z for split in ("select", "heldout"))
    assert not torch.isclose(select, heldout).any()
    assert torch.equal(world.part("heldout", 2, 2).z, heldout[2:])


def test_a_plans_content_is_its_numbers():
    schedule = VPDiscrete.scaled_linear()
    one, same = (build_plan(schedule, name, 4, "karras", **options) for name, options in EQUAL)
    assert one.name == same.name and content_of(one) == content_of(same)
    assert content_of(one) != content_of(build_plan(schedule, "dpmpp", 4, "time", order=2))


EQUAL = (("dpmpp_2m", {}), ("dpmpp", {"order": 2, "lower_order_final": False}))
