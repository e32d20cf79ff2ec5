"""Every scheduler of diffusers: its config is read for what it is, or refused with the reason; and options that are
not what they should be."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from check_diffusers import DOC
from tiny_pipes import SD, gen

import samplers
from samplers import SolverScheduler
from samplers.foreign import DIFFUSION, FLOW, REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MISSING = {  # what classes without defaults are made with
    "AmusedScheduler": {"mask_token_id": 5},
    "VQDiffusionScheduler": {"num_vec_classes": 16},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
CLASSES = sorted(
    name
    for names in diffusers.schedulers._import_structure.values()
    for name in names
    if name.endswith("Scheduler") and name != "SchedulerMixin"
)
NOISE = torch.randn(2, 3, 4, 4, generator=gen(), dtype=torch.float64)


def made(name):
    """A live scheduler, or None where diffusers misses a package for it."""
    try:
        return getattr(diffusers.schedulers, name)(**MISSING.get(name, {}))
    except ImportError:
        return None


def configs(name, folder):
    """The config of a live scheduler, copied, from a file, and the file's after a journey through another class."""
    live = made(name)
    if live is None:  # as its file would look
        yield {"_class_name": name, "sigma_data": 1.0} if name.startswith("Cosine") else {"_class_name": name, **SD}
        return
    yield live.config
    yield dict(live.config)
    live.save_config(folder)
    yield json.loads((folder / "scheduler_config.json").read_text())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("cls", [SolverScheduler, samplers.DDIM], ids=lambda c: c.__name__)
def test_no_class_is_passed_over(cls, name, tmp_path):
    """A class of a newer diffusers is in none of the lists and must be refused too."""
    for config in configs(name, tmp_path):
        if name == "FlowMapEulerDiscreteScheduler" and "_class_name" not in config:
            with pytest.warns(UserWarning, match=r"FlowMatchHeunDiscreteScheduler.*FlowMapEuler"):
                cls.from_config(config)
        elif name in DIFFUSION or name in FLOW:
            if name == "FlowMatchHeunDiscreteScheduler" and "_class_name" not in config:
                with pytest.warns(UserWarning, match="FlowMatchHeunDiscreteScheduler"):
                    scheduler = cls.from_config(config)
            else:
                scheduler = cls.from_config(config)
            scheduler.set_timesteps(6)
            assert isinstance(scheduler.schedule, samplers.RectifiedFlow) == (name in FLOW)
        else:
            with pytest.raises(ValueError, match=f"{name}.*(: .{{10}}|not known here)|no scheduler that is known"):
                cls.from_config(config)
    assert not set(DIFFUSION + FLOW) & set(REFUSED)


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_betas_are_those_of_the_class(name, tmp_path):
    """Also where they are its defaults, which differ between classes."""
    theirs = made(name)
    if theirs is None:
        pytest.skip("diffusers misses a package for it")
    expected = theirs.alphas_cumprod.double().numpy()
    for config in configs(name, tmp_path):
        ours = SolverScheduler.from_config(config)
        levels = ours.schedule.alpha((np.arange(1000) + 1) / 1000) ** 2
        np.testing.assert_allclose(levels, expected, rtol=2e-3)
        assert ours.config.clip_sample == bool(theirs.config.get("clip_sample"))
    back = type(theirs).from_config(ours.config)
    torch.testing.assert_close(back.alphas_cumprod, theirs.alphas_cumprod)


def test_the_document_says_what_happens_to_each_class():
    table = DOC.read_text().split("## Which configs can be used")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| ")]
    said = {f"{name}Scheduler": verdict for names, verdict in rows[2:-1] for name in names.split(", ")}
    assert {name: verdict.split(":")[0].split(";")[0] for name, verdict in said.items()} == {
        **dict.fromkeys((*DIFFUSION, *FLOW), "read"),
        **dict.fromkeys(REFUSED, "refused"),
    }


