"""Every deterministic solver of this package, and the documented rule, as methods of compare.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

from samplers import Grid
from samplers.default import are_images, default_solver
from samplers.solvers import SOLVERS

TARGETS = ({"target": "sample"}, {"target": "epsilon"})
OPTIONS = {  # solver -> the option sets that are worth a row; a solver that is not named runs as it comes
    "dpmpp": [{"order": p, **t} for p in (2, 3) for t in TARGETS],
    "singlestep": [{"order": p, **t} for p in (2, 3) for t in TARGETS],
    "unipc": [{"order": p, "variant": v, **t} for p in (1, 2, 3) for v in ("bh1", "bh2") for t in TARGETS],
    "sa_solver": [{"predictor_order": p, "corrector_order": c, **t} for p, c in ((2, 2), (3, 3)) for t in TARGETS],
    "deis": [{"order": p, "variant": v} for p in (2, 3, 4) for v in ("tab", "logrho")],
    "lms": [{"order": p, "space": s} for p in (2, 3, 4) for s in ("kappa", "flow")],
    "abm": [{"order": p} for p in (1, 2, 3, 4)],
    "ipndm": [{"order": p, "space": s} for p in (2, 3, 4) for s in ("kappa", "flow")],
}
GRIDS = ("logsnr", "quadratic", "karras", "time")
ENDS = ("t_end", "zero")


def methods(grids=GRIDS) -> dict[str, Callable]:
    """Every solver, option set, grid and end."""
    return {
        " ".join([name, *(f"{v}" for v in options.values()), grid, end]): partial(_run, name, options, grid, end)
        for name in SOLVERS
        for options, grid, end in product(OPTIONS.get(name, [{}]), grids, ENDS)
    }


def _run(name: str, options: dict, kind: str, end: str, problem, calls: int):
    grid = Grid(problem.schedule, kind, end=end)
    plan = SOLVERS[name](grid, calls, **options)
    if len(plan) != calls or plan.stochastic:
        raise ValueError(f"{plan.name} is stochastic or makes {len(plan)} calls")
    return plan.run(problem.model, problem.z, prediction=problem.prediction, check_finite=False), end


def rule(problem, calls: int):
    """What `default_solver` chooses, from calls, guidance, schedule, and whether the states are images."""
    choice = default_solver(calls, problem.guidance, problem.schedule, images=are_images(problem.z))
    plan = choice.solver(choice.grid, calls, **choice.options)
    return plan.run(problem.model, problem.z, prediction=problem.prediction, check_finite=False), choice.grid.end
