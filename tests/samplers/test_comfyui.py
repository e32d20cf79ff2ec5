"""The ComfyUI nodes against `samplers.sample`. ComfyUI is in no package registry, so the classes here stand for its
documented call: KSAMPLER scales the noise and calls `sampler(model, x, sigmas, extra_args, callback, disable)`, and
`model(x, sigma, **extra_args)` is the guided x_0."""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import samplers
from samplers import CFGPlusPlus, Guidance, RectifiedFlow, VPDiscrete
from samplers.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from samplers.comfyui.run import schedule_of

CLASSES = torch.arange(8) % 2
SEED = 7


class EPS:
    """x = x_0 + sigma eps."""

    def noise_scaling(self, sigma, noise, latent, max_denoise):
        return noise * torch.sqrt(1 + sigma**2) if max_denoise else latent + noise * sigma


class CONST:
    """x = (1 - sigma) x_0 + sigma eps."""

    def noise_scaling(self, sigma, noise, latent, max_denoise):
        return sigma * noise + (1 - sigma) * latent


class Discrete(EPS):
    def __init__(self, schedule):
        self.sigmas = torch.tensor(schedule.noise_level(np.arange(1, 1001) / 1000), dtype=torch.float32)


class Flow(CONST):
    def __init__(self, shift):
        self.shift = shift

    def percent_to_sigma(self, percent):
        t = 1 - percent
        return self.shift * t / (1 + (self.shift - 1) * t)


class Patcher:
    def __init__(self, sampling):
        self.sampling = sampling

    def get_model_object(self, name):
        assert name == "model_sampling"
        return self.sampling


class Model:
    """What a sampler function is called with: it applies guidance and the post-CFG functions."""

    def __init__(self, mixture, sampling, cfg):
        self.mixture, self.inner_model = mixture, types.SimpleNamespace(model_patcher=Patcher(sampling), cfg=cfg)
        self.flow, self.seen = isinstance(sampling, CONST), []

    def __call__(self, x, sigma, model_options=None, seed=None):
        options, level = model_options or {}, float(sigma[0])
        assert sigma.shape == x.shape[:1] and (sigma == sigma[0]).all()
        self.seen.append(level)
        alpha = 1 - level if self.flow else 1.0
        cond = self.mixture.posterior(x, alpha, level, CLASSES)[0]
        uncond = self.mixture.posterior(x, alpha, level)[0]
        denoised = uncond + self.inner_model.cfg * (cond - uncond)
        for function in options.get("sampler_post_cfg_function", []):
            denoised = function({"denoised": denoised, "uncond_denoised": uncond, "cond_denoised": cond})
        return denoised.to(x.dtype)


class KSampler:
    """comfy.samplers.KSAMPLER."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model, sigmas, extra_args, callback, noise, latent_image=None):
        sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        x = sampling.noise_scaling(sigmas[0], noise, latent, latent_image is None)
        steps = len(sigmas) - 1

        def report(about):
            callback(about["i"], about["denoised"], about["x"], steps)

        return self.sampler_function(
            model, x, sigmas, extra_args=extra_args, callback=report, disable=True, **self.extra_options
        )


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    module = types.ModuleType("comfy.samplers")
    module.KSAMPLER = KSampler
    package = types.ModuleType("comfy")
    package.samplers = module
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", module)


MODELS = {"sdxl": (VPDiscrete.scaled_linear(), Discrete), "sd3": (RectifiedFlow(3.0), None)}


@pytest.fixture(params=MODELS)
def setting(request):
    schedule, sampling = MODELS[request.param]
    return schedule, sampling(schedule) if sampling else Flow(3.0)


def node(name, **inputs):
    made = NODE_CLASS_MAPPINGS[name]()
    return getattr(made, made.FUNCTION)(**inputs)


def draw(setting, mixture, sampler, sigmas, z, cfg=3.0):
    """ComfyUI's result, the sigmas that the model saw, and the reported steps."""
    model, reports = Model(mixture, setting[1], cfg), []
    extra_args = {"model_options": {}, "seed": SEED}
    result = sampler.sample(model, sigmas, extra_args, lambda *about: reports.append(about), z.float())
    assert extra_args == {"model_options": {}, "seed": SEED}
    assert all(0 <= i < steps for i, _, _, steps in reports) and [r[0] for r in reports] == sorted(
        r[0] for r in reports
    )
    return result, model.seen, reports


def ours(setting, mixture, z, cfg=3.0, guidance=Guidance, **options):
    schedule = setting[0]
    prediction = "flow" if isinstance(schedule, RectifiedFlow) else "epsilon"
    uncond = mixture.model(schedule, prediction)
    generator = torch.Generator().manual_seed(SEED + 1)
    options = {"prediction": prediction, "guidance": guidance(cfg, uncond), "generator": generator, **options}
    return samplers.sample(mixture.model(schedule, prediction, CLASSES), z.float(), schedule=schedule, **options)


