"""qsh-zh/deis, th_deis."""

from samplers import Grid, VPDiscrete
from samplers.solvers.adams import ipndm
from samplers.solvers.deis import deis
from samplers.solvers.rungekutta import DEIS_NAMES, TABLEAUX, runge_kutta

from .folder import Unsupported


def run(setting, options):
    method, order = options.pop("method", "t_ab"), options.pop("ab_order", 3) + 1  # the paper counts from 0
    tableau = options.pop("rk_method", "3kutta")
    for name in ("ts_phase", "ts_order"):
        options.pop(name, None)  # the times are listed in the case
    schedule, times = setting.schedule, setting.case["timesteps"]
    if isinstance(schedule, VPDiscrete):  # interpolated in alpha_bar; the model's own schedule is not
        schedule = VPDiscrete(schedule.betas, interpolation="alpha_bar")
        times = schedule.t_of_model_time(times)
    grid = Grid(schedule, times=times, end="t_end")
    if method in ("t_ab", "rho_ab"):
        plan = deis(grid, setting.steps, order=order, variant=method.replace("_", ""), as_published=True)
    elif method == "ipndm":
        plan = ipndm(grid, setting.steps)
    elif method == "rho_rk":
        stages = len(TABLEAUX[DEIS_NAMES[tableau]].b)
        plan = runge_kutta(grid, stages * setting.steps, method=tableau)
    else:
        raise Unsupported(f"method {method}")
    return setting.run(plan.for_prediction("epsilon"))
