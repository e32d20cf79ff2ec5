"""`diffpo calibrate` and its plans: the model that is fitted to is the pipeline's, and bad input is named."""

import hashlib
import importlib
import json
import re
import shutil
import sys
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch

import samplers
from diffpo import cli
from diffpo.commands import calibrate, calibration_problem, products
from diffpo.commands.calibrate import Calibration, Samples, split
from diffpo.common.errors import DiffpoError
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from samplers.calibrate import METHODS

SIDE = 16  # pixels
WORDS = {"dit": ("1", "207")}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Few reference calls and few classical plans: samplers' own tests have all of them."""
    monkeypatch.setattr(calibration_problem, "REFERENCE_CALLS", 12)
    candidates = importlib.import_module("samplers.calibrate.baseline")  # not the function of that name
    monkeypatch.setattr(candidates, "CLASSICAL", candidates.CLASSICAL[:2])
    monkeypatch.setattr(candidates, "GRIDS", candidates.GRIDS[:2])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"a cat {i}" for i in range(6)))
    return path


def call(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diffpo", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def made(model, prompts, out, **options):
    """A plan of 3 calls at guidance 2."""
    small = {"calls": 3, "guidance": 2.0, "n": 4, "heldout": 2, "method": "classical", "device": "cpu"}
    return calibrate.run(Calibration(str(model), str(prompts), out, **{**small, **options}))


@pytest.fixture(scope="module")
def plan_file(tiny_sd, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_problem, "REFERENCE_CALLS", 12)
        made(tiny_sd, prompts, out)
    return out


class Bar:
    """Counts in place of a progress bar."""

    def __init__(self, total):
        self.total, self.n = total, 0

    def update(self, by=1):
        self.n += by

    def close(self):
        assert self.n == self.total


def latents_of(pipe, options, noise, calls):
    """What the pipeline makes of the noise, before its VAE."""
    seen = []

    def watch(pipe, i, t, given):
        seen.append(given["latents"])
        return given

    if "callback_on_step_end" not in pipe.__call__.__code__.co_varnames:
        step = pipe.scheduler.step

        def stepped(*args, **kwargs):
            found = step(*args, **kwargs)
            seen.append(found[0] if isinstance(found, tuple) else found.prev_sample)
            return found

        pipe.scheduler.step = stepped
        watch = None
    extra = {} if watch is None else {"callback_on_step_end": watch}
    with torch.no_grad():
        pipe(**options, num_inference_steps=calls, output_type="pt", **extra)
    return seen[-1]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "flux", "dit"])
def test_the_model_that_is_fitted_to_is_the_pipelines(tiny_folder, tmp_path, name, guidance):
    """A plan run on the problem's model ends where the pipeline ends with this plan, from the same noise."""
    one, other = WORDS.get(name, ("a red cat", "a dog"))
    arm = Generation(tiny_folder(name), guidance=guidance, steps=3, batch_size=2, device="cpu")
    bars = []
    problem = calibration_problem.make_problem(
        arm, Samples((one, other), (other,)), lambda total: bars.append(Bar(total)) or bars[0], SIDE
    ).problem
    assert bars[0].n == 2 * 12 and len(problem.fitting) == len(problem.heldout) == 1
    plan = samplers.build_plan(problem.schedule, None, 3, prediction=problem.prediction, guidance=guidance)
    batch = problem.fitting[0]
    ours = plan.run(batch.model, batch.noise)
    plan.save(tmp_path / "plan")
    pipe = generate.load(replace(arm, plan=tmp_path / "plan"))
    family = generate.models.family_class(generate._base(arm), type(pipe).__name__)
    options = family.painting(pipe, [one, other], None, batch.noise, guidance)
    if "latents" not in options:  # DiT draws them itself: one after the other from these generators
        draws = [calibration_problem.generator(arm.seed, "calibrate", i) for i in range(2)]
        options["generator"] = draws
    theirs = latents_of(pipe, options, batch.noise, 3)
    if name == "dit" and guidance > 1:
        theirs = theirs.chunk(2)[0]
    if name == "flux":
        from diffpo.models.packed import unpack

        theirs = unpack(theirs, *batch.noise.shape[-2:])
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert (ours - batch.noise).abs().max() > 0.1


def test_the_help_names_every_method():
    about = typing.get_type_hints(products.calibrate, include_extras=True)["method"].__metadata__[0].help
    assert all(name in about for name in METHODS)


