"""GITS as a method of calibration: its nodes are fitted, and then one of a few solvers is chosen."""

from __future__ import annotations

from samplers import Plan, build_plan
from samplers.calibrate import Problem, errors
from samplers.calibrate.gits import gits_grid
from samplers.calibrate.problem import rms

SOLVERS = (("ipndm", {"order": 2}), ("ipndm", {"order": 3}), ("dpmpp", {"order": 2}), ("lms", {"order": 2}))


def gits(problem: Problem, calls: int) -> Plan:
    """GITS's nodes, with the solver of `SOLVERS` that is best on the fitting batches."""
    grid, plans = gits_grid(problem, calls), []
    for solver, options in SOLVERS:
        if calls >= options["order"]:
            plans.append(build_plan(problem.schedule, solver, calls, grid, problem.prediction, **options))
    return min(plans, key=lambda plan: rms(errors(plan, problem.fitting)))
