"""The bench of calibrated plans, on its smallest cell: nothing is computed twice, and a ratio is what it says."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import bench_calibrated
import numpy as np
import pytest
import torch
from calibrated_bench import cells, methods, references, report, worlds
from calibrated_bench.store import content_of, read_entries, write_entry
from sampler_bench import problems, theirs

from diffpo.common.rng import generator
from samplers import VPDiscrete, build_plan
from samplers.calibrate import baseline, errors, reference

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
    assert len(list(tmp_path.glob("*/cell-4/calibrated-*.json"))) == 1


def test_runs_that_share_a_cell_keep_each_others_entries(tmp_path):
    folder, where = tmp_path / "cell-4", {"model": "m", "guidance": 3.0, "calls": 4}
    names = [f"family {i}" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: write_entry(folder, "uncalibrated", name, {"select": 1.0}, where), names))
    write_entry(folder, "calibrated", "family 0", {"failed": "no"}, where)
    found = read_entries(folder)
    assert set(found["uncalibrated"]) == set(names) and found["calls"] == 4
    assert found["calibrated"] == {"family 0": {"failed": "no"}}


def test_targets_of_another_number_of_calls_are_others(tmp_path, monkeypatch):
    """A plan that was fitted to the old targets is not taken for one of the new ones either."""
    world = worlds.world("gmm2a", 3.0, worlds.Options())
    found, plans = [], []
    for calls in (12, 40):
        monkeypatch.setattr(references, "REFERENCE_CALLS", calls)
        monkeypatch.setattr(cells, "REFERENCE_CALLS", calls)
        monkeypatch.setattr(references, "reference", partial(reference, calls=calls))
        made = references.References(world, tmp_path)
        assert made.missing("fit", 4) == [(0, 4)]
        made.compute("fit", 4)
        found.append(made.exact("fit", 0, 4)["zero"])
        plans.append(cells.Cell(world, 4, tmp_path, cells.Sizes()).plan_path("settled", settled))
    assert not torch.equal(*found) and plans[0] != plans[1]


def test_with_few_rivals_the_best_on_training_prompts_are_measured(made, tmp_path):
    arguments = "--models gmm2a --guidance 3 --calls 4 --prompts 4 --select 4".split()
    arguments += ["--methods", "default rule", "samplers", "diffusers"]
    chosen = {}
    for rivals in ([], ["--rivals", "1"]):
        out = tmp_path / str(len(rivals))
        bench_calibrated.main([*arguments, *rivals, "--out", str(out)])
        (cell,) = report.cells(out, report.Selected(["gmm2a"], [3.0], [4], [], 4))
        chosen[len(rivals)] = cell.about["uncalibrated"]
    least = min(chosen[0], key=lambda family: chosen[0][family]["select"])
    assert chosen[2] == {family: chosen[0][family] for family in {least, "default rule"}}
    assert len(chosen[0]) > 3


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
