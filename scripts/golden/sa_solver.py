"""scxue/SA-Solver."""

import numpy as np

from samplers import build_plan
from samplers.solvers.sa import sa_solver

from .unipc import TARGETS

TAUS = {"mid": (1.0, 0.2, 0.8)}


def run(setting, options):
    n = setting.steps  # intervals
    corrector, tau = options.pop("corrector_order", 4), options.pop("tau", "0")
    mode, pece = options.pop("mode", "few_steps"), options.pop("pc_mode", "PEC") == "PECE" and corrector > 0
    calls = (2 * n - 1 if pece else n) + (0 if mode == "few_steps" else 1 + (corrector > 0))
    plan = build_plan(
        setting.schedule,
        sa_solver,
        calls,
        grid=grid(setting, options.pop("skip_type", "time"), options.pop("skip_order", 1)),
        predictor_order=options.pop("predictor_order", 3),
        corrector_order=corrector,
        tau=TAUS[tau] if tau in TAUS else float(tau),
        target=TARGETS[options.pop("algorithm_type", "data_prediction")],
        mode=mode,
        pece=pece,
        as_published=True,
    )
    if mode == "more_steps" and not corrector:
        setting.calls += 1  # the official code evaluates the last node also when nothing is corrected with it
    # Its first draw goes unused, then there is one per interval; PECE calls twice per interval but once in the first.
    return setting.run(plan, draw=lambda k: (k + 1) // 2 + 1 if pece else k + 1)


def grid(setting, kind, power):
    if kind == "time":
        a, b = setting.t_start ** (1 / power), setting.t_end ** (1 / power)
        return setting.grid(times=np.linspace(a, b, setting.steps + 1) ** power)
    if kind == "karras":  # sigma / alpha from 80 to 0.002 at most, whatever the range
        schedule = setting.schedule
        high, low = (float(schedule.t_of_noise_level(level)) for level in (80.0, 0.002))
        return setting.grid("karras", t_start=min(high, 1.0), t_end=max(low, 1e-3))
    return setting.grid(kind)
