"""zju-pi/diff-sampler."""

import numpy as np

from samplers import Grid, VPLinear, dynamic_threshold
from samplers.solvers.adams import ipndm
from samplers.solvers.afs import without_first_call
from samplers.solvers.deis import deis
from samplers.solvers.denoise import then_denoise
from samplers.solvers.dpmpp import dpmpp
from samplers.solvers.rungekutta import dpm2, euler, heun
from samplers.solvers.unipc import unipc

from .folder import Unsupported


def run(setting, options):
    name, n = options.pop("solver"), setting.steps
    grid = _grid(setting, options.pop("schedule_type", "polynomial"), options.pop("schedule_rho", 7.0))
    afs, denoise = options.pop("afs", False), options.pop("denoise_to_zero", False)
    settings = {}
    if name == "euler":
        plan = euler(grid, n)
    elif name == "heun":
        plan = heun(grid, 2 * n)
    elif name == "dpm2":
        plan = dpm2(grid, 2 * n, r=options.pop("r", 0.5))
    elif name in ("ipndm", "ipndm_v"):
        wrong = variable = name == "ipndm_v"
        plan = ipndm(grid, n, order=options.pop("max_order", 4), variable=variable, as_published=wrong)
    elif name == "deis":
        variant = options.pop("deis_mode", "tab")
        order, sums = options.pop("max_order", 4), "diff-sampler" if variant == "tab" else False
        plan = deis(grid, n, order=order, variant=variant, time=_VP(0.002, 80.0), as_published=sums)
    elif name in ("dpmpp", "unipc"):
        order, on_x0 = options.pop("max_order", 3), options.pop("predict_x0", True)
        # the official code climbs to its order before it lowers it
        common = {"order": order, "target": "sample" if on_x0 else "epsilon"}
        common["lower_order_final"] = options.pop("lower_order_final", True) and n >= order
        if name == "dpmpp":
            plan = dpmpp(grid, n, as_published=True, **common)
        else:
            plan = unipc(grid, n, variant=options.pop("variant", "bh2"), **common)
        if on_x0:  # always, but not in the last denoising call
            settings["threshold"] = _first(n - afs, dynamic_threshold)
    else:
        raise Unsupported(f"solver {name}")
    plan = without_first_call(plan) if afs else plan
    plan = then_denoise(plan, setting.schedule) if denoise else plan
    return setting.run(plan.for_prediction("epsilon"), **settings)


def _grid(setting, kind, rho):
    if kind == "polynomial":
        return setting.grid("edm", rho=rho)
    if kind == "logsnr":
        return setting.grid("logSNR")
    if kind == "time_uniform":
        vp = _VP(setting.t_end, setting.t_start)
        u = (1 + np.arange(setting.steps + 1) / setting.steps * (1e-3 ** (1 / rho) - 1)) ** rho
        times = np.exp(-vp.lam(u))
        times[[0, -1]] = setting.t_start, setting.t_end
        return Grid(setting.schedule, times=times, end="t_end")
    raise Unsupported(f"schedule_type {kind}")


class _VP(VPLinear):
    """The VP schedule that has these noise levels at t = 1e-3 and t = 1. Its beta(0) is negative for EDM's range, which
    VPLinear refuses, but on [1e-3, 1] beta(t) is positive."""

    def __init__(self, sigma_min, sigma_max):
        low, high = np.log(sigma_min**2 + 1), np.log(sigma_max**2 + 1)
        slope = 2 * (low / 1e-3 - high) / (1e-3 - 1)
        self.beta_min = high - 0.5 * slope
        self.beta_max = self.beta_min + slope


def _first(calls, threshold):
    """`threshold` in the first calls only."""
    seen = iter(range(calls))
    return lambda x0: x0 if next(seen, None) is None else threshold(x0)