def agree(one, other):
    assert one.dtype == torch.float32 and (one - other).abs().max() < 1e-5 * other.abs().max().clamp(min=1.0)


SOLVERS = [  # name, options, calls of eight steps
    ("euler", {}, 8),
    ("dpmpp_2m", {}, 8),
    ("res_2s", {}, 15),
    ("unipc", {"order": 3}, 8),
    ("deis", {}, 8),
    ("abm", {"order": 3}, 8),
    ("heun", {}, 15),
    ("gradient_estimation", {"gamma": 1.8}, 8),
    ("euler_ancestral", {"eta": 0.8}, 8),
    ("dpmpp_2m_sde", {}, 8),
    ("dpmpp_sde", {}, 15),
    ("er_sde", {}, 8),
    ("sa_solver", {"tau": [1.0, 0.2, 0.8]}, 8),
    ("euler", {"s_churn": 5.0, "s_tmax": 5.0, "space": "flow"}, 8),
]


@pytest.mark.parametrize(("solver", "options", "calls"), SOLVERS)
def test_a_solver_on_the_sigmas_of_a_grid(setting, mixture, z, solver, options, calls):
    patcher = Patcher(setting[1])
    (sampler,) = node("SamplersSolver", solver=solver, options=json.dumps(options))
    (sigmas,) = node("SamplersGrid", model=patcher, grid="beta57", steps=8, guidance=3.0, denoise=1.0)
    assert sigmas.dtype == torch.float32 and len(sigmas) == 9 and sigmas[-1] == 0
    result, seen, reports = draw(setting, mixture, sampler, sigmas, z)
    grid = samplers.Grid(setting[0], sigmas=sigmas.tolist())
    agree(result, ours(setting, mixture, z, solver=solver, grid=grid, **options))
    fewer = solver == "res_2s" and setting[0].alpha(1.0) == 0  # a first-order step from pure noise
    assert len(seen) == len(reports) == calls - fewer


def test_the_default_rule(setting, mixture, z):
    (sampler,) = node("SamplersSolver", solver="default", options="{}")
    (sigmas,) = node("SamplersGrid", model=Patcher(setting[1]), grid="default", steps=10, guidance=3.0, denoise=1.0)
    result, _, _ = draw(setting, mixture, sampler, sigmas, z)
    agree(result, ours(setting, mixture, z, steps=10, images=True))  # ComfyUI has images, whatever these states are


PLANS = [("default", "default", {}), ("heun", "simple", {}), ("dpmpp_2m_sde", "kl_optimal", {}), ("res_2s", "beta", {})]


@pytest.mark.parametrize(("solver", "grid", "options"), PLANS)
def test_a_plan_of_so_many_calls(setting, mixture, z, solver, grid, options):
    inputs = {"solver": solver, "grid": grid, "calls": 9, "guidance": 3.0, "options": json.dumps(options)}
    sampler, sigmas = node("SamplersPlan", model=Patcher(setting[1]), **inputs)
    result, seen, _ = draw(setting, mixture, sampler, sigmas, z)
    named = {"solver": None if solver == "default" else solver, "grid": None if grid == "default" else grid}
    agree(result, ours(setting, mixture, z, steps=9, images=True, **named, **options))
    assert len(seen) == 9
    with pytest.raises(ValueError, match="SIGMAS output"):
        draw(setting, mixture, sampler, sigmas[:-1], z)


def test_a_plan_file(setting, mixture, z, tmp_path):
    schedule = setting[0]
    plan = samplers.build_plan(schedule, "dpmpp", 7, prediction="flow", order=3, end="t_end")
    plan.save(tmp_path / "plan.safetensors")
    sampler, sigmas = node("SamplersPlanFile", model=Patcher(setting[1]), path=str(tmp_path / "plan.safetensors"))
    result, _, _ = draw(setting, mixture, sampler, sigmas, z)
    scale = plan.alpha[-1] if isinstance(schedule, VPDiscrete) else 1.0  # it ends above sigma = 0
    agree(result, ours(setting, mixture, z, solver="dpmpp", steps=7, order=3, end="t_end") / scale)


