"""The diffusers plug-in: against `samplers.sample`, diffusers' own schedulers, and inside unmodified pipelines."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch

import samplers
from samplers import Guidance, RectifiedFlow, SolverScheduler, VPDiscrete

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its numpy calls
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_EULER = {**SD, "timestep_spacing": "leading", "steps_offset": 1}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8).eval()


@pytest.fixture(scope="module")
def prompt():
    return {"prompt_embeds": torch.randn(1, 3, 8, generator=gen(2)), "negative_prompt_embeds": torch.zeros(1, 3, 8)}


def pipeline(cls, unet, vae, **config):
    scheduler = SolverScheduler.from_config(diffusers.EulerDiscreteScheduler(**SDXL_EULER).config, **config)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = cls(unet=unet, vae=vae, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def networks(unet, prompt):
    def of(embeds):
        return lambda x, t: unet(x, t, encoder_hidden_states=embeds.expand(len(x), -1, -1)).sample

    return of(prompt["prompt_embeds"]), of(prompt["negative_prompt_embeds"])


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"solver": "dpmpp"}, {}),
        ({"solver": "dpmpp", "solver_order": 3, "grid": "karras"}, {"order": 3, "grid": "karras"}),
        (
            {"solver": "ddim", "grid": "quadratic", "final_sigmas_type": "sigma_min"},
            {"grid": "quadratic", "end": "t_end"},
        ),
        ({"solver": "dpmpp", "prediction_type": "v_prediction"}, {"prediction": "v_prediction"}),
    ],
)
def test_pipeline_gives_the_image_of_sample(unet, vae, prompt, config, options):
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet, vae, **config)
    latents = torch.randn(1, 4, 8, 8, generator=gen())
    image = pipe(**prompt, latents=latents, num_inference_steps=6, guidance_scale=5.0, output_type="latent").images
    model, uncond = networks(unet, prompt)
    with torch.no_grad():
        direct = samplers.sample(
            model,
            latents,
            schedule=VPDiscrete.scaled_linear(),
            solver=config["solver"],
            steps=6,
            guidance=Guidance(5.0, uncond),
            **options,
        )
    assert (image - direct).abs().max() < 1e-5 * direct.abs().max()


def test_eta_draws_from_the_pipelines_generators(unet, vae, prompt):
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet, vae, solver="ddim")
    latents = torch.randn(2, 4, 8, 8, generator=gen())
    prompt = {k: v.expand(2, -1, -1) for k, v in prompt.items()}

    def run(g, **kw):
        return pipe(
            **prompt,
            latents=latents,
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="latent",
            generator=g,
            **kw,
        ).images

    noisy = run([gen(5), gen(6)], eta=1.0)
    with torch.no_grad():
        direct = samplers.sample(
            lambda x, t: unet(x, t, encoder_hidden_states=prompt["prompt_embeds"]).sample,
            latents,
            schedule=VPDiscrete.scaled_linear(),
            solver="ddim",
            steps=4,
            eta=1.0,
            generator=[gen(5), gen(6)],
        )
    torch.testing.assert_close(noisy, direct, rtol=0, atol=1e-5)
    assert (run([gen(5), gen(6)]) - noisy).abs().max() > 0.1, "without eta the same pipeline is deterministic"
    assert torch.equal(run(gen(1)), run(gen(2)))
    with pytest.raises(ValueError, match="'dpmpp' has no option 'eta'"):
        pipeline(diffusers.StableDiffusionPipeline, unet, vae, solver="dpmpp", eta=0.5).scheduler.set_timesteps(4)


def test_image_to_image_starts_in_the_middle(unet, vae, prompt):
    pipe = pipeline(diffusers.StableDiffusionImg2ImgPipeline, unet, vae, solver="dpmpp")
    start = torch.randn(1, 4, 8, 8, generator=gen(3))
    image = pipe(
        **prompt,
        image=start,
        strength=0.5,
        num_inference_steps=8,
        guidance_scale=1.0,
        output_type="latent",
        generator=gen(4),
    ).images
    schedule = VPDiscrete.scaled_linear()
    nodes = samplers.Grid(schedule).nodes(8)
    noise = torch.randn(1, 4, 8, 8, generator=gen(4))
    x = float(nodes.alpha[4]) * start + float(nodes.sigma[4]) * noise
    model, _ = networks(unet, prompt)
    with torch.no_grad():
        direct = samplers.sample(model, x, schedule=schedule, timesteps=nodes.label[4:8])
    assert (image - direct).abs().max() < 1e-5 * direct.abs().max()


def test_sdxl_pipelines(vae):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    ).eval()
    none = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    scheduler = SolverScheduler.from_config(diffusers.EulerDiscreteScheduler(**SDXL_EULER).config)
    pipe = diffusers.StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **none)
    pipe.set_progress_bar_config(disable=True)
    embeds, pooled = torch.randn(1, 3, 8, generator=gen(2)), torch.randn(1, 8, generator=gen(3))
    latents = torch.randn(1, 4, 8, 8, generator=gen())
    shared = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0, "output_type": "latent"}
    image = pipe(**shared, latents=latents, num_inference_steps=5).images
    times = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]])
    added = {"text_embeds": pooled, "time_ids": times}
    model = lambda x, t: unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample  # noqa: E731
    schedule = VPDiscrete.scaled_linear()
    with torch.no_grad():
        direct = samplers.sample(model, latents, schedule=schedule, steps=5)
        custom = samplers.sample(model, latents, schedule=schedule, sigmas=[14.0, 4.0, 1.0, 0.2])
        labelled = samplers.sample(model, latents, schedule=schedule, timesteps=[999, 600, 600.5 - 1, 20])
    assert (image - direct).abs().max() < 1e-5 * direct.abs().max()
    for settings, expected in (
        ({"sigmas": [14.0, 4.0, 1.0, 0.2]}, custom),
        ({"timesteps": [999, 600, 599.5, 20]}, labelled),
    ):
        image = pipe(**shared, latents=latents, **settings).images
        assert (image - expected).abs().max() < 1e-5 * expected.abs().max()
    img2img = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components)
    img2img.set_progress_bar_config(disable=True)
    out = img2img(**shared, image=latents, strength=0.4, num_inference_steps=10, generator=gen()).images
    assert out.shape == latents.shape and torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("name", "config", "ours"),
    [
        ("DPMSolverMultistepScheduler", {}, {"grid": "config"}),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun", "timestep_spacing": "trailing"}, {"grid": "config"}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, {"grid": "config"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, {"grid": "config", "as_published": True}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {"grid": "config"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, {"grid": "config"}),
        ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}, {"grid": "config"}),
        (
            "DPMSolverMultistepScheduler",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            {"grid": "config"},
        ),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {}),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}, {}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, {"solver": "ddim", "grid": "config"}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"solver": "ddim"}),
    ],
    ids=str,
)
def test_agrees_with_diffusers_where_it_should(name, config, ours):
    """Same numbers as diffusers' scheduler from one config. 1e-4: their tables are float32 (some 1e-5 in alpha)."""
    flow = name.startswith("FlowMatch")
    theirs = getattr(diffusers, name)(**({} if flow else SD), **config)
    mine = SolverScheduler.from_config(theirs.config, **ours)
    model = lambda x: 0.9 * torch.tanh(1.3 * x + 0.1)  # noqa: E731
    noise = torch.randn(2, 4, 8, 8, generator=gen(), dtype=torch.float64)
    outs = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(model(x), t, x).prev_sample
        outs.append(x)
    assert (outs[0] - outs[1]).abs().max() < 1e-4
    assert torch.allclose(theirs.sigmas, mine.sigmas, rtol=2e-3) if hasattr(theirs, "sigmas") else True


