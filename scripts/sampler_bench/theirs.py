"""diffusers' own schedulers at their best settings, stepped through their real interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product

import torch
from diffusers import schedulers
from diffusers.utils import logging

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLAGS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
}
SIGMAS = ("linspace", "trailing", "karras", "exponential", "beta")
CALLS = {  # steps for a number of model calls, where it is not one call per step
    "HeunDiscrete": lambda calls: (calls + 1) // 2,
    "KDPM2Discrete": lambda calls: (calls + 1) // 2,
    "PNDM": lambda calls: calls - 1,  # PLMS calls the model twice at its second label
}


def settings() -> dict[str, tuple[str, dict]]:
    """label -> (class without 'Scheduler', config): every deterministic scheduler for Stable Diffusion models.

    Spacings, sigma grids, orders, solver types and final sigma are all tried; UniPC's bh1 ends in NaN at sigma 0.
    """
    found = {}

    def add(kind: str, spacing: str, **config):
        words = [f"{key.removeprefix('solver_')}={value}" for key, value in config.items()]
        found[" ".join([kind, spacing, *words])] = (kind, {**FLAGS[spacing], **config})

    for spacing in ("linspace", "trailing", "leading"):
        for to_one in (False, True):
            add("DDIM", spacing, set_alpha_to_one=to_one, clip_sample=False)
    for spacing, order, algorithm, end in product(
        (*SIGMAS, "lu", "leading"), (2, 3), ("dpmsolver++", "dpmsolver"), ("zero", "sigma_min")
    ):
        if (algorithm, end) != ("dpmsolver", "zero"):  # diffusers refuses it
            add("DPMSolverMultistep", spacing, solver_order=order, algorithm_type=algorithm, final_sigmas_type=end)
    for spacing in ("linspace", "karras", "lu"):
        add("DPMSolverMultistep", spacing, solver_order=2, solver_type="heun")
    for spacing, order, end in product(("linspace", "karras", "exponential"), (2, 3), ("zero", "sigma_min")):
        spacing_free = "default" if spacing == "linspace" else spacing  # it has no timestep_spacing
        FLAGS["default"] = {}
        add("DPMSolverSinglestep", spacing_free, solver_order=order, final_sigmas_type=end)
    for spacing, order in product((*SIGMAS, "leading"), (1, 2, 3)):
        add("DEISMultistep", spacing, solver_order=order)
    for spacing, order, (kind, end) in product(
        (*SIGMAS, "leading"), (2, 3), (("bh2", "zero"), ("bh2", "sigma_min"), ("bh1", "sigma_min"))
    ):
        add("UniPCMultistep", spacing, solver_order=order, solver_type=kind, final_sigmas_type=end)
        if end == "sigma_min":
            add("UniPCMultistep", spacing, solver_order=order, solver_type=kind, final_sigmas_type=end, predict_x0=False)
    for spacing, (predictor, corrector) in product(SIGMAS, ((2, 2), (3, 3), (3, 4))):
        add("SASolver", spacing, predictor_order=predictor, corrector_order=corrector, tau_func=_no_noise)
    for kind in ("LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete"):
        for spacing in SIGMAS:
            add(kind, spacing)
    for spacing in ("linspace", "leading", "trailing"):
        add("PNDM", spacing, skip_prk_steps=True)
    return found


def _no_noise(t) -> int:
    return 0


def make(kind: str, config: dict, network: dict = SD):
    """The scheduler itself."""
    logging.set_verbosity_error()
    return getattr(schedulers, f"{kind}Scheduler")(**network, **config)


def run(
    kind: str, config: dict, calls: int, model: Callable, z: torch.Tensor, network: dict = SD
) -> tuple[torch.Tensor, str]:
    """Sample with at most `calls` model calls from standard normal noise z; returns the result and where it ends.

    `model(x, label)` gets the input that the scheduler scales and the label that it names. Schedulers that count in
    sigma / alpha start at exactly z / alpha (their own init_noise_sigma is off by the variance of the data).
    """
    scheduler = make(kind, config, network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(CALLS.get(kind, lambda n: n)(calls))
        x = z * (1.0 if float(scheduler.init_noise_sigma) == 1.0 else float((scheduler.sigmas[0] ** 2 + 1).sqrt()))
        if len(scheduler.timesteps) > calls:
            raise RuntimeError(f"{kind} makes {len(scheduler.timesteps)} calls instead of {calls}")
        for t in scheduler.timesteps:
            output = model(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, return_dict=False)[0].to(z.dtype)
    if kind in ("DDIM", "PNDM"):
        end = "zero" if config.get("set_alpha_to_one") else "t_end"
    else:
        end = "zero" if float(scheduler.sigmas[-1]) == 0.0 else "t_end"
    return x, end
