"""diffusers' own schedulers at their best settings, stepped through their real interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from diffusers import schedulers
from diffusers.utils import logging

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
CONFIGS = {"epsilon": SD, "flow": FLOW}  # of a problem's network, by its prediction
FLAGS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "default": {},
}
SHORT = {  # how a table writes an option
    "solver_order": "o{}",
    "predictor_order": "p{}",
    "corrector_order": "c{}",
    "final_sigmas_type": "end={}",
    "set_alpha_to_one": "to_one={}",
    "predict_x0": "x0={}",
    "clip_sample": "",
    "tau_func": "",
    "skip_prk_steps": "",
}
COMMON = (  # one setting for each common recommendation of how to use a scheduler
    "DDIM leading to_one=False",
    "DDIM linspace to_one=False",
    "DDIM trailing to_one=False",
    "DDIM trailing to_one=True",
    "DPMSolverMultistep linspace o1 dpmsolver end=sigma_min",
    "DPMSolverMultistep linspace o1 dpmsolver++ end=zero",
    "DPMSolverMultistep linspace o1 dpmsolver++ end=sigma_min",
    "DPMSolverMultistep linspace o2 dpmsolver end=sigma_min",
    "DPMSolverMultistep linspace o3 dpmsolver end=sigma_min",
    "DPMSolverMultistep linspace o2 dpmsolver++ end=zero",
    "DPMSolverMultistep linspace o2 dpmsolver++ end=sigma_min",
    "DPMSolverMultistep linspace o3 dpmsolver++ end=zero",
    "DPMSolverMultistep linspace o3 dpmsolver++ end=sigma_min",
    "DPMSolverMultistep linspace o2 heun",
    "DPMSolverMultistep trailing o2 dpmsolver++ end=zero",
    "DPMSolverMultistep leading o2 dpmsolver++ end=zero",
    "DPMSolverMultistep karras o2 dpmsolver++ end=zero",
    "DPMSolverMultistep karras o3 dpmsolver++ end=zero",
    "DPMSolverMultistep karras o2 dpmsolver++ end=sigma_min",
    "DPMSolverMultistep lu o2 dpmsolver++ end=zero",
    "DPMSolverMultistep exponential o2 dpmsolver++ end=zero",
    "DPMSolverMultistep beta o2 dpmsolver++ end=zero",
    "DPMSolverSinglestep default o2 end=zero",
    "DPMSolverSinglestep default o3 end=zero",
    "DPMSolverSinglestep default o3 end=sigma_min",
    "DPMSolverSinglestep karras o2 end=zero",
    "DPMSolverSinglestep default o3 dpmsolver end=sigma_min",
    "UniPCMultistep linspace o2 bh2 end=zero",
    "UniPCMultistep linspace o3 bh2 end=zero",
    "UniPCMultistep linspace o3 bh2 end=sigma_min",
    "UniPCMultistep karras o2 bh2 end=zero",
    "UniPCMultistep karras o3 bh2 end=zero",
    "UniPCMultistep linspace o3 bh2 end=sigma_min x0=False",
    "DEISMultistep linspace o2",
    "DEISMultistep linspace o3",
    "DEISMultistep karras o2",
    "SASolver linspace p2 c2",
    "SASolver linspace p3 c3",
    "SASolver linspace p3 c4",
    "SASolver karras p3 c4",
    "EulerDiscrete linspace",
    "EulerDiscrete karras",
    "HeunDiscrete linspace",
    "HeunDiscrete karras",
    "KDPM2Discrete karras",
    "LMSDiscrete linspace",
    "LMSDiscrete karras",
    "PNDM leading",
    "PNDM trailing",
)
SIGMAS = ("linspace", "trailing", "karras", "exponential", "beta")
ENDS = ("zero", "sigma_min")
CALLS = {  # steps for a number of model calls, where it is not one call per step
    "HeunDiscrete": lambda calls: (calls + 1) // 2,
    "FlowMatchHeunDiscrete": lambda calls: (calls + 1) // 2,
    "KDPM2Discrete": lambda calls: (calls + 1) // 2,
    "PNDM": lambda calls: calls - 1,  # PLMS calls the model twice at its second label
}


def settings() -> dict[str, tuple[str, dict]]:
    """label -> (class without 'Scheduler', config): every deterministic scheduler for Stable Diffusion models.

    Spacings, sigma grids, orders, solver types and final sigma are all tried; UniPC's bh1 ends in NaN at sigma 0.
    """
    found = {}

    def add(kind: str, spacing: str, **config):
        words = [SHORT.get(key, "{}").format(value) for key, value in config.items()]
        found[" ".join(w for w in [kind, spacing, *words] if w)] = (kind, {**FLAGS[spacing], **config})

    for spacing in ("linspace", "trailing", "leading"):
        for to_one in (False, True):
            add("DDIM", spacing, set_alpha_to_one=to_one, clip_sample=False)
    for spacing, order, algorithm, end in product(
        (*SIGMAS, "lu", "leading"), (1, 2, 3), ("dpmsolver++", "dpmsolver"), ENDS
    ):
        if (algorithm, end) != ("dpmsolver", "zero"):  # diffusers refuses it
            add("DPMSolverMultistep", spacing, solver_order=order, algorithm_type=algorithm, final_sigmas_type=end)
    for spacing in ("linspace", "karras", "lu"):
        add("DPMSolverMultistep", spacing, solver_order=2, solver_type="heun")
    for spacing, order, end in product(("default", "karras", "exponential"), (2, 3), ENDS):
        add("DPMSolverSinglestep", spacing, solver_order=order, final_sigmas_type=end)
        if end == "sigma_min":
            noise = {"algorithm_type": "dpmsolver", "final_sigmas_type": end}
            add("DPMSolverSinglestep", spacing, solver_order=order, **noise)
    for spacing, order in product((*SIGMAS, "leading"), (1, 2, 3)):
        add("DEISMultistep", spacing, solver_order=order)
    for spacing, order, (kind, end) in product(
        (*SIGMAS, "leading"), (2, 3), (("bh2", "zero"), ("bh2", "sigma_min"), ("bh1", "sigma_min"))
    ):
        add("UniPCMultistep", spacing, solver_order=order, solver_type=kind, final_sigmas_type=end)
        if end == "sigma_min":
            noise = {"final_sigmas_type": end, "predict_x0": False}
            add("UniPCMultistep", spacing, solver_order=order, solver_type=kind, **noise)
    for spacing, (predictor, corrector) in product(SIGMAS, ((2, 2), (3, 3), (3, 4))):
        add("SASolver", spacing, predictor_order=predictor, corrector_order=corrector, tau_func=_no_noise)
    for kind in ("LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete"):
        for spacing in SIGMAS:
            add(kind, spacing)
    for spacing in ("linspace", "leading", "trailing"):
        add("PNDM", spacing, skip_prk_steps=True)
    return found


def flow_settings() -> dict[str, tuple[str, dict]]:
    """As `settings`, for flow models: every deterministic scheduler that has flow sigmas, all to sigma = 0."""
    found = {}
    for spacing in ("default", "karras", "exponential", "beta"):
        flags = FLAGS[spacing]
        found[f"FlowMatchEulerDiscrete {spacing}"] = ("FlowMatchEulerDiscrete", flags)
        if spacing == "default":  # the only one that it has
            found["FlowMatchHeunDiscrete default"] = ("FlowMatchHeunDiscrete", flags)
        for order in (2, 3):
            for kind in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"):
                found[f"{kind} {spacing} o{order}"] = (kind, {**flags, "solver_order": order})
        for p, c in ((2, 2), (3, 3), (3, 4)):
            orders = {"predictor_order": p, "corrector_order": c, "tau_func": _no_noise}
            found[f"SASolver {spacing} p{p} c{c}"] = ("SASolver", {**flags, **orders})
    return found


def _no_noise(t) -> int:
    return 0


def methods(prediction: str = "epsilon") -> dict[str, Callable]:
    """Every setting as a method of compare.py, for networks of this prediction."""
    every = settings() if prediction == "epsilon" else flow_settings()
    return {label: partial(run, kind, config) for label, (kind, config) in every.items()}


def common(prediction: str) -> tuple[str, ...]:
    """The settings in common use among `methods(prediction)`; those of flow models without other sigmas."""
    return COMMON if prediction == "epsilon" else tuple(n for n in flow_settings() if n.split()[1] == "default")


def run(kind: str, config: dict, problem, calls: int) -> tuple[torch.Tensor, str]:
    """Sample with at most `calls` model calls; the model gets the input that the scheduler scales, at its label.

    Schedulers that count in sigma / alpha start at exactly z / alpha (their own init_noise_sigma is off by alpha^2).
    """
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = {} if kind.startswith("FlowMatch") else CONFIGS[problem.prediction]
        scheduler = getattr(schedulers, f"{kind}Scheduler")(**network, **config)
        scheduler.set_timesteps(CALLS.get(kind, lambda n: n)(calls))
        if len(scheduler.timesteps) > calls:
            raise ValueError(f"{kind} makes {len(scheduler.timesteps)} calls instead of {calls}")
        unit = float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0
        x = problem.z * (1.0 if unit else _start(scheduler))
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
        for t in scheduler.timesteps:
            output = problem.model(scaled(x, t), t)
            x = scheduler.step(output, t, x, return_dict=False)[0].to(x.dtype)
    if kind in ("DDIM", "PNDM"):
        return x, "zero" if config.get("set_alpha_to_one") else "t_end"
    return x, "zero" if float(scheduler.sigmas[-1]) == 0.0 else "t_end"


def _start(scheduler) -> float:
    return float((scheduler.sigmas[0] ** 2 + 1).sqrt())