def test_a_class_that_nobody_knows():
    for name in ("MyScheduler", "FlowMatchEulerDiscreteSchedulerV2", ["my", "Scheduler"], 7):
        with pytest.raises(ValueError, match=r"_class_name|MyScheduler|SchedulerV2"):
            SolverScheduler.from_config({"_class_name": name, **SD})
    with pytest.raises(ValueError, match="beta_stat"):
        SolverScheduler.from_config({"beta_stat": 0.1})
    unipc = {
        "predict_x0": True,
        "use_flow_sigmas": True,
        "use_karras_sigmas": True,
        "prediction_type": "flow_prediction",
    }
    for config, option in (
        ({"_use_default_values": 5}, "_use_default_values"),
        ({**unipc, "beta_start": "0.1"}, "beta_start"),
        ({**unipc, "trained_betas": [[]]}, "trained_betas"),
        ({"shift": "3"}, "flow_shift .*shift in FlowMatch"),
    ):
        with pytest.raises(ValueError, match=option):
            SolverScheduler.from_config(config)
    for config in (None, [1], "folder", 3, SolverScheduler()):
        with pytest.raises(ValueError, match="from_config"):
            SolverScheduler.from_config(config)

    class Mine(SolverScheduler, solver="ddim"):
        pass

    written = json.loads(Mine(**SD).to_json_string())
    assert written["_class_name"] == "Mine" and SolverScheduler.from_config(written).config.beta_end == 0.012


def test_a_flow_config_without_its_shift():
    """The class says what it is, whatever options are missing."""
    ours = SolverScheduler.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500})
    assert isinstance(ours.schedule, samplers.RectifiedFlow) and (ours.schedule.shift, len(ours)) == (1.0, 500)
    again = SolverScheduler.from_config(SolverScheduler.from_config(ours.config, flow_shift=5.0).config)
    assert again.schedule.shift == 5.0
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config, shift=2.0)
    assert SolverScheduler.from_config(theirs.config).schedule.shift == 2.0


@pytest.mark.parametrize("option", ["invert_sigmas", "stochastic_sampling"])
def test_flows_of_another_kind(option):
    with pytest.raises(ValueError, match=option):
        SolverScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(**{option: True}).config)


def test_a_network_told_the_logarithm_of_sigma():
    svd = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
    )
    with pytest.raises(ValueError, match=r"samplers.EDM"):
        SolverScheduler.from_config(svd.config)


# -- zero terminal SNR, clip_sample ---------------------------------------------------------------------------------


def run(scheduler, model, x, steps=10, **given):
    """The loop of a pipeline on the scheduler's own labels."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x), t, x, **given).prev_sample
    return x


ZERO_SNR = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}


def test_epsilon_at_zero_terminal_snr():
    """A network's error at the first call would come out 4096 times as large."""
    with pytest.raises(ValueError, match=r"alpha = 0\.00024.*epsilon.*v_prediction"):
        SolverScheduler.from_config(diffusers.DDIMScheduler(**ZERO_SNR, clip_sample=False).config)
    for allowed in ({"prediction_type": "v_prediction"}, {"thresholding": True}, {"clip_sample": True}):
        scheduler = SolverScheduler(**ZERO_SNR, solver="ddim", **allowed)
        assert run(scheduler, lambda x: torch.tanh(x), NOISE).abs().max() < 20
    # no first call there
    scheduler = SolverScheduler(**ZERO_SNR, solver="ddim", lambda_min_clipped=-5.1)
    assert run(scheduler, lambda x: torch.tanh(x), NOISE).abs().max() < 1000


