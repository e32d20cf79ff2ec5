"""Unmodified pipelines: against `samplers.sample`, and against the same pipeline with diffusers' own scheduler."""

from collections import defaultdict

import diffusers
import numpy as np
import pytest
import tiny_pipes as pipes
import torch
from ids import named
from tiny_pipes import LATENT, SD, gen, inputs, told

import samplers
from samplers import RectifiedFlow, SolverScheduler, VPDiscrete
from samplers.placing import CALLED_LAST
from samplers.solvers import SOLVERS
from samplers.tail import tail

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SCHEDULE = VPDiscrete.scaled_linear()
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
NOISE = torch.randn(LATENT, generator=gen())
SOLVERS_IN_PIPELINES = [  # one call per step; several; correctors; noise
    ("ddim", {}),
    ("dpmpp", {"order": 3}),
    ("unipc", {"order": 3, "variant": "bh1"}),
    ("deis", {"order": 3}),
    ("lms", {}),
    ("pndm", {}),
    ("heun", {}),
    ("heun", {"s_churn": 2.0}),
    ("dpm2", {}),
    ("sa_solver", {"tau": 1.0}),
    ("sa_solver", {"pece": True}),
    ("euler_ancestral", {}),
    ("dpmpp_2s_ancestral", {}),
]
# What the config's defaults say where diffusers has the option too (solver_order=2, lower_order_final=True).
ARGUMENTS = defaultdict(dict, unipc={"order": 2}, deis={"lower_order_final": True})
ONE_CALL = ("ddim", "dpmpp", "unipc", "deis", "lms", "sa_solver", "euler_ancestral")


def model_of(pipe):
    given = inputs(pipe)
    if hasattr(pipe, "unet"):
        return lambda x, t: pipe.unet(x, t, encoder_hidden_states=given["prompt_embeds"]).sample
    parts = {"encoder_hidden_states": given["prompt_embeds"], "pooled_projections": given.get("pooled_prompt_embeds")}
    return lambda x, t: pipe.transformer(hidden_states=x, timestep=t.expand(1), **parts).sample


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() < tolerance * b.abs().max()


@pytest.mark.parametrize(("solver", "options"), SOLVERS_IN_PIPELINES, ids=named)
def test_text_to_image_is_samplers_sample(solver, options):
    """Every solver, and every entry of `timesteps` is one call with that label."""
    pipe = pipes.sd(SolverScheduler(**SD, solver=solver, solver_options=options))
    labels = told(pipe.unet)
    image = pipe(**inputs(pipe), latents=NOISE, num_inference_steps=7, generator=gen(5)).images
    assert labels == pipe.scheduler.timesteps.tolist() and len(labels) == pipe.scheduler.num_inference_steps == 7
    options = ARGUMENTS[solver] | options
    with torch.no_grad():
        direct = samplers.sample(
            model_of(pipe), NOISE, schedule=SCHEDULE, solver=solver, steps=7, generator=gen(5), **options
        )
    assert close(image, direct)


