"""crowsonkb/k-diffusion sampling.py."""

import numpy as np

from samplers import Grid, build_plan
from samplers.adaptive import sample_adaptive

CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
NOISE = ("eta", "s_noise")
SAMPLERS = {  # name there -> solver here, calls per step, options kept, options fixed
    "euler": ("euler", 1, CHURN, {}),
    "heun": ("heun", 2, CHURN, {}),
    "dpm_2": ("dpm2", 2, CHURN, {}),
    "lms": ("lms", 1, ("order",), {}),
    "euler_ancestral": ("euler_ancestral", 1, NOISE, {}),
    "dpm_2_ancestral": ("dpm2_ancestral", 2, NOISE, {}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", 2, NOISE, {}),
    "dpmpp_sde": ("dpmpp_sde", 2, NOISE, {"independent_noise": True}),  # the cases' draws know no path
    "dpmpp_2m": ("dpmpp", 1, (), {"lower_order_final": False}),
    "dpmpp_2m_sde": ("dpmpp", 1, (*NOISE, "solver_type"), {"eta": 1.0, "lower_order_final": False}),
    "dpmpp_3m_sde": (
        "dpmpp",
        1,
        NOISE,
        {"eta": 1.0, "order": 3, "solver_type": "heun", "lower_order_final": False, "as_published": True},
    ),
}


def run(setting, options):
    name, schedule = options.pop("sampler"), setting.schedule
    if name == "dpm_adaptive":
        kept = {k: options.pop(k) for k in ("order", "rtol", "atol") if k in options}
        ends = {"t_start": setting.t_start, "t_end": setting.t_end}
        model = setting.model("epsilon")
        settings = {"schedule": schedule, "controller": "k_diffusion", "target": "epsilon"}
        return sample_adaptive(model, setting.x, **settings, **ends, **kept)[0]
    if name == "dpm_fast":
        grid = setting.grid("logsnr")
        plan = build_plan(schedule, "singlestep", setting.steps, grid=grid, target="epsilon", as_published=True)
        return setting.run(plan)
    solver, stages, kept, fixed = SAMPLERS[name]
    grid = Grid(schedule, sigmas=_levels(setting, options))
    plan = build_plan(schedule, solver, grid=grid, **fixed | {k: options.pop(k) for k in kept if k in options})
    if "s_churn" in kept:  # a draw in every step; the noise of step i follows the last call of step i - 1
        return setting.run(plan, draw=lambda k: (k + 1) // stages)
    used = [k for k in range(len(plan)) if plan.needs_noise(k)]
    return setting.run(plan, draw=used.index)


def _levels(setting, options):
    """n sigmas and then 0."""
    kind, rho = options.pop("sigmas", "karras"), options.pop("rho", None)
    ends, ramp = np.array([setting.t_start, setting.t_end]), np.linspace(1, 0, setting.steps)
    if kind == "karras":
        high, low = ends ** (1 / (rho or 7.0))
        levels = (low + ramp * (high - low)) ** (rho or 7.0)
    else:  # exponential is polyexponential with rho = 1
        high, low = np.log(ends)
        levels = np.exp(low + ramp ** ((rho or 1.0) if kind == "polyexponential" else 1.0) * (high - low))
    return [*levels, 0.0]