def test_epsilon_of_betas_that_end_in_noise():
    """Not only the flag: cosine betas, or trained ones, say as little of the image at their end."""
    trained = samplers.schedule.training_betas("scaled_linear", 0.00085, 0.012, zero_snr=True).tolist()
    for config in (COSINE, {"trained_betas": trained}):
        scheduler = SolverScheduler(**config, solver="ddim")
        with pytest.raises(ValueError, match="epsilon"):
            scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(NOISE, 999, NOISE)
        scheduler.set_timesteps(timesteps=[900, 500, 100])
        SolverScheduler(**config, solver="ddim", thresholding=True).set_timesteps(10)
        SolverScheduler(**config, solver="ddim", prediction_type="sample").set_timesteps(10)


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_clip_sample_as_ddpm_does_it(limit):
    """DDPM's mean is that of x_0 and x_t, so clamping x_0 is all there is to it."""
    settings = {**SD, "clip_sample": True, "clip_sample_range": limit, "timestep_spacing": "trailing"}
    theirs = diffusers.DDPMScheduler(**settings)
    ours = samplers.DDPM.from_config(theirs.config, grid="config")
    model = lambda x: 1.5 * torch.tanh(x)  # noqa: E731
    out, expected = (run(s, model, NOISE.float(), generator=gen(3)) for s in (ours, theirs))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    plain = run(samplers.DDPM.from_config(theirs.config, grid="config", clip_sample=False), model, NOISE.float())
    assert out.abs().max() <= limit * (1 + 1e-6) < plain.abs().max()


def test_clip_sample_of_heun():
    settings = {**SD, "clip_sample": True, "timestep_spacing": "trailing"}
    theirs = diffusers.HeunDiscreteScheduler(**settings)
    theirs.set_timesteps(6)
    ours = samplers.Heun.from_config(theirs.config)
    ours.set_timesteps(timesteps=theirs.timesteps[[0, *range(1, 11, 2)]])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float())
    x = NOISE
    y = NOISE * (float(theirs.sigmas[0]) ** 2 + 1) ** 0.5
    for t in ours.timesteps:
        x = ours.step(2 * torch.tanh(x), t, x).prev_sample
        y = theirs.step(2 * torch.tanh(theirs.scale_model_input(y, t)), t, y).prev_sample
    torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-4)


# -- options ----------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
ODD = {
    "num_train_timesteps": ["1000", None, 0, 1, -5, 1e3, NAN, 10**9, True, [1000]],
    "beta_start": ["0.1", None, NAN, INF, -0.1, 0.0, 2.0, True],
    "beta_end": ["0.1", None, NAN, INF, -0.1, 0.0, 1.0, 2.0],
    "beta_schedule": [None, 3, ["linear"], "liner", {}],
    "trained_betas": ["all", 3, [0.1, 0.2], {}, [*[0.1] * 999, NAN], [*[0.1] * 999, 1.5], [[0.1]] * 1000, ["a"] * 1000],
    "prediction_type": [None, 3, ["epsilon"], "trigflow", "flow_prediction"],
    "thresholding": ["false", 1.0, [], "yes"],
    "clip_sample": ["false", 1.0, []],
    "clip_sample_range": ["1", None, 0, -1.0, NAN, INF],
    "dynamic_thresholding_ratio": [0, 1.5, NAN, "a", None],
    "sample_max_value": [0, -1, NAN, INF, "a"],
    "solver_order": ["2", None, 0, -1, 2.0, NAN, True],
    "use_karras_sigmas": ["true", 1.5, {}],
    "use_flow_sigmas": ["true", 1.5, {}],
    "use_dynamic_shifting": ["true", True],
    "flow_shift": ["3", None, 0, -1.0, NAN, INF],
    "shift_terminal": ["a", 1.0, -0.1, NAN, 0.1],
    "sigma_min": ["a", 0, -1.0, NAN, INF],
    "sigma_max": ["a", 0, -1.0, NAN, INF],
    "final_sigmas_type": [None, 3, "zeros"],
    "lambda_min_clipped": ["-inf", None, NAN, INF],
    "timestep_spacing": [None, 3, "trail"],
    "steps_offset": ["1", None, -1, 1.5, NAN],
    "time_shift_type": [None, 3, "exp", ["linear"]],
    "solver": [3, "dpm", ["ddim"]],
    "grid": [3, "karass", ["karras"]],
    "eta": ["a", NAN, INF, -1.0],
    "guidance": ["a", None, NAN, INF],
    "solver_options": ["order", [1], 3, {"order": "3"}, {"order": None}, {"order": 99}],
}  # fmt: skip