@pytest.mark.parametrize(("solver", "options"), SOLVERS_IN_PIPELINES, ids=named)
def test_rectified_flow_is_samplers_sample(solver, options):
    options = ARGUMENTS[solver] | options
    pipe = pipes.sd3(SolverScheduler(**FLOW, solver=solver, solver_options=options))
    labels = told(pipe.transformer)
    torch.manual_seed(5)  # SD3's pipeline does not pass its generator to the scheduler
    image = pipe(**inputs(pipe), latents=NOISE, num_inference_steps=7).images
    assert labels == pipe.scheduler.timesteps.tolist() and len(labels) == 7
    torch.manual_seed(5)
    with torch.no_grad():
        direct = samplers.sample(
            model_of(pipe),
            NOISE,
            schedule=RectifiedFlow(3.0),
            prediction="flow",
            solver=solver,
            steps=7,
            grid="time" if solver in CALLED_LAST else None,
            **options,
        )
    assert close(image, direct)


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.6, 1.0])
@pytest.mark.parametrize(("solver", "options"), SOLVERS_IN_PIPELINES, ids=named)
def test_image_to_image_starts_at_the_label_it_was_noised_to(solver, options, strength):
    pipe = pipes.sd(SolverScheduler(**SD, solver=solver, solver_options=options), "StableDiffusionImg2ImgPipeline")
    labels = told(pipe.unet)
    image = torch.randn(LATENT, generator=gen(3))
    out = pipe(**inputs(pipe), image=image, strength=strength, num_inference_steps=9, generator=gen(4)).images
    first = 9 - int(9 * strength)
    plan = pipe.scheduler.plan
    assert labels == plan.label[first:].astype(np.float32).tolist()
    g = gen(4)
    noise = torch.randn(LATENT, generator=g)
    options = ARGUMENTS[solver] | options
    if solver in ONE_CALL and "pece" not in options:  # the same solver on the remaining nodes
        grid = samplers.Grid(SCHEDULE, times=plan.t[first:-1], end="zero")
        plan = SOLVERS[solver](grid, 9 - first, **options).for_prediction("epsilon")
    else:
        plan = tail(plan, first)
    start = float(plan.alpha[0]) * image + float(plan.sigma[0]) * noise
    with torch.no_grad():
        assert close(out, plan.run(model_of(pipe), start, generator=g))
    assert torch.isfinite(out).all()


THEIRS = diffusers.DPMSolverMultistepScheduler(**SD)
TWIN = SolverScheduler.from_config(THEIRS.config, solver="dpmpp", grid="config")
FLOW_THEIRS = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
FLOW_TWIN = SolverScheduler.from_config(FLOW_THEIRS.config, solver="euler")
IMAGE = torch.rand(1, 3, 8, 8, generator=gen(3))
MASK = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)
CASES = [
    (pipes.sd, "StableDiffusionPipeline", {"latents": NOISE}),
    (pipes.sd, "StableDiffusionImg2ImgPipeline", {"image": IMAGE, "strength": 0.6}),
    (pipes.sd, "StableDiffusionInpaintPipeline", {"image": IMAGE, "mask_image": MASK, "strength": 0.6}),
    (pipes.sd, "StableDiffusionInpaintPipeline", {"image": IMAGE, "mask_image": MASK, "latents": NOISE}),
    (pipes.sdxl, "StableDiffusionXLPipeline", {"latents": NOISE}),
    (pipes.sdxl, "StableDiffusionXLPipeline", {"latents": NOISE, "denoising_end": 0.6}),
    (pipes.sdxl, "StableDiffusionXLImg2ImgPipeline", {"image": IMAGE, "strength": 0.6}),
    (pipes.sdxl, "StableDiffusionXLImg2ImgPipeline", {"image": NOISE, "denoising_start": 0.6}),
    (pipes.sdxl, "StableDiffusionXLInpaintPipeline", {"image": IMAGE, "mask_image": MASK, "strength": 0.6}),
    (pipes.sd3, "StableDiffusion3Pipeline", {"latents": NOISE}),
    (pipes.sd3, "StableDiffusion3Img2ImgPipeline", {"image": IMAGE, "strength": 0.6}),
    (pipes.sd3, "StableDiffusion3InpaintPipeline", {"image": IMAGE, "mask_image": MASK, "strength": 0.6}),
    (pipes.dit, None, {}),
    (pipes.pixart, None, {"latents": NOISE}),
]


