"""`SolverScheduler.from_plan`: a saved plan in a diffusers pipeline, and where a plan comes from."""

import json
import re
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny_pipes as pipes
import torch
from tiny_pipes import SD, gen

import samplers
from samplers import Origin, Plan, RectifiedFlow, SolverScheduler, VPDiscrete, VPLinear, build_plan
from samplers.origin import points_of

SCHEDULE = VPDiscrete.scaled_linear()
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
NOISE = torch.randn(2, 4, 8, 8, generator=gen())
NUMBERS = {"n_fitted": 256, "n_heldout": 64, "fitted_error": 0.01, "heldout_error": 0.02, "classical_error": 0.04}


def origin(schedule=SCHEDULE, prediction="epsilon", **changed):
    known = {"method": "learned", "model": "sha256:0", "guidance": 3.0, "calls": 5, "seconds": 1.5, **NUMBERS}
    return Origin(schedule=points_of(schedule), prediction=prediction, **{**known, **changed})


def fitted(schedule=SCHEDULE, prediction="epsilon", solver="unipc", calls=5, **options):
    plan = build_plan(schedule, solver, calls, prediction=prediction, **options)
    return replace(plan, name="mine", origin=origin(schedule, prediction))


def loop(scheduler, x, first=0, **options):
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(0.9 * torch.tanh(1.3 * x + 0.1), t, x, **options).prev_sample
    return x