def test_config_both_ways():
    source = diffusers.EulerDiscreteScheduler(**SDXL_EULER, prediction_type="v_prediction", use_karras_sigmas=True)
    mine = SolverScheduler.from_config(source.config, solver="ddim", eta=0.3)
    back = diffusers.EulerDiscreteScheduler.from_config(mine.config)
    for key in (*SDXL_EULER, "prediction_type", "use_karras_sigmas"):
        assert back.config[key] == source.config[key]
    again = SolverScheduler.from_config(back.config, solver="ddim", eta=0.3)
    mine.set_timesteps(7)
    again.set_timesteps(7)
    assert (mine.plan.rows == again.plan.rows).all() and mine.config.eta == 0.3
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, base_shift=0.7)
    mine = SolverScheduler.from_config(flow.config)
    assert isinstance(mine.schedule, RectifiedFlow) and mine.schedule.shift == 3.0
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(mine.config)
    assert back.config.shift == 3.0 and back.config.base_shift == 0.7
    unipc = SolverScheduler.from_config(diffusers.UniPCMultistepScheduler(**SD, solver_type="bh2").config)
    unipc.set_timesteps(5)  # a solver_type of another family is that family's business
    with pytest.raises(ValueError, match="shift_terminal is not supported"):
        SolverScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1).config)
    with pytest.raises(ValueError, match="EDM-preconditioned"):
        SolverScheduler.from_config(diffusers.EDMEulerScheduler().config)


@pytest.mark.parametrize("other", SolverScheduler(**SD).compatibles, ids=lambda c: c.__name__)
def test_config_survives_every_compatible_scheduler(other):
    mine = SolverScheduler(**SD, solver="ddim", grid="karras", solver_order=3, timestep_spacing="trailing")
    try:
        theirs = other.from_config(mine.config)
    except ImportError as missing:
        pytest.skip(str(missing))
    again = SolverScheduler.from_config(theirs.config)
    assert {k: again.config[k] for k in mine.config} == dict(mine.config)


