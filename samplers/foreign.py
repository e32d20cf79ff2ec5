"""Configs of diffusers' schedulers: which of them describe a process that is solved here, and what they say in our
options.

A scheduler's config is read for the model's process (betas or a flow, what the network predicts and is told), not for
the scheduler's own solver. docs/diffusers.md has the table.
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
    "its network is told 1 - sigma and predicts x_0 - eps": ("MiniMaxH3Scheduler",),
    "it names no shift: pass the config of the FlowMatchEulerDiscreteScheduler that it replaced": (
        "LTXEulerAncestralRFScheduler",
    ),
    "its network is distilled and does not follow the ODE; for the base model pass the config that came with it": (
        *("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler", "SCMScheduler"),
        *("CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "HeliosDMDScheduler", "PiflowScheduler"),
    ),
    "it changes the resolution between stages": ("HeliosScheduler",),
    "it goes from image to noise: use samplers.sample with t_start below t_end and end='t_end'": (
        *("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    ),
    "its pipelines pass arguments to step that no solver here has": ("RePaintScheduler", "UnCLIPScheduler"),
    "it samples discrete tokens": (
        *("AmusedScheduler", "VQDiffusionScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler"),
        "EntropyBoundScheduler",
    ),
    "it moves atoms": ("RFD4ProteinaScheduler",),
}
REFUSED = {name: why for why, names in _WHY.items() for name in names}
# What describes the model. diffusers drops what was a class's default when another class reads a config, but the
# defaults differ (the betas of Heun, clip_sample of DDIM), so these are said in every case.
PROCESS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"),
    *("clip_sample", "clip_sample_range"),
)


def read(config: dict, ours: dict) -> tuple[dict, dict, dict]:
    """A scheduler's config in our options.

    Args:
        config: of any diffusers scheduler, live or from a file. ours: our options and their defaults.

    Returns: the config without what only flow schedulers know, what it implies here, and what was left out.

    Raises:
        ValueError: it describes something else; the text says what.
    """
    flow = _describes_flow(config, ours)
    unsaid = config.get("_use_default_values", [])
    if not isinstance(unsaid, list | tuple):
        raise ValueError(f"_use_default_values must be a list of options, got {unsaid!r}")
    implied = {name: config[name] for name in PROCESS if name in unsaid and config.get(name) != ours[name]}
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        raise ValueError("this config is of an EDM-preconditioned network, told log(sigma) / 4: use samplers.EDM")
    if not flow:
        if "predict_x0" in config and config.get("use_flow_sigmas") and config.get("use_karras_sigmas"):
            implied |= _karras_range_of_unipc({**ours, **config})
        return dict(config), implied, {}
    for name, what in {
        "invert_sigmas": "its network is told 1 - sigma and predicts x_0 - eps",
        "stochastic_sampling": "its network is distilled and wants new noise in every step",
    }.items():
        if config.get(name):
            raise ValueError(f"a FlowMatch config with {name} is not supported: {what}")
    left = {name: value for name, value in config.items() if name not in ours and not name.startswith("_")}
    config = {name: value for name, value in config.items() if name not in left}
    implied |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": left.get("shift", 1.0)}
    return config, implied, left


def _describes_flow(config: dict, ours: Collection[str]) -> bool:
    """Whether a config is of a FlowMatch scheduler; if not, it is of networks that were trained on betas, or ours."""
    named, said = config.get("_class_name"), {name for name in config if not name.startswith("_")}
    if not isinstance(named, str | None):
        raise ValueError(f"_class_name must be the name of a scheduler, got {named!r}")
    if named in DIFFUSION or named in FLOW:
        return named in FLOW
    if named in REFUSED:
        raise ValueError(f"this config is of {named}: {REFUSED[named]}")
    is_ours = {"solver_options", "as_published"} <= said
    if named is not None and not is_ours:
        raise ValueError(
            f"this config is of {named!r}, a scheduler that is not known here: if it is a diffusion or flow model like "
            "others, name its options to SolverScheduler(...)"
        )
    if not is_ours:
        _look_alike(config, said, ours)
    return "shift" in said and ("beta_start" not in said or bool(config.get("use_flow_sigmas")))


def _look_alike(config: dict, said: set[str], ours: Collection[str]) -> None:
    """Refuses a config without a class name, which a scheduler that was made in code has, by its options."""
    options = {name: _options(name) for name in (*DIFFUSION, *FLOW)}
    if strange := said.difference(ours, *options.values()):
        known = [name for name in REFUSED if strange <= _options(name)]
        if "beta_start" in said and known and not any("beta_start" in _options(name) for name in known):
            return  # of a scheduler that was made from the config of another, whose betas these are
        if known := [name for name in known if _options(name) == said] or known:
            raise ValueError(f"this config is of {' or '.join(known)}: {REFUSED[known[0]]}")
        raise ValueError(f"no scheduler that is known here has the option {min(strange)!r}")
    if not isinstance(config, FrozenDict) and "_use_default_values" not in config:
        return  # written by hand, so not all of a class's options
    twins = [name for name in options if options[name] == said]
    for name in REFUSED:
        if said and said == _options(name):
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
    """UniPC on a flow places Karras' levels sigma / alpha, between those of its betas where it names none."""
    kind = config["beta_schedule"] if config["trained_betas"] is None else config["trained_betas"]
    try:
        betas = training_betas(kind, config["beta_start"], config["beta_end"], config["num_train_timesteps"])
        schedule = VPDiscrete(betas)
    except (TypeError, ValueError):
        return {}  # which option is wrong is said where all are checked
    ends = {"sigma_min": schedule.t_min, "sigma_max": schedule.t_max}
    return {name: float(schedule.noise_level(t)) for name, t in ends.items() if config.get(name) is None}
