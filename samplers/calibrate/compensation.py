"""The ratios of DC-Solver (Zhao et al. 2024, arXiv 2409.03755): searched on a few trajectories.

For steps, calls and guidance scales that were not searched, ratios.py fits a polynomial to the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..grid import Grid
from ..plan import ANCHOR, HISTORY, ONE, Plan
from ..solvers import find_solver
from ..solvers.dc import compensate, with_predictor
from .problem import Batch, Problem, errors
from .trajectory import trajectory

Loss = Callable[[torch.Tensor], torch.Tensor]  # of a ratio, a scalar
SAMPLES = 10  # as in the paper
BASES: tuple[tuple[str, dict], ...] = (("ipndm", {"order": 2}), ("dpmpp", {"order": 2}))
REACH = 0.5  # ratios lie within 1 +- REACH


@dataclass(frozen=True, eq=False)
class Base:
    """What is compensated: a plan, its predictor (see `compensate`) and the degree of the polynomial."""

    plan: Plan
    predictor: Plan
    dc_order: int = 2

    def with_ratios(self, ratios) -> Plan:
        return compensate(self.plan, ratios, self.dc_order, self.predictor)


def compensated(
    problem: Problem,
    calls: int,
    base: str | None = None,
    grid: str | Grid | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> Plan:
    """A classical solver with the ratios that suit the problem.

    Args:
        problem: the first fitting batches are used, until they hold `SAMPLES` samples.
        base, options: a solver with one call per step and its options. None: the best of `BASES` and of what
            `default_solver` chooses, by the compensated plans' errors on these batches.
        grid: a name or a `Grid`. None: the schedule's default, or with no base the rule's own.
        progress: called with the number of bases that are searched, and of all.

    Raises:
        ValueError: a base with several calls per step, an unknown option, options without a base.
    """
    if base is None and options:
        raise ValueError(f"{', '.join(options)}: options belong to a solver; name it with base=")
    rule = problem.rule(calls)
    grid = rule.grid if base is None and grid is None else grid
    grid = grid if isinstance(grid, Grid) else Grid(problem.schedule, grid)
    bases: Sequence[tuple[str | Callable[..., Plan], dict]]
    bases = [(rule.solver, rule.options), *BASES] if base is None else [(find_solver(base), options)]
    batches, found = first_batches(problem.fitting), []
    exact: list[list[torch.Tensor]] = []
    for solver, own in bases:
        plan, predictor = with_predictor(grid, calls, solver, own)
        subject = Base(plan.for_prediction(problem.prediction), predictor.for_prediction(problem.prediction))
        exact = exact or [trajectory(each, subject.plan, problem.schedule, problem.prediction) for each in batches]
        found.append(subject.with_ratios(search_ratios(subject, batches, exact, least)))
        if progress is not None:
            progress(len(found), len(bases))
    return found[0] if len(found) == 1 else min(found, key=lambda plan: float(errors(plan, batches).mean()))


def first_batches(batches: Sequence[Batch], samples: int = SAMPLES) -> list[Batch]:
    """The first batches that hold so many samples together, or all."""
    before = np.cumsum([0, *(len(batch.noise) for batch in batches)])
    return [batch for batch, count in zip(batches, before, strict=False) if count < samples]


def search_ratios(
    base: Base,
    batches: Sequence[Batch],
    exact: Sequence[Sequence[torch.Tensor]],
    minimise: Callable[[Loss], float],
) -> np.ndarray:
    """The ratios, step after step: each makes the state after its step closest to the exact one (sec. 3.3).

    The state is the one after the corrector, if the plan has one, which costs a model call per value of the loss.

    Args:
        exact: per batch the exact states at the plan's K + 1 times, see `trajectory`.
        minimise: finds the ratio with the least loss; the loss can be differentiated.

    Returns: (K,) ratios; 1 in the first steps, which have too little history.
    """
    plan = base.plan
    ratios = np.ones(len(plan))
    runs = [_Run(base, batch) for batch in batches]
    for i in range(len(plan)):
        with torch.no_grad():
            for run in runs:
                run.call(i)
        if i >= base.dc_order:
            ends = [states[i + 1] for states in exact]

            def loss(ratio, i=i, ends=ends):
                gaps = [(run.corrected(i, ratio) - end).square() for run, end in zip(runs, ends, strict=True)]
                return sum(gap.sum() for gap in gaps) / sum(gap.numel() for gap in gaps)

            ratios[i] = minimise(loss)
        with torch.no_grad():
            for run in runs:
                run.advance(i, ratios[i])
    return ratios


def least(loss: Loss, reach: float = REACH) -> float:
    """The least value of a smooth function of one number within 1 +- reach: five points, then three parabolas.

    Eight values and no derivative. AdamW with the published settings takes 40, each with a gradient through the model,
    and moves by at most 0.1 at a time, so it is still on its way after 40 where the loss is flat.
    """
    points = list(1.0 + reach * np.linspace(-1.0, 1.0, 5))
    with torch.no_grad():
        losses = [float(loss(torch.tensor(point, dtype=torch.float64))) for point in points]
        for _ in range(3):
            k = min(max(int(np.argmin(losses)), 1), len(points) - 2)
            x, y = np.array(points[k - 1 : k + 2]), np.array(losses[k - 1 : k + 2])
            curve = np.polynomial.polynomial.polyfit(x - x[1], y, 2)
            if not curve[2] > 0.0:
                break
            vertex = float(np.clip(x[1] - curve[1] / (2.0 * curve[2]), x[0], x[2]))
            if min(abs(x - vertex)) < 1e-6:
                break
            where = int(np.searchsorted(points, vertex))
            points.insert(where, vertex)
            losses.insert(where, float(loss(torch.tensor(vertex, dtype=torch.float64))))
    return points[int(np.argmin(losses))]


class _Run:
    """One batch on its way: the input of the next call, the newest value as it is, the compensated ones before."""

    def __init__(self, base: Base, batch: Batch):
        self.plan, self.predictor, self.dc_order = base.plan, base.predictor, base.dc_order
        self.model, self.x = batch.model, batch.noise
        self.new: torch.Tensor = batch.noise  # of no use before the first call
        self.old: list[torch.Tensor] = []  # newest first

    def value(self, k: int, x: torch.Tensor) -> torch.Tensor:
        of_x, of_output = self.plan.reads[k].tolist()
        output = self.model(x, torch.tensor(self.plan.label[k], dtype=x.dtype, device=x.device)).to(x.dtype)
        return of_output * output + of_x * x if of_x else of_output * output

    def call(self, i: int) -> None:
        self.new = self.value(i, self.x)

    def compensate(self, i: int, ratio) -> torch.Tensor:
        """m~_i: Lagrange's form, which can be differentiated."""
        if i < self.dc_order:
            return self.new
        t = self.plan.t[i - np.arange(self.dc_order + 1)]
        at, total = ((t - t[0]) / (t[0] - t[1])).tolist(), torch.zeros_like(self.new)
        for j, value in enumerate([self.new, *self.old[: self.dc_order]]):
            weight = 1.0
            for k, other in enumerate(at):
                if k != j:
                    weight = weight * ((ratio - 1.0) - other) / (at[j] - other)
            total = total + weight * value
        return total

    def predicted(self, i: int, value: torch.Tensor) -> torch.Tensor:
        row = self.plan.rows[i, 0].tolist()
        raw = row[HISTORY] - float(self.predictor.rows[i, 0, HISTORY])
        x = row[ANCHOR] * self.x + row[ONE] + (row[HISTORY] - raw) * value + raw * self.new
        return x + sum(w * m for w, m in zip(row[HISTORY + 1 :], self.old, strict=False) if w)

    def corrected(self, i: int, ratio) -> torch.Tensor:
        value = self.compensate(i, ratio)
        x = self.predicted(i, value)
        if i + 1 == len(self.plan):
            return x
        row, alone = self.plan.rows[i + 1, 0], self.predictor.rows[i + 1, 0]
        change = row[HISTORY:].copy()
        change[: len(alone) - HISTORY] -= alone[HISTORY:]
        if not change.any():  # also where the corrected state does not matter: a step that forgets its state
            return x
        change /= row[ANCHOR]
        return x + sum(w * m for w, m in zip(change.tolist(), [self.value(i + 1, x), value, *self.old], strict=False))

    def advance(self, i: int, ratio: float) -> None:
        value = self.compensate(i, ratio)
        self.x, self.old = self.predicted(i, value), [value, *self.old]