def test_save_and_load(unet, vae, prompt, tmp_path):
    pipe = pipeline(diffusers.StableDiffusionPipeline, unet, vae, solver="dpmpp", solver_order=3, grid="karras")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["samplers", "SolverScheduler"]
    code = (
        "import samplers, diffusers\n"
        "none = dict.fromkeys(['safety_checker', 'text_encoder', 'tokenizer', 'image_encoder', 'feature_extractor'])\n"
        f"pipe = diffusers.StableDiffusionPipeline.from_pretrained({str(tmp_path)!r}, **none)\n"
        "s = pipe.scheduler\n"
        "assert type(s) is samplers.SolverScheduler, type(s)\n"
        "assert (s.config.solver, s.config.solver_order, s.config.grid) == ('dpmpp', 3, 'karras')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = SolverScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    alone.set_timesteps(6)
    pipe.scheduler.set_timesteps(6)
    assert (alone.plan.rows == pipe.scheduler.plan.rows).all() and torch.equal(
        alone.timesteps, pipe.scheduler.timesteps
    )


def test_state_is_float32_in_a_bf16_pipeline():
    """The pipeline holds bf16 latents; the scheduler keeps its own state in float32 while the latents are its own."""
    model = lambda x: 0.9 * torch.tanh(1.3 * x + 0.1)  # noqa: E731
    noise = torch.randn(2, 4, 8, 8, generator=gen()).bfloat16()
    outs = {}
    for kind in ("exact", "ours", "rounded"):
        scheduler = SolverScheduler(**SD, solver="dpmpp")
        scheduler.set_timesteps(30)
        x = noise.double() if kind == "exact" else noise
        for t in scheduler.timesteps:
            x = scheduler.step(model(x), t, x).prev_sample
            if kind == "rounded":
                x = x.clone()  # what a scheduler without a state of its own would step from
        assert x.dtype == (torch.float64 if kind == "exact" else torch.bfloat16)
        outs[kind] = scheduler._state.input.double()
    error = {kind: (outs[kind] - outs["exact"]).abs().mean() for kind in ("ours", "rounded")}
    assert error["ours"] < 0.7 * error["rounded"]


def test_latents_changed_by_the_pipeline_are_taken_over():
    """Inpainting blends, callbacks edit: also in place."""
    model = lambda x: 0.9 * torch.tanh(1.3 * x + 0.1)  # noqa: E731
    noise = torch.randn(1, 4, 8, 8, generator=gen())
    for dtype in (torch.float32, torch.bfloat16):
        outs = []
        for in_place in (True, False):
            scheduler = SolverScheduler(**SD, solver="dpmpp")
            scheduler.set_timesteps(6)
            x = noise.to(dtype)
            for k, t in enumerate(scheduler.timesteps):
                x = scheduler.step(model(x), t, x).prev_sample
                if k == 2:
                    x = x.add_(1.0) if in_place else x + 1.0
            outs.append(x)
        assert torch.equal(*outs)
        untouched = SolverScheduler(**SD, solver="dpmpp")
        untouched.set_timesteps(6)
        x = noise.to(dtype)
        for t in untouched.timesteps:
            x = untouched.step(model(x), t, x).prev_sample
        assert (outs[0] - x).abs().mean() > 0.01


def test_protocol():
    scheduler = SolverScheduler(**SD, solver="dpmpp")
    x = torch.randn(3, 4, 8, 8, generator=gen())
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000
    assert scheduler.scale_model_input(x, 3) is x and scheduler.step_index is None
    with pytest.raises(ValueError, match="run set_timesteps before step"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 5 and len(scheduler.sigmas) == 6
    for t in scheduler.timesteps:
        out = scheduler.step(x, t, x, return_dict=False)[0]
        assert out.shape == x.shape
    assert scheduler.step_index == 5
    with pytest.raises(ValueError, match="all 5 steps are done"):
        scheduler.step(x, t, x)
    ab = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    labels = torch.tensor([0, 500, 999])
    noised = scheduler.add_noise(x, torch.ones_like(x), labels)
    a = ab[labels].view(3, 1, 1, 1)
    torch.testing.assert_close(noised, (a.sqrt() * x + (1 - a).sqrt()).float())
    small = SolverScheduler(trained_betas=[0.1, 0.3])
    assert small.betas.tolist() == pytest.approx([0.1, 0.3])
    flow = SolverScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="pass mu="):
        flow.set_timesteps(4)
    flow.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.0)
    e = torch.e
    s = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(flow.sigmas, torch.cat([e * s / (1 + (e - 1) * s), torch.zeros(1)]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver": "dpm++"}, "unknown solver 'dpm\\+\\+': did you mean 'dpmpp'"),
        ({"grid": "karrass"}, "did you mean 'karras'"),
        ({"prediction_type": "v-prediction"}, "did you mean 'v_prediction'"),
        ({"final_sigmas_type": "sigma_max"}, "did you mean 'sigma_min'"),
        ({"beta_schedule": "scaled_liner"}, "did you mean 'scaled_linear'"),
        ({"use_karras_sigmas": True, "use_lu_lambdas": True}, "at most one"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        SolverScheduler(**config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 3, "timesteps": [5, 3]}, "exactly one of"),
        ({"sigmas": [1.0, 2.0, 0.1]}, "strictly monotone"),
        ({"timesteps": [2000, 3]}, "outside the schedule"),
    ],
)
def test_bad_set_timesteps(call, message):
    with pytest.raises(ValueError, match=message):
        SolverScheduler(**SD).set_timesteps(**call)