def test_a_calibration_writes_a_plan_that_says_where_it_comes_from(tiny_sd, prompts, plan_file, capsys):
    plan = samplers.Plan.load(plan_file)
    origin = plan.origin
    assert (len(plan), origin.calls, origin.guidance, origin.method) == (3, 3, 2.0, "classical")
    assert (origin.n_fitted, origin.n_heldout, origin.prediction) == (4, 2, "epsilon")
    assert origin.model == generate.models.source_of(generate.models.named(str(tiny_sd))).fingerprint()
    assert origin.settings["prompts"] == "prompts.txt" and origin.settings["lora_hash"] is None


def test_the_command_prints_a_table_and_warns_of_few_samples(monkeypatch, tiny_sd, prompts, tmp_path, capsys):
    out = tmp_path / "new" / "plan.safetensors"
    words = ["--model", tiny_sd, "--prompts", prompts, "--out", out, "--n", 4, "--heldout", 2, "--calls", 2]
    assert call(monkeypatch, "calibrate", *words, "--method", "classical", "--device", "cpu") == 0
    said = capsys.readouterr().out
    origin = samplers.Plan.load(out).origin
    for number in (origin.fitted_error, origin.heldout_error, origin.settings["default_error"]):
        assert f"{number:.4g}" in said
    assert re.search(r"warning: .*4 samples", said) and str(out) in said
    # an old file is never written over, and that is said before the model is loaded
    before = out.read_bytes()
    assert call(monkeypatch, "calibrate", *words) == 2
    assert "exists already" in capsys.readouterr().err and out.read_bytes() == before


def test_prompts_are_split_without_overlap(prompts):
    texts = prompts.read_text().split("\n")
    for n, heldout, seed in ((4, 2, 0), (256, 64, 1), (1, 1, 2), (3, 64, 0)):
        found = split([*texts, texts[0]], Calibration("m", "p", "o", n=n, heldout=heldout, seed=seed))
        assert len(found.fitting) == n and len(found.heldout) == heldout
        assert not set(found.fitting) & set(found.heldout) and set(found.fitting + found.heldout) <= set(texts)
    assert split(texts, Calibration("m", "p", "o")) != split(texts, Calibration("m", "p", "o", seed=1))
    with pytest.raises(DiffpoError, match="at least 2"):
        split(["a cat", "a cat"], Calibration("m", "p", "o"))


def test_a_model_that_returns_nan_is_named_with_prompt_and_call(tiny_sd, prompts, tmp_path, monkeypatch):
    from diffpo.models.sd import StableDiffusion

    predict, count = StableDiffusion.predict, []

    def broken(self, *args):
        count.append(1)
        out = predict(self, *args)
        if len(count) == 5:
            out[-1, 0, 0, 0] = float("nan")  # the last sample with its prompt
        return out

    monkeypatch.setattr(StableDiffusion, "predict", broken)
    with pytest.raises(DiffpoError, match=r"prompt 'a cat \d' is not finite in call 5 of the reference \(timestep"):
        made(tiny_sd, prompts, tmp_path / "plan", batch_size=4)
    assert not (tmp_path / "plan").exists()


def test_a_method_that_fails_or_is_unknown(tiny_sd, prompts, tmp_path, monkeypatch):
    with pytest.raises(DiffpoError, match="did you mean classical"):
        made(tiny_sd, prompts, tmp_path / "plan", method="clasical")
    monkeypatch.setitem(METHODS, "two", lambda problem, calls: samplers.build_plan(problem.schedule, "ddim", 2))
    with pytest.raises(DiffpoError, match="2 calls, not a plan of 3 calls"):
        made(tiny_sd, prompts, tmp_path / "plan", method="two")
    for name in ("calls", "n", "heldout"):
        with pytest.raises(DiffpoError, match=name):
            made(tiny_sd, prompts, tmp_path / "plan", **{name: 0})


# ---- in generate and eval


def rows(model, plan, out, **options):
    given = {"guidance": 2.0, "device": "cpu", **options}
    return generate.run(Generation(model, plan=plan, **given).arms(), ["a dog"], out)


