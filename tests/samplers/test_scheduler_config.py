"""Configs: to and from diffusers' schedulers, saved pipelines, named subclasses, options and their errors."""

import inspect
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import tiny_pipes as pipes
import torch
from tiny_pipes import SD, inputs

import samplers
from samplers import RectifiedFlow, SolverScheduler, named
from samplers.solvers import SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NAMED = [cls for cls in vars(named).values() if isinstance(cls, type) and cls is not SolverScheduler]


def test_config_both_ways():
    settings = {**SD, "timestep_spacing": "leading", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    source = diffusers.EulerDiscreteScheduler(**settings)
    mine = SolverScheduler.from_config(source.config, solver="ddim", eta=0.3)
    back = diffusers.EulerDiscreteScheduler.from_config(mine.config)
    assert {key: back.config[key] for key in settings} == settings
    again = SolverScheduler.from_config(back.config, solver="ddim", eta=0.3)
    mine.set_timesteps(7)
    again.set_timesteps(7)
    assert (mine.plan.rows == again.plan.rows).all() and mine.config.eta == 0.3
    unipc = SolverScheduler.from_config(diffusers.UniPCMultistepScheduler(**SD, solver_type="bh1").config)
    for solver in ("dpmpp", "deis"):  # a solver_type of another family is that family's business
        SolverScheduler.from_config(unipc.config, solver=solver).set_timesteps(5)


def test_flow_match_configs_both_ways():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, base_shift=0.7)
    for cls in (SolverScheduler, samplers.Euler, samplers.Heun):
        mine = cls.from_config(flow.config)
        assert isinstance(mine.schedule, RectifiedFlow) and mine.schedule.shift == 3.0
        back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(mine.config)
        assert back.config.shift == 3.0 and back.config.base_shift == 0.7
    for theirs in (
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
    ):
        assert SolverScheduler.from_config(theirs.config).schedule.shift == 5.0
    with pytest.raises(ValueError, match=r"samplers.EDM"):
        SolverScheduler.from_config(diffusers.EDMEulerScheduler().config)


COMPATIBLES = sorted(SolverScheduler(**SD).compatibles, key=lambda c: c.__name__)  # diffusers' order is random


@pytest.mark.parametrize("other", COMPATIBLES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "mine",
    [
        SolverScheduler(**SD, solver="ddim", grid="karras", solver_order=3, timestep_spacing="trailing"),
        SolverScheduler(**SD, solver="unipc", solver_options={"order": 4, "variant": "bh1"}),
        samplers.DDIM(**SD, eta=0.5),
        samplers.DPMSolverPP3M(**SD),
    ],
    ids=lambda s: type(s).__name__,
)
def test_config_survives_every_compatible_scheduler(mine, other):
    try:
        theirs = other.from_config(mine.config)
    except ImportError as missing:
        pytest.skip(str(missing))
    again = type(mine).from_config(theirs.config)
    assert {k: again.config[k] for k in mine.config} == dict(mine.config)


@pytest.mark.parametrize("cls", [SolverScheduler, samplers.UniPC])
def test_a_saved_pipeline_needs_only_import_samplers(cls, tmp_path):
    options = {"solver_options": {"order": 3, "variant": "bh1"}, "grid": "karras"}
    mine = cls(**SD, **options, **({"solver": "unipc"} if cls is SolverScheduler else {}))
    pipes.sd(mine).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["samplers", cls.__name__]
    code = (
        "import sys\n"
        "sys.modules['bitsandbytes'] = None\n"  # diffusers imports it if it can, which takes seconds
        "import samplers, diffusers\n"
        "none = dict.fromkeys(['safety_checker', 'text_encoder', 'tokenizer', 'image_encoder', 'feature_extractor'])\n"
        f"pipe = diffusers.StableDiffusionPipeline.from_pretrained({str(tmp_path)!r}, **none)\n"
        "s = pipe.scheduler\n"
        f"assert type(s) is samplers.{cls.__name__}, type(s)\n"
        f"assert (s.config.solver, s.config.solver_options, s.config.grid) == ('unipc', {options['solver_options']}, "
        "'karras')\n"
    )
    if cls is samplers.UniPC:  # one new process is enough
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    alone = cls.from_pretrained(tmp_path, subfolder="scheduler")
    for scheduler in (alone, mine):
        scheduler.set_timesteps(6)
    assert (alone.plan.rows == mine.plan.rows).all() and torch.equal(alone.timesteps, mine.timesteps)
    config = {k: v for k, v in mine.config.items() if k != "_use_default_values"}
    assert config == dict(alone.config)