@pytest.mark.parametrize(("make", "kind", "given"), CASES, ids=named)
def test_the_image_of_diffusers_own_scheduler(make, kind, given):
    """Where the method and its labels are the same, so is the image, in every kind of pipeline."""
    outs = []
    theirs, ours = (FLOW_THEIRS, FLOW_TWIN) if make is pipes.sd3 else (THEIRS, TWIN)
    for scheduler in (theirs, ours):
        pipe = make(scheduler, *[kind] * (kind is not None))
        size = {"height": 8, "width": 8} if "npaint" in str(kind) or (make is pipes.sd3 and "Img2Img" in kind) else {}
        out = pipe(**inputs(pipe) | size | given, num_inference_steps=10, generator=gen(4)).images
        outs.append(torch.as_tensor(out))
    assert close(outs[1], outs[0], 2e-4)  # their tables are float32


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_flow_placing_in_a_pipeline(flag):
    """SD3 by number of steps and by sigmas, with a shift that it computes from the size."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **{flag: True})
    for given in ({"num_inference_steps": 6}, {"sigmas": [1.0, 0.7, 0.4, 0.2]}):
        outs = []
        for scheduler in (theirs, samplers.Euler.from_config(theirs.config)):
            pipe = pipes.sd3(scheduler)
            outs.append(pipe(**inputs(pipe), latents=NOISE, **given).images)
        assert close(outs[1], outs[0], 2e-4)


@pytest.mark.parametrize("solver", ["dpmpp", "heun", "dpm2", "lms", "unipc"])
def test_base_and_refiner_share_one_schedule(solver):
    """SDXL's denoising_end and denoising_start: together all labels once."""
    calls = []
    scheduler = SolverScheduler(**SD, solver=solver)
    latents = NOISE
    for kind, given in (
        ("StableDiffusionXLPipeline", {"denoising_end": 0.7}),
        ("StableDiffusionXLImg2ImgPipeline", {"denoising_start": 0.7}),
    ):
        pipe = pipes.sdxl(scheduler, kind)
        labels = told(pipe.unet)
        given["image" if "denoising_start" in given else "latents"] = latents
        latents = pipe(**inputs(pipe), **given, num_inference_steps=9, generator=gen(4)).images
        calls += labels
    assert sorted(calls, reverse=True) == scheduler.timesteps.tolist() and torch.isfinite(latents).all()


def test_inpainting_keeps_the_known_region_with_every_solver():
    for solver, options in SOLVERS_IN_PIPELINES:
        pipe = pipes.sd(SolverScheduler(**SD, solver=solver, solver_options=options), "StableDiffusionInpaintPipeline")
        given = {"image": IMAGE, "mask_image": MASK, "height": 8, "width": 8, "strength": 0.7}
        out = pipe(**inputs(pipe), **given, num_inference_steps=9, generator=gen(4)).images
        encoded = pipe.vae.encode(2 * IMAGE - 1).latent_dist.sample(gen(4)) * pipe.vae.config.scaling_factor
        known = (MASK == 0).expand(LATENT)
        torch.testing.assert_close(out[known], encoded[known]), solver
        assert torch.isfinite(out).all()


def test_eta_and_generators():
    """A pipeline's eta reaches the solver; one generator per image makes images independent of the batch."""
    pipe = pipes.sd(SolverScheduler(**SD, solver="ddim"))
    latents = torch.randn(2, 4, 8, 8, generator=gen())
    given = inputs(pipe)
    given["prompt_embeds"] = given["prompt_embeds"].expand(2, -1, -1)

    def run(generators, **kw):
        return pipe(**given, latents=latents, num_inference_steps=4, generator=generators, **kw).images

    noisy = run([gen(5), gen(6)], eta=1.0)
    with torch.no_grad():
        model = lambda x, t: pipe.unet(x, t, encoder_hidden_states=given["prompt_embeds"]).sample  # noqa: E731
        direct = samplers.sample(
            model, latents, schedule=SCHEDULE, solver="ddim", steps=4, eta=1.0, generator=[gen(5), gen(6)]
        )
    assert close(noisy, direct)
    one = inputs(pipe)
    alone = pipe(**one, latents=latents[1:], num_inference_steps=4, generator=gen(6), eta=1.0).images
    torch.testing.assert_close(noisy[1:], alone, rtol=1e-5, atol=1e-5)
    assert (run([gen(5), gen(6)]) - noisy).abs().max() > 0.1, "without eta the same pipeline is deterministic"
    assert torch.equal(run(gen(1)), run(gen(2)))
    with pytest.raises(ValueError, match=r"unipc.*eta"):
        pipes.sd(SolverScheduler(**SD, solver="unipc"))(**inputs(pipe), num_inference_steps=4, eta=0.5)