def test_pictures_by_a_plan_and_what_the_manifest_says(tiny_sd, plan_file, tmp_path):
    (row,) = rows(tiny_sd, plan_file, tmp_path / "a")
    assert (row["steps"], row["solver"], row["plan"]) == (3, None, str(plan_file))
    assert row["plan_hash"] == hashlib.sha256(plan_file.read_bytes()).hexdigest()
    saved = json.loads((tmp_path / "a" / "manifest.jsonl").read_text())
    assert {key: saved[key] for key in row} == row
    # the same file under another name continues the folder, another plan does not
    shutil.copy(plan_file, tmp_path / "copy")
    assert rows(tiny_sd, tmp_path / "copy", tmp_path / "a")[0]["plan"] == str(plan_file)
    samplers.build_plan(samplers.VPDiscrete.scaled_linear(), "ddim", 3).save(tmp_path / "other")
    with pytest.raises(DiffpoError, match="plan_hash"):
        rows(tiny_sd, tmp_path / "other", tmp_path / "a")
    (alike,) = rows(tiny_sd, tmp_path / "other", tmp_path / "b")
    assert alike["sha256"] != row["sha256"]
    (solver,) = generate.run(
        Generation(tiny_sd, solver="ddim", steps=3, guidance=2.0, device="cpu").arms(), ["a dog"], tmp_path / "c"
    )
    assert alike["sha256"] == solver["sha256"]  # a classical plan is its solver


def test_a_plan_of_another_model_is_refused_unless_asked_for(tiny_sd_v, plan_file, tmp_path, capsys):
    with pytest.raises(DiffpoError, match=r"another model, sha256:.*--any-model"):
        rows(tiny_sd_v, plan_file, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert len(rows(tiny_sd_v, plan_file, tmp_path / "a", any_model=True)) == 1
    assert re.search("warning: .*predicts 'epsilon'.*'v_prediction'", capsys.readouterr().out)


def test_another_guidance_is_warned_of(tiny_sd, plan_file, tmp_path, capsys):
    rows(tiny_sd, plan_file, tmp_path / "a", guidance=7.5)
    assert re.search(r"warning: .*guidance 2\b.*7\.5", capsys.readouterr().out)
    rows(tiny_sd, plan_file, tmp_path / "b")
    assert "warning" not in capsys.readouterr().out


def test_another_number_of_calls_or_a_solver_is_refused(tiny_sd, plan_file, tmp_path):
    with pytest.raises(DiffpoError, match=r"3 model calls.*--steps is 8"):
        rows(tiny_sd, plan_file, tmp_path / "a", steps=8)
    with pytest.raises(DiffpoError, match="--solver"):
        rows(tiny_sd, plan_file, tmp_path / "a", solver="ddim")
    assert len(rows(tiny_sd, plan_file, tmp_path / "a", steps=3)) == 1


def test_files_that_are_no_plans(tiny_sd, plan_file, tmp_path):
    weights = next((tiny_sd / "unet").glob("*.safetensors"))
    (tmp_path / "cut").write_bytes(plan_file.read_bytes()[:-8])
    (tmp_path / "half").write_bytes(plan_file.read_bytes()[:200])
    for path in (weights, tmp_path / "cut", tmp_path / "half", tmp_path / "missing", tmp_path):
        with pytest.raises(DiffpoError, match=f"--plan {re.escape(repr(str(path)))}: .*diffpo calibrate"):
            rows(tiny_sd, path, tmp_path / "a")


def test_eval_takes_a_plan_and_both_arms_use_it(monkeypatch, tiny_sd, plan_file):
    given = []
    monkeypatch.setattr(generate, "run", lambda *values: given.append(values) or [])
    words = ["--model", tiny_sd, "--prompts", "p", "--out", "o", "--plan", plan_file, "--lora", "l", "--any-model"]
    assert call(monkeypatch, "generate", *words) == 0
    arms = given[0][0]
    assert {arm.plan for arm in arms.values()} == {str(plan_file)} and all(arm.any_model for arm in arms.values())
    assert all(arm.steps is None for arm in arms.values())


def test_a_plan_fitted_with_a_lora_notes_it(tiny_sd, prompts, tmp_path, trained):
    folder, _ = trained("sd")
    found = made(tiny_sd, prompts, tmp_path / "plan", lora=str(folder))
    base = made(tiny_sd, prompts, tmp_path / "base")
    assert found.plan.origin.model == base.plan.origin.model
    assert found.plan.origin.settings["lora_hash"] == generate.trained.file_hash(folder)
    assert not np.allclose(found.heldout, base.heldout)
    assert len(rows(tiny_sd, tmp_path / "plan", tmp_path / "a")) == 1
