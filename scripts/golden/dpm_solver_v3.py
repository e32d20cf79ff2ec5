"""thu-ml/DPM-Solver-v3, and its statistics from exact Jacobian diagonals."""

import numpy as np
import torch

from samplers import EDM, Statistics, VPLinear, build_plan
from samplers.analytic import GaussianMixture
from samplers.calibrate import Batch, Problem, estimate
from samplers.solvers.v3 import dpm_solver_v3


def run(setting, options):
    statistics = _statistics(setting, options.pop("ems"))
    if options.pop("degenerated", False):
        statistics = statistics.degenerated()
    pseudo_corrector = options.pop("c_pseudo", True)
    plan = build_plan(
        setting.schedule,
        dpm_solver_v3,
        setting.steps,
        setting.grid(options.pop("skip_type", "time_uniform")),
        statistics=statistics,
        order=options.pop("order", 3),
        corrector=("pseudo" if pseudo_corrector else "same") if options.pop("use_corrector", True) else "none",
        pseudo=options.pop("p_pseudo", False),
        half=options.pop("half", False),
        lower_order_final=options.pop("lower_order_final", True),
        as_published=True,
    )
    levels = setting.schedule.lam(setting.schedule.t_of_lambda(statistics.lam[setting.case["ems_indexes"]]))
    assert np.allclose(setting.schedule.lam(plan.t), levels, rtol=0, atol=1e-9), "other nodes"
    return setting.run(plan)


def _statistics(setting, name) -> Statistics:
    l, s, b = (setting.golden[f"{name}.{part}"].numpy() for part in ("l", "s", "b"))
    start, end = (float(setting.schedule.lam(t)) for t in (setting.t_start, setting.t_end))
    return Statistics(np.linspace(start, end, len(l)), l, s, b)


def run_estimation(setting, options):
    """l, after s and b have been compared within the same tolerance."""
    golden, case = setting.golden, setting.case
    mixture = golden.index["mixtures"][case["mixture"]]
    shape = (mixture["K"], *mixture["shape"])
    means, stds = (torch.tensor(mixture[name], dtype=torch.float64).view(shape) for name in ("means", "stds"))
    schedule = {"vp": VPLinear, "edm": EDM}[case["schedule"]]()
    model = GaussianMixture(mixture["weights"], means, stds).model(schedule)
    x0, e = (golden[case[name]].view(-1, *mixture["shape"]) for name in ("x0", "e"))
    assert len(x0) == options.pop("K"), "other samples"
    batch = Batch(model, e.roll(1, 0) * schedule.init_scale, x0)  # the estimator takes the noise of the next sample
    problem = Problem(schedule, "epsilon", (batch,), (batch,))
    found = estimate(problem, options.pop("N"), probes="exact")
    for name in ("s", "b"):
        gap = np.abs(getattr(found, name) - golden[case[f"out_{name}"]].numpy()).max()
        assert gap <= case["tol"], f"{name} differs by {gap:.1e}"
    return torch.from_numpy(found.l.copy())