@pytest.mark.parametrize("cls", NAMED, ids=lambda c: c.__name__)
def test_named_scheduler(cls):
    """Importable, listed, its own plan, and what a switch from any other scheduler gives."""
    assert getattr(samplers, cls.__name__) is cls and cls.__name__ in samplers.__all__ and cls.__doc__
    mine, base = (inspect.signature(c).parameters for c in (cls, SolverScheduler))
    assert cls.__module__ == "samplers" and list(mine) == list(base)
    assert {name for name in base if mine[name] != base[name]} == {"solver"}
    config = diffusers.EulerDiscreteScheduler(**SD).config
    switched = [
        cls.from_config(config),
        cls.from_config(SolverScheduler(**SD, solver="dpmpp", solver_options={"order": 3}).config),
        cls.from_config(samplers.DDIM(**SD, eta=0.5).config) if cls is not samplers.DDIM else cls(**SD),
        SolverScheduler(**SD, solver=cls.fixed_solver, solver_options=cls.fixed_options),
    ]
    for scheduler in switched:
        scheduler.set_timesteps(9)
        assert (scheduler.plan.rows == switched[0].plan.rows).all() and scheduler.config.solver == cls.fixed_solver
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{cls.fixed_solver}"):
        cls(solver="ddim" if cls.fixed_solver != "ddim" else "dpmpp")
    for name in cls.fixed_options:
        with pytest.raises(ValueError, match=f"{cls.__name__}.*{name}"):
            cls(solver_options={name: 3})
    assert SolverScheduler.from_config(cls(**SD).config).config.solver is None  # a switch back is the rule again


def test_a_subclass_of_ones_own():
    class Mine(SolverScheduler, solver="unipc", order=4):
        pass

    scheduler = Mine(**SD, solver_options={"variant": "bh1"})
    scheduler.set_timesteps(8)
    expected = SOLVERS["unipc"](samplers.Grid(scheduler.schedule), 8, order=4, variant="bh1")
    assert (scheduler.plan.rows == expected.rows).all() and Mine.__module__ == __name__


def test_options_reach_the_solver():
    """The common options of the config, then a subclass's, then solver_options."""

    def order(cls=SolverScheduler, **config):
        scheduler = cls(**SD, **config)
        scheduler.set_timesteps(8)
        return scheduler.plan.name

    assert order(solver="dpmpp") == "dpmpp(order=2)" == order(samplers.DPMSolverPP2M, solver_order=3)
    assert order(solver="dpmpp", solver_order=3) == "dpmpp(order=3)" == order(samplers.DPMSolverPP3M)
    assert order(solver="dpmpp", solver_order=3, solver_options={"order": 1}) == "dpmpp(order=1)"
    assert order(solver="lms") == "lms(order=4)" == order(samplers.LMS, solver_order=3)  # no solver_order there
    bh1 = SolverScheduler(**SD, solver="unipc", solver_type="bh1", solver_order=3)
    bh1.set_timesteps(8)
    expected = SOLVERS["unipc"](samplers.Grid(bh1.schedule), 8, order=3, variant="bh1")
    assert (bh1.plan.rows == expected.rows).all()
    for solver in SOLVERS:  # every option of every solver can be said
        defaults = {
            name: p.default
            for name, p in list(inspect.signature(SOLVERS[solver]).parameters.items())[2:]
            if p.default is None or isinstance(p.default, (int, float, str))
        }
        assert json.loads(json.dumps(defaults)) == defaults
        calls = 10 if solver in ("runge_kutta", "predictor_corrector") else 9
        SolverScheduler(**SD, solver=solver, solver_options=defaults).set_timesteps(calls)


def test_default_is_the_rule():
    for guidance in (1.0, 7.5):
        scheduler = SolverScheduler(**SD, guidance=guidance)
        scheduler.set_timesteps(8)
        rule = samplers.default_solver(8, guidance, scheduler.schedule, end="zero", images=True)
        expected = samplers.build_plan(scheduler.schedule, rule.solver, 8, rule.grid, **rule.options)
        assert (scheduler.plan.rows == expected.rows).all()
        np.testing.assert_array_equal(scheduler.plan.label, expected.label)
    scheduler = SolverScheduler(**SD, grid="karras")  # a grid that is asked for stays
    scheduler.set_timesteps(8)
    np.testing.assert_allclose(scheduler.plan.t, samplers.Grid(scheduler.schedule, "karras").nodes(8).t)
    pipe = pipes.sd(SolverScheduler(**SD))
    assert torch.isfinite(pipe(**inputs(pipe), num_inference_steps=5).images).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver": "dpmp"}, "unknown solver 'dpmp': did you mean 'dpmpp'"),
        ({"solvr": "dpmpp"}, "unknown option of SolverScheduler 'solvr': did you mean 'solver'"),
        ({"solver": "unipc", "solver_options": {"ordr": 3}}, "option of solver 'unipc' 'ordr': did you mean 'order'"),
        ({"solver": "unipc", "eta": 1.0}, "unipc.*eta"),
        ({"solver_options": {"order": 3}}, "solver="),
        ({"grid": "karrass"}, "did you mean 'karras'"),
        ({"prediction_type": "v-prediction"}, "did you mean 'v_prediction'"),
        ({"final_sigmas_type": "sigma_max"}, "did you mean 'sigma_min'"),
        ({"timestep_spacing": "linspce"}, "did you mean 'linspace'"),
        ({"beta_schedule": "scaled_liner"}, "did you mean 'scaled_linear'"),
        ({"use_karras_sigmas": True, "use_lu_lambdas": True}, "sigmas.*timesteps|use_karras_sigmas"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        SolverScheduler(**config)
    with pytest.raises(ValueError, match=message):
        SolverScheduler.from_config(diffusers.DDIMScheduler(**SD).config, **config)