def quiet(plan, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return SolverScheduler.from_plan(plan, *args, **options)


CONFIGS = {"vp": (SCHEDULE, "epsilon", SD), "flow": (RectifiedFlow(3.0), "flow", FLOW)}


@pytest.mark.parametrize("known", [True, False], ids=["with the config", "without"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_scheduler_runs_the_plan(kind, known, tmp_path):
    """Step by step, and saved and loaded with its plan: what `Plan.run` gives, to the last bit."""
    schedule, prediction, config = CONFIGS[kind]
    plan = fitted(schedule, prediction)
    plan.save(tmp_path / "plan")
    scheduler = quiet(tmp_path / "plan", SolverScheduler(**config).config if known else None, guidance=3.0)
    expected = plan.run(lambda x, t: 0.9 * torch.tanh(1.3 * x + 0.1), NOISE)
    scheduler.save_pretrained(tmp_path / "scheduler")
    again = SolverScheduler.from_pretrained(tmp_path / "scheduler")
    for each in (scheduler, again, SolverScheduler.from_config(scheduler.config)):
        each.set_timesteps(5)
        assert torch.equal(loop(each, NOISE), expected)
        assert each.timesteps.tolist() == torch.tensor(plan.label, dtype=torch.float32).tolist()
        assert each.init_noise_sigma == 1.0 and each.fitted.origin == plan.origin
    assert again.config.plan == scheduler.config.plan and again.config.guidance == 3.0


def test_a_pipeline_with_a_plan(tmp_path):
    """The pipeline of a plan of the default rule paints what the rule itself paints; saved, it paints it again."""
    import diffusers

    rule = SolverScheduler(**SD, guidance=3.0)
    options = {**pipes.inputs(pipes.sd(rule)), "num_inference_steps": 5}

    def painted(pipe):
        return pipe(**options, generator=gen()).images

    expected = painted(pipes.sd(rule))
    rule.plan.save(tmp_path / "plan")
    pipe = pipes.sd(quiet(tmp_path / "plan", rule.config, guidance=3.0))
    assert torch.equal(painted(pipe), expected)
    pipe.save_pretrained(tmp_path / "pipe")
    none = dict.fromkeys(["safety_checker", "text_encoder", "tokenizer", "image_encoder", "feature_extractor"])
    again = pipes.quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", **none))
    torch.testing.assert_close(painted(again), expected)


def test_other_numbers_of_calls_name_both():
    scheduler = quiet(fitted(), SolverScheduler(**SD).config)
    for calls in (4, 20):
        with pytest.raises(ValueError, match=f"has 5 calls.*is {calls}.*num_inference_steps=5"):
            scheduler.set_timesteps(calls)
    with pytest.raises(ValueError, match=r"has 5 calls.*is 3"):
        scheduler.set_timesteps(sigmas=[9.0, 3.0, 1.0])
    with pytest.warns(UserWarning, match="not used"):
        scheduler.set_timesteps(timesteps=[999, 700, 500, 300, 100])
    assert scheduler.timesteps.tolist() != [999, 700, 500, 300, 100]
    with pytest.raises(ValueError, match="eta"):
        loop(scheduler, NOISE, eta=0.5)


@pytest.mark.parametrize("known", [True, False], ids=["with the config", "without"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_image_to_image_goes_through_the_last_calls(kind, known):
    """For the exact network of one image, x_0 = c, every run ends at c, from wherever it begins."""
    schedule, prediction, config = CONFIGS[kind]
    scheduler = quiet(fitted(schedule, prediction), SolverScheduler(**config).config if known else None)
    c = torch.full_like(NOISE, 0.3)
    for first in (0, 1, 3, 4):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(first)
        x = scheduler.add_noise(c, NOISE, scheduler.timesteps[first : first + 1])
        k, plan = first, scheduler.plan
        for t in scheduler.timesteps[first:]:
            alpha, sigma = plan.alpha[k], plan.sigma[k]
            eps = (x.double() - alpha * c) / sigma
            output = eps if prediction == "epsilon" else eps - c
            x = scheduler.step(output.float(), t, x).prev_sample
            k += 1
        torch.testing.assert_close(x, c, rtol=0, atol=1e-4)


def test_levels_between_the_calls_need_the_config():
    scheduler = quiet(fitted())
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"labels are 999.*config"):
        scheduler.add_noise(NOISE, NOISE, torch.tensor([500.0]))


def warned(plan, config, **options):
    with pytest.warns(UserWarning) as caught:
        SolverScheduler.from_plan(plan, config, **options)
    return [str(each.message) for each in caught]


def test_another_schedule_prediction_or_guidance_is_warned_of():
    config = SolverScheduler(**SD).config
    linear = SolverScheduler(**{**SD, "beta_schedule": "linear"}).config
    flow = SolverScheduler(**FLOW).config
    v = SolverScheduler(**SD, prediction_type="v_prediction").config
    for plan in (fitted(), replace(fitted(), origin=None)):
        quiet(plan, config)
        (message,) = warned(plan, linear)
        assert re.search("'mine'.*another noise schedule", message)
        assert len(warned(plan, flow)) == 2
        (message,) = warned(plan, v)
        assert re.search("'mine'.*'epsilon'.*'v_prediction'", message)
    (message,) = warned(fitted(), config, guidance=7.5)
    assert re.search(r"guidance 3,.* 7\.5", message)
    quiet(fitted(), config, guidance=3.0)
    quiet(fitted(RectifiedFlow(3.0), "flow"), SolverScheduler(**{**FLOW, "flow_shift": 7.0}).config)  # labels agree
    scheduler = SolverScheduler.from_plan(fitted(), v) if not warned(fitted(), v) else None
    assert scheduler is None


def test_a_plan_and_a_solver_exclude_each_other():
    config = quiet(fitted(), SolverScheduler(**SD, solver="heun", grid="karras").config).config
    assert config.solver is None and config.grid is None
    other = SolverScheduler.from_config(config, solver="ddim")
    assert other.config.plan is None and samplers.UniPC.from_config(config).config.plan is None
    for option in ({"solver": "ddim"}, {"grid": "karras"}, {"solver_options": {"order": 2}}, {"eta": 1.0}):
        with pytest.raises(ValueError, match="solver"):
            SolverScheduler(**SD, plan=config.plan, **option)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "x" * 100, '{"header": 1}', "[" * 100_000, 3, ["a"]])
def test_configs_with_something_else_for_a_plan(text):
    with pytest.raises(ValueError, match="plan"):
        SolverScheduler(**SD, plan=text)


def test_a_config_whose_plan_cannot_run():
    config = dict(quiet(fitted(), SolverScheduler(**SD).config).config)
    values = json.loads(config["plan"])
    for name, value in {
        "rows": [1.0],
        "t": [[]],
        "label": ["a"] * 5,
        "header": {"version": 3},
        "sigma": [0.0] * 6,
    }.items():
        with pytest.raises(ValueError, match="the config's plan"):
            SolverScheduler(**SD, plan=json.dumps({**values, name: value}))


def test_files_that_are_no_plans(tmp_path):
    (tmp_path / "x").write_bytes(b"pickle")
    for path in (tmp_path / "x", tmp_path / "missing"):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            SolverScheduler.from_plan(path)


# ---- the origin


def test_the_origin_is_saved_and_kept(tmp_path):
    settings = {"seed": 3, "text": "é", "share": 0.1, "on": True, "none": None}
    plan = replace(fitted(), origin=origin(settings=settings))
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again.origin == plan.origin and asdict(again.origin)["settings"] == settings
    assert np.array_equal(again.rows, plan.rows)
    for other in (plan.for_prediction("sample"), plan.to("cpu", torch.float32), replace(plan, name="x")):
        assert other.origin is plan.origin
    assert plan.for_prediction("sample").origin.prediction == "epsilon"  # of the network that it was fitted with


def test_a_plan_without_an_origin_is_of_version_1(tmp_path):
    from safetensors import safe_open

    for plan, version in ((build_plan(SCHEDULE, "ddim", 3), 1), (fitted(), 2)):
        plan.save(tmp_path / "plan")
        with safe_open(tmp_path / "plan", "np") as file:
            assert json.loads(file.metadata()["samplers_plan"])["version"] == version


def test_schedules_are_told_apart():
    mine = origin()
    assert mine.same_schedule(VPDiscrete(SCHEDULE.betas.astype(np.float32)))  # rounded as diffusers rounds
    for other in (VPDiscrete.scaled_linear(0.00085, 0.0121), VPLinear(), RectifiedFlow(3.0), samplers.EDM()):
        assert not mine.same_schedule(other)
    flow = origin(RectifiedFlow(3.0), "flow")
    assert flow.same_schedule(RectifiedFlow(1.0)) and not flow.same_schedule(RectifiedFlow(3.0, 500))


NAN = float("nan")
WRONG = [
    *({"method": value} for value in (None, 3, "a\nb", "x" * 201)),
    *({"model": value} for value in (None, b"x", "\x1b[2J")),
    *({"prediction": value} for value in ("banana", None, ["epsilon"])),
    *({"calls": value} for value in (2.0, -1, True, "5", 2**40)),
    *({"guidance": value} for value in (NAN, "3", None, True, 1e300, 10**400)),
    *({"heldout_error": value} for value in (NAN, -1.0, float("inf"), [1])),
    *(
        {"schedule": value}
        for value in ([], [[1]], 3, [["a", "b"]], [[1.0, NAN]], [[1, 2, 3]], [[1.0, 2.0]] * 21, None)
    ),
    *({"settings": value} for value in (None, [], {"a": [1]}, {"a": NAN}, {"a": "x" * 201}, {1: 2}, {"a": {"b": 1}})),
    {"settings": {str(i): i for i in range(41)}},
]


@pytest.mark.parametrize("changed", WRONG, ids=[f"{next(iter(c))}-{i}" for i, c in enumerate(WRONG)])
def test_an_origin_of_other_values_is_refused(changed, tmp_path):
    values = {**origin().plain(), **changed}
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"origin's {name} must be"):
        Origin.of(values)
    if changed not in ({"model": b"x"}, {"settings": {1: 2}}):  # which JSON has not: the same from a file
        from test_plan_files import ABOUT, put

        about = json.dumps({**ABOUT, "version": 2, "origin": values})
        with pytest.raises(ValueError, match=r"x\.plan': ") as caught:
            Plan.load(put(tmp_path / "x.plan", about))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_headers_of_version_2(tmp_path):
    from test_plan_files import ABOUT, put

    good = origin().plain()
    assert Plan.load(put(tmp_path / "x", {**ABOUT, "version": 2, "origin": good})).origin == origin()
    lacking = {name: value for name, value in good.items() if name != "model"}
    for wrong in (None, 3, [], {}, lacking, {**good, "more": 1}, {**good, "settings": {"a" * 100: "b" * 9_900}}):
        with pytest.raises(ValueError, match="x'"):
            Plan.load(put(tmp_path / "x", {**ABOUT, "version": 2, "origin": wrong}))
    for about in ({**ABOUT, "origin": good}, {**ABOUT, "version": 3, "origin": good}):
        with pytest.raises(ValueError, match="version"):
            Plan.load(put(tmp_path / "x", about))


def test_an_origin_that_would_not_be_read_is_not_written(tmp_path):
    large = {f"{i}{'n' * 190}": "v" * 190 for i in range(40)}
    with pytest.raises(ValueError, match="characters"):
        replace(fitted(), origin=origin(settings=large)).save(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
    with pytest.raises(ValueError, match="origin must be"):
        replace(fitted(), origin={"method": "x"})
