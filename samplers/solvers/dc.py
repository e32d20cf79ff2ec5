"""DC-Solver's dynamic compensation (Zhao et al. 2024, arXiv 2409.03755), as a transform of the plans of other solvers.

With few calls a multistep solver uses values of the network at states that are off the exact trajectory. The values
lag behind. Before step i dynamic compensation replaces the newest value m_i by the polynomial in time through the
newest values, at a time that a ratio rho_i moves (eq. 9):

    m~_i = l_0(t') m_i + sum_j l_j(t') m~_{i-j}    j = 1 to dc_order,    t' = rho_i t_i + (1 - rho_i) t_{i-1}

It replaces the value for good: later steps use m~_i as history. So the m~ are a triangular matrix times the m, and a
compensated plan is a plan. The ratios are found by `samplers.calibrate.compensated`; with rho = 1 nothing changes.

A fixed ratio other than 1 makes an error of O(h) in every value, so the order falls to 1. Order p needs
rho = 1 + O(h^(p-1)).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .._names import unknown
from ..grid import Grid
from ..plan import HISTORY, Plan
from .adams import abm, gradient_estimation, ipndm, lms
from .ddim import ddim
from .deis import deis
from .dpmpp import dpmpp
from .ersde import er_sde
from .expint import through
from .rungekutta import euler
from .sa import sa_solver
from .unipc import unipc
from .v3 import dpm_solver_v3

_ONE_CALL = (ddim, euler, dpmpp, unipc, sa_solver, dpm_solver_v3, abm, deis, lms, ipndm, er_sde, gradient_estimation)
BASES: dict[str, Callable[..., Plan]] = {solver.__name__: solver for solver in _ONE_CALL}
WITHOUT_CORRECTOR: dict[str, dict] = {"unipc": {"corrector": False}, "sa_solver": {"corrector_order": 0}}


def dc_solver(
    grid: Grid,
    steps: int,
    *,
    base: str | Callable[..., Plan] = "unipc",
    ratios: tuple = (),
    dc_order: int = 2,
    **options,
) -> Plan:
    """A solver with dynamic compensation. One call per step.

    Args:
        base: a name in `BASES`, or any solver function with one call per step. DC-Solver is 'unipc' with variant='bh1'.
        ratios: rho, one number per step; those of the first `dc_order` steps have no effect. None given: all 1.
        dc_order: degree of the polynomial in time.
        options: those of the base.

    Raises:
        ValueError: another number of ratios than steps, a base with several calls per step, an unknown option.
    """
    plan, predictor = with_predictor(grid, steps, base, options)
    return compensate(plan, ratios if len(ratios) else [1.0] * len(plan), dc_order, predictor)


def with_predictor(grid: Grid, steps: int, base: str | Callable[..., Plan], options: dict) -> tuple[Plan, Plan]:
    """The plan of a solver, and the one of its predictor alone, which is the same plan if it has no corrector."""
    if not callable(base) and base not in BASES:
        raise unknown("solver with one model call per step", base, BASES)
    build = base if callable(base) else BASES[base]
    family = getattr(build, "func", build).__name__  # an alias is a partial function
    known = inspect.signature(build).parameters
    for option in options:
        if option not in known:
            raise unknown(f"option of solver {family!r}", option, list(known)[2:])
    plan = build(grid, steps, **options)
    off = WITHOUT_CORRECTOR.get(family)
    return plan, plan if off is None else build(grid, steps, **options | off)


def compensate(plan: Plan, ratios: Sequence[float], dc_order: int = 2, predictor: Plan | None = None) -> Plan:
    """The plan that compensates its values.

    Args:
        plan: of a solver with one call per step.
        ratios: (K,), rho of every call.
        dc_order: degree of the polynomial, at least 1.
        predictor: the same solver without its corrector. The corrector of a step ends at the newest value, so it uses
            that value as the network returned it; the predictor of the next step compensates it. None: `plan` itself.

    Raises:
        ValueError: the plan has several calls per step, or free values in its history; a wrong number of ratios.
    """
    rho = np.asarray(ratios, np.float64)
    calls, width = len(plan), plan.rows.shape[2] - HISTORY
    if rho.shape != (calls,) or not np.isfinite(rho).all():
        raise ValueError(f"dynamic compensation needs {calls} finite ratios, one per call, got shape {rho.shape}")
    if not isinstance(dc_order, (int, np.integer)) or dc_order < 1:
        raise ValueError(f"dc_order must be a whole number of at least 1, got {dc_order!r}")
    if not (plan.rows[:, 0] == plan.rows[:, 1]).all() or len(plan.start) != 2 or plan.stochastic:
        raise ValueError(f"dynamic compensation needs one model call per step, and no noise: not {plan.name!r}")
    if (rho == 1.0).all():
        return plan
    mixed = values(plan.t, rho, dc_order)
    used = plan.rows[:, 0, HISTORY:]
    raw = used[:, 0] - (plan if predictor is None else predictor).rows[:, 0, HISTORY]  # the corrector's part
    rows = np.zeros((calls, 2, HISTORY + calls, *plan.rows.shape[3:]))
    rows[:, :, :HISTORY] = plan.rows[:, :, :HISTORY]
    for i in range(calls):
        of_m = np.zeros((calls, *plan.rows.shape[3:]))
        for j in range(min(width, i + 1)):
            of_m += np.multiply.outer(mixed[i - j], used[i, j] - (raw[i] if j == 0 else 0.0))
        of_m[i] += raw[i]
        rows[i, :, HISTORY : HISTORY + i + 1] = of_m[i::-1]
    last = int(np.flatnonzero(rows.any(axis=(0, 1, *range(3, rows.ndim)))).max())
    return replace(plan, name=f"dc({plan.name})", rows=rows[:, :, : max(last, HISTORY) + 1])


def values(t: np.ndarray, ratios: np.ndarray, dc_order: int) -> np.ndarray:
    """(K, K): the compensated values as combinations of the network's; lower triangular."""
    mixed = np.eye(len(ratios))
    for i in range(dc_order, len(ratios)):
        if ratios[i] != 1.0:
            mixed[i] = lagrange(t[i - np.arange(dc_order + 1)], ratios[i]) @ mixed[i - np.arange(dc_order + 1)]
    return mixed


def lagrange(t: np.ndarray, ratio: float) -> np.ndarray:
    """Weights of the values at the times t (newest first) of their polynomial at `ratio t_0 + (1 - ratio) t_1`."""
    at = (t - t[0]) / (t[0] - t[1])  # in steps: 0, -1, ...
    return through(at, [(ratio - 1.0) ** k / math.factorial(k) for k in range(len(t))])