def test_custom_sigmas_and_timesteps():
    """SDXL and SD3 pipelines take the nodes themselves; a solver with two calls per step makes two calls on each."""
    for solver, calls in (("dpmpp", 4), ("heun", 7)):
        pipe = pipes.sdxl(SolverScheduler(**SD, solver=solver))
        times = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]])
        added = {"text_embeds": inputs(pipe)["pooled_prompt_embeds"], "time_ids": times}
        embeds = inputs(pipe)["prompt_embeds"]
        model = lambda x, t: pipe.unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample  # noqa: B023, E731
        for nodes in ({"sigmas": [14.0, 4.0, 1.0, 0.2]}, {"timesteps": [999, 600, 599.5, 20]}):
            image = pipe(**inputs(pipe), latents=NOISE, **nodes).images
            assert len(pipe.scheduler.timesteps) == calls
            with torch.no_grad():
                options = {"solver": solver, **nodes, **({"steps": calls} if solver == "heun" else {})}
                direct = samplers.sample(model, NOISE, schedule=SCHEDULE, **options)
            assert close(image, direct)
    pipe = pipes.sd3(SolverScheduler(**FLOW, solver="euler"))
    pipe(**inputs(pipe), latents=NOISE, sigmas=[1.0, 0.5])
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])  # shift 3 of 0.5


def test_callbacks_may_edit_the_latents():
    def halve(pipe, i, t, given):
        return {"latents": given["latents"] * 0.5} if i == 2 else {}

    outs = []
    for scheduler in (THEIRS, TWIN):
        pipe = pipes.sd(scheduler)
        outs.append(pipe(**inputs(pipe), latents=NOISE, num_inference_steps=6, callback_on_step_end=halve).images)
    assert close(outs[1], outs[0], 2e-4)
    plain = pipes.sd(TWIN)(**inputs(pipe), latents=NOISE, num_inference_steps=6).images
    assert not close(plain, outs[1], 0.05)


def test_half_precision_pipelines():
    for dtype in (torch.float16, torch.bfloat16):
        pipe = pipes.sd(SolverScheduler(**SD, solver="unipc")).to(dtype=dtype)
        given = inputs(pipe)
        given["prompt_embeds"] = given["prompt_embeds"].to(dtype)
        out = pipe(**given, latents=NOISE.to(dtype), num_inference_steps=4).images
        assert out.dtype == dtype and torch.isfinite(out).all()
        assert pipe.scheduler._run.state.input.dtype == torch.float32


def test_dit_saved_batched_and_as_tuple(tmp_path):
    """What diffusers' own pipeline tests ask: the same images after a round trip, in a batch, and as a tuple."""
    pipe = pipes.dit(SolverScheduler(**SD, solver="unipc"))
    given = inputs(pipe) | {"num_inference_steps": 4}
    image = pipe(**given, generator=gen(1)).images
    pipe.save_pretrained(tmp_path)
    loaded = pipes.quiet(diffusers.DiTPipeline.from_pretrained(tmp_path))
    np.testing.assert_allclose(loaded(**given, generator=gen(1)).images, image, atol=1e-5)
    np.testing.assert_allclose(pipe(**given, generator=gen(1), return_dict=False)[0], image, atol=1e-6)
    batch = pipe(**given | {"class_labels": [1, 3]}, generator=[gen(1), gen(2)]).images
    np.testing.assert_allclose(batch[:1], image, atol=1e-4)
    assert np.abs(batch[1] - batch[0]).max() > 0.01