def test_a_flow_plan_on_another_parametrisation(mixture, z):
    """A plan for a VP model on a flow model with the same noise levels: only the scale of x differs."""
    plan = samplers.build_plan(VPDiscrete.scaled_linear(), "dpmpp", 6)
    scale = plan.alpha[0] + plan.sigma[0]
    model = Model(mixture, Flow(1.0), 1.0)
    run = samplers.comfyui.run.Run(plan, np.arange(7)[::-1].copy(), flow=True)
    result = run(model, (z / scale).float(), {})
    expected = plan.run(mixture.model(VPDiscrete.scaled_linear(), "epsilon", CLASSES), z)
    agree(result, expected.float())
    pure = samplers.build_plan(RectifiedFlow(3.0), "euler", 6, prediction="flow")
    with pytest.raises(ValueError, match="pure noise"):
        samplers.comfyui.run.Run(pure, np.arange(7)[::-1].copy(), flow=False)


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral", "dpmpp_2m", "res_multistep"])
def test_cfg_plus_plus(setting, mixture, z, solver):
    (sampler,) = node("SamplersSolver", solver=f"{solver}_cfg_pp", options="{}")
    (sigmas,) = node("SamplersGrid", model=Patcher(setting[1]), grid="simple", steps=8, guidance=1.0, denoise=1.0)
    result, _, _ = draw(setting, mixture, sampler, sigmas, z, cfg=0.7)
    grid = samplers.Grid(setting[0], sigmas=sigmas.tolist())
    agree(result, ours(setting, mixture, z, cfg=0.7, guidance=CFGPlusPlus, solver=solver, grid=grid))


def test_split_sigmas_are_the_whole_run(setting, mixture, z):
    """ComfyUI's SplitSigmas: a one-step solver in two parts is the run in one."""
    (sampler,) = node("SamplersSolver", solver="heun", options='{"space": "flow"}')
    (sigmas,) = node("SamplersGrid", model=Patcher(setting[1]), grid="simple", steps=6, guidance=1.0, denoise=1.0)
    whole, _, _ = draw(setting, mixture, sampler, sigmas, z)
    first, _, _ = draw(setting, mixture, sampler, sigmas[:4], z)
    args = {"extra_args": {}, "callback": None, "disable": True}
    second = sampler.sampler_function(
        Model(mixture, setting[1], 3.0), first, sigmas[3:], **args, **sampler.extra_options
    )
    agree(second, whole)


def test_denoise_takes_the_last_steps_of_a_longer_run(setting):
    model = Patcher(setting[1])
    inputs = {"model": model, "grid": "karras", "guidance": 1.0}
    (part,) = node("SamplersGrid", steps=6, denoise=0.5, **inputs)
    (whole,) = node("SamplersGrid", steps=12, denoise=1.0, **inputs)
    (none,) = node("SamplersGrid", steps=6, denoise=0.0, **inputs)
    assert torch.equal(part, whole[-7:]) and len(none) == 0


def test_the_schedule_is_read_from_the_model():
    sdxl = VPDiscrete.scaled_linear()
    read = schedule_of(Discrete(sdxl))
    t = np.linspace(0.001, 1.0, 50)
    assert np.allclose(read.lam(t), sdxl.lam(t), atol=1e-6)
    assert schedule_of(Flow(1.15)).shift == pytest.approx(1.15, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"), [("{order: 3}", "not JSON"), ("[3]", "JSON object"), ('{"ordre": 3}', "'order'")]
)
def test_wrong_options_are_named(mixture, z, options, message):
    schedule, sampling = MODELS["sdxl"]
    with pytest.raises(ValueError, match=message):
        (sampler,) = node("SamplersSolver", solver="dpmpp", options=options)
        (sigmas,) = node(
            "SamplersGrid", model=Patcher(sampling(schedule)), grid="karras", steps=5, guidance=1.0, denoise=1.0
        )
        draw((schedule, sampling(schedule)), mixture, sampler, sigmas, z)


def test_the_folder_works_as_a_copy(tmp_path):
    """As ComfyUI loads a folder of custom_nodes, and with every input that a node declares."""
    folder = tmp_path / "samplers_nodes"
    shutil.copytree(Path(samplers.__file__).parent / "comfyui", folder)
    spec = importlib.util.spec_from_file_location(
        "copied_nodes", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["copied_nodes"] = module
    spec.loader.exec_module(module)
    try:
        assert module.NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
        for each in module.NODE_CLASS_MAPPINGS.values():
            assert each.RETURN_TYPES and callable(getattr(each(), each.FUNCTION)) and each.CATEGORY
            declared = each.INPUT_TYPES()["required"]
            code = getattr(each, each.FUNCTION).__code__
            assert set(declared) == set(code.co_varnames[1 : code.co_argcount])
    finally:
        for name in [name for name in sys.modules if name.startswith("copied_nodes")]:
            del sys.modules[name]


def test_every_name_in_the_list_makes_a_sampler(setting):
    (sigmas,) = node("SamplersGrid", model=Patcher(setting[1]), grid="simple", steps=9, guidance=1.0, denoise=1.0)
    from samplers.comfyui.nodes import NAMES
    from samplers.comfyui.run import plan_on
    from samplers.solvers.aliases import without_cfg_pp

    schedule, failed = schedule_of(setting[1]), {}
    for name in NAMES:
        try:
            plan_on(schedule, sigmas, without_cfg_pp(name), {})
        except ValueError as error:
            failed[name] = str(error)
    # these are singular at pure noise
    assert set(failed) <= ({"euler_maruyama", "dpm_fast"} if isinstance(schedule, RectifiedFlow) else set()), failed
