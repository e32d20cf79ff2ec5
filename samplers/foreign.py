"""Configs of diffusers' schedulers: which of them can be used here, and their translation to our options.

From a config come the model's noise schedule (betas or a flow), its prediction type and its time input. The other
scheduler's own solver is left out. docs/diffusers.md has the table of all classes.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Collection

from diffusers import schedulers
from diffusers.configuration_utils import FrozenDict

from .schedule import VPDiscrete, training_betas

DIFFUSION = (  # networks that were trained on betas; those with use_flow_sigmas also on flows
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
)
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_WHY = {
    "its network is EDM-preconditioned: use samplers.sample with samplers.EDM": (
        *("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"),
    ),
    "its noise is variance exploding (VE): use samplers.sample with samplers.EDM(sigma_min, sigma_max)": (
        *("KarrasVeScheduler", "ScoreSdeVeScheduler"),
    ),
    "its noise schedule is continuous: use samplers.sample with samplers.VPLinear(beta_min, beta_max)": (
        "ScoreSdeVpScheduler",
    ),
    "its noise schedule is its own (a cosine of Wuerstchen's continuous time)": ("DDPMWuerstchenScheduler",),
    "its noise schedule is its own (a sine, with alpha = 0 at the first step)": ("IPNDMScheduler",),
    "its noise schedule is its own (betas with a shifted signal-to-noise ratio)": (
        *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    ),
    "its network takes 1 - sigma as its time and predicts x_0 - eps": ("MiniMaxH3Scheduler",),
    "its config has no shift: pass the config of the FlowMatchEulerDiscreteScheduler that it replaced": (
        "LTXEulerAncestralRFScheduler",
    ),
    "its network is distilled and does not follow the ODE; for the base model pass that model's own config": (
        *("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler", "SCMScheduler"),
        *("CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "HeliosDMDScheduler", "PiflowScheduler"),
    ),
    "it changes the resolution between stages": ("HeliosScheduler",),
    "it goes from image to noise: use samplers.sample with t_start below t_end and end='t_end'": (
        *("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    ),
    "its pipelines pass further arguments to step": ("RePaintScheduler", "UnCLIPScheduler"),
    "it samples discrete tokens": (
        *("AmusedScheduler", "VQDiffusionScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler"),
        "EntropyBoundScheduler",
    ),
    "it moves atoms": ("RFD4ProteinaScheduler",),
}
REFUSED = {name: why for why, names in _WHY.items() for name in names}
# The options that describe the model. When another class reads a config, diffusers drops those that are defaults of the
# first class. But defaults differ (the betas of Heun, clip_sample of DDIM), so these are always passed on.
PROCESS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"),
    *("clip_sample", "clip_sample_range"),
)


def read(config: dict, ours: dict) -> tuple[dict, dict, dict]:
    """A scheduler's config in our options.

    Args:
        config: of any diffusers scheduler, live or from a file. ours: our options and their defaults.

    Returns: the config without options that only flow schedulers have, the options that follow from it, and those that
        were left out.

    Raises:
        ValueError: it is of a process that is not supported; the message says which.
    """
    flow = _describes_flow(config, ours)
    unset = config.get("_use_default_values", [])
    if not isinstance(unset, list | tuple):
        raise ValueError(f"_use_default_values must be a list of options, got {unset!r}")
    implied = {name: config[name] for name in PROCESS if name in unset and config.get(name) != ours[name]}
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        raise ValueError(
            "this config is of an EDM-preconditioned network, with log(sigma) / 4 as its time: use samplers.EDM"
        )
    if not flow:
        if "predict_x0" in config and config.get("use_flow_sigmas") and config.get("use_karras_sigmas"):
            implied |= _karras_range_of_unipc({**ours, **config})
        return dict(config), implied, {}
    for name, what in {
        "invert_sigmas": "its network takes 1 - sigma as its time and predicts x_0 - eps",
        "stochastic_sampling": "its network is distilled and needs new noise in every step",
    }.items():
        if config.get(name):
            raise ValueError(f"a FlowMatch config with {name} is not supported: {what}")
    left = {name: value for name, value in config.items() if name not in ours and not name.startswith("_")}
    config = {name: value for name, value in config.items() if name not in left}
    implied |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": left.get("shift", 1.0)}
    return config, implied, left


def _describes_flow(config: dict, ours: Collection[str]) -> bool:
    """Whether a config is of a FlowMatch scheduler. If not, it is of a network that was trained on betas, or ours."""
    named, present = config.get("_class_name"), {name for name in config if not name.startswith("_")}
    if not isinstance(named, str | None):
        raise ValueError(f"_class_name must be the name of a scheduler, got {named!r}")
    if named in DIFFUSION or named in FLOW:
        return named in FLOW
    if named in REFUSED:
        raise ValueError(f"this config is of {named}: {REFUSED[named]}")
    is_ours = {"solver_options", "as_published"} <= present
    if named is not None and not is_ours:
        raise ValueError(
            f"this config is of {named!r}, a scheduler that is not known here. If its model is an ordinary diffusion "
            "or flow model, pass the options of its noise schedule to SolverScheduler instead"
        )
    if not is_ours:
        _look_alike(config, present, ours)
    return "shift" in present and ("beta_start" not in present or bool(config.get("use_flow_sigmas")))


def _look_alike(config: dict, present: set[str], ours: Collection[str]) -> None:
    """Refuses a config without a class name by its options. Schedulers that were made in code have these configs."""
    options = {name: _options(name) for name in (*DIFFUSION, *FLOW)}
    if strange := present.difference(ours, *options.values()):
        known = [name for name in REFUSED if strange <= _options(name)]
        if "beta_start" in present and known and not any("beta_start" in _options(name) for name in known):
            return  # a scheduler made from another one's config, which the betas are from
        if known := [name for name in known if _options(name) == present] or known:
            raise ValueError(f"this config is of {' or '.join(known)}: {REFUSED[known[0]]}")
        raise ValueError(f"no scheduler that is known here has the option {min(strange)!r}: leave it out")
    if not isinstance(config, FrozenDict) and "_use_default_values" not in config:
        return  # written by hand, so some of the class's options may be missing
    twins = [name for name in options if options[name] == present]
    for name in REFUSED:
        if present and present == _options(name):
            if not twins:
                raise ValueError(f"this config is of {name}: {REFUSED[name]}")
            warnings.warn(
                f"this config names no class and could be of {twins[0]} or {name}; it is read as {twins[0]}'s. "
                f"For {name}: {REFUSED[name]}",
                stacklevel=5,
            )


@functools.cache
def _options(name: str) -> set[str]:
    """The options of a diffusers class; none if this version of diffusers has no such class."""
    parameters = inspect.signature(getattr(schedulers, name, object).__init__).parameters.values()
    return {p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _karras_range_of_unipc(config: dict) -> dict:
    """The range sigma / alpha of UniPC's Karras levels on a flow: that of its betas, unless the config has one."""
    kind = config["beta_schedule"] if config["trained_betas"] is None else config["trained_betas"]
    try:
        betas = training_betas(kind, config["beta_start"], config["beta_end"], config["num_train_timesteps"])
        schedule = VPDiscrete(betas)
    except (TypeError, ValueError):
        return {}  # `pipeline_check.check` names the wrong option
    ends = {"sigma_min": schedule.t_min, "sigma_max": schedule.t_max}
    return {name: float(schedule.noise_level(t)) for name, t in ends.items() if config.get(name) is None}