@pytest.mark.parametrize("option", ODD)
def test_odd_values_are_named(option):
    named = {"eta": {"solver": "ddim"}, "solver_options": {"solver": "dpmpp"}, "sigma_min": {"use_karras_sigmas": True}}
    for value in ODD[option]:
        config = {**named.get(option, {}), "_class_name": "SolverScheduler", "as_published": False}
        config |= {"solver_options": None, option: value}
        with pytest.raises(ValueError, match=f"{option}|beta|order") as caught:
            SolverScheduler.from_config(config).set_timesteps(6)
        assert type(caught.value) is ValueError and len(str(caught.value)) < 8000, value


def test_options_of_solvers_have_the_kind_of_their_defaults():
    """In solver_options, which only the solver knows, as in calls of `build_plan`."""
    for solver, option, values in (
        ("heun", "s_churn", (NAN, INF, "1", None, [1.0], 1e308, True)),
        ("heun", "alpha", (NAN, 0.0, 1e-308, "1")),
        ("euler_ancestral", "eta", (NAN, INF, -1.0, "1", {})),
        ("dpmpp", "lower_order_final", ("false", 1, None)),
        ("dpmpp", "solver_type", (1, None, ["heun"], "midpiont")),
        ("sa_solver", "pece", (10**9, "no")),
        ("sa_solver", "tau", (-1.0, "1", NAN, [1.0, 2.0])),
        ("lms", "order", (0, NAN, 10**9, "4")),
        ("deis", "time", (1.0, "sd", {})),
        ("unipc", "disable_corrector", (5, 1.5)),
        ("runge_kutta", "method", ([], 4, "rk5")),
    ):
        for value in values:
            with pytest.raises(ValueError, match=r".{15}"):
                SolverScheduler(**SD, solver=solver, solver_options={option: value}).set_timesteps(7)
        if solver not in ("sa_solver", "unipc"):
            with pytest.raises(ValueError, match=r".{15}"):
                samplers.build_plan(samplers.VPDiscrete.scaled_linear(), solver, 7, **{option: values[-1]})
    assert len(samplers.build_plan(samplers.EDM(), "heun", 7, s_tmax=INF, s_churn=5)) == 7


def test_numbers_of_steps_that_no_memory_holds():
    schedule = samplers.VPDiscrete.scaled_linear()
    for solver in (None, "dpmpp", "sa_solver"):
        with pytest.raises(ValueError, match="100000"):
            SolverScheduler(**SD, solver=solver).set_timesteps(10**10)
        with pytest.raises(ValueError, match="100000"):
            samplers.build_plan(schedule, solver, 10**10)


def test_ranges_of_the_flags():
    """sigma_min and sigma_max, as EulerDiscreteScheduler has them."""
    settings = {**SD, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0}
    theirs = diffusers.EulerDiscreteScheduler(**settings)
    ours = samplers.Euler.from_config(theirs.config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    for changed in ({"sigma_max": 80.0}, {"sigma_min": 0.001}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))} = .*0.029"):
            samplers.Euler(**{**settings, **changed}).set_timesteps(8)
    with pytest.raises(ValueError, match=r"sigma_min.*sigma_max"):
        samplers.Euler(**{**settings, "sigma_min": 10.0})


def test_a_config_is_written_whole_or_not_at_all(tmp_path):
    SolverScheduler(**SD).save_config(tmp_path)
    before = (tmp_path / "scheduler_config.json").read_bytes()
    with pytest.raises(ValueError, match="saved"):
        SolverScheduler(**SD, solver="deis", solver_options={"time": samplers.VPLinear()}).save_config(tmp_path)
    assert (tmp_path / "scheduler_config.json").read_bytes() == before
    (tmp_path / "scheduler_config.json").write_text('[{"_class_name": "DDIMScheduler"}]')
    with pytest.raises(ValueError, match="from_config"):
        SolverScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        SolverScheduler.from_pretrained(tmp_path)
