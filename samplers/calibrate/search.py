"""S^3 (Liu et al., ICLR 2024): an evolutionary search for decisions and nodes, guided by a predictor of the error.

A candidate is a decision per step (decisions.py) and the nodes. The search begins with classical solvers on several
grids. In each round the best ones are mutated and crossed, a predictor ranks the children, and the most promising ones
are measured on the fitting batches. What counts is the number of model calls that the measuring may cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from ..grid import Grid
from ..plan import Plan
from ..schedule import Schedule
from .decisions import MOST_VALUES, RELAXATIONS, TARGETS, Decision, decided
from .problem import Problem, errors

BUDGET = 3000  # model calls on the fitting batches
PARENTS, CHILDREN, MEASURED = 16, 200, 12  # of a round
MOST_SEEN = 400  # candidates that the predictor learns from, the best ones


@dataclass(frozen=True)
class Candidate:
    """A plan to be: `levels` are u = sigma / (alpha + sigma) of the K calls, which fall; sigma = 0 follows."""

    levels: tuple[float, ...]
    decisions: tuple[Decision, ...]

    def plan(self, schedule: Schedule) -> Plan:
        """Raises ValueError where the decisions make no plan."""
        u = np.array(self.levels)
        with np.errstate(divide="ignore"):
            t = schedule.t_of_lambda(np.log1p(-u) - np.log(u))
        t[0] = schedule.t_max  # exactly, not by a round trip
        nodes = Grid(schedule, times=np.maximum(t, schedule.t_min), end="zero").nodes(len(u))
        return decided(nodes, self.decisions, f"searched({len(u)} calls)")

    def features(self) -> np.ndarray:
        """What the predictor is given: each decision as 0 and 1, and the nodes' places in units of their mean gap."""
        chosen = [
            [float(value == option) for option in options]
            for decision in self.decisions
            for value, options in ((getattr(decision, name), options) for name, options in OPTIONS.items())
        ]
        return np.concatenate([*chosen, np.array(self.levels) * len(self.levels)])


OPTIONS = {
    "order": tuple(range(1, MOST_VALUES)),
    "points": tuple(range(1, MOST_VALUES + 1)),
    "target": TARGETS,
    "start": (0, 1, 2),
    "relaxation": RELAXATIONS,
    "corrector": (0, *range(2, MOST_VALUES + 1)),
}


def searched(
    problem: Problem,
    calls: int,
    *,
    budget: int = BUDGET,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The best plan that was found, by its mean error on the fitting batches.

    Its error on `problem.heldout` is larger, since it was chosen among many: measure it with `errors`.

    Args:
        budget: model calls that may be spent, each on all fitting samples; a measured candidate costs `calls`.
        progress: called with the calls spent and the budget.

    Raises:
        ValueError: the budget is less than one candidate's cost.
    """
    if budget < calls:
        raise ValueError(f"a budget of {budget} model calls measures no plan of {calls} calls: pass a larger one")
    rng = np.random.default_rng(seed)
    tally = _Tally(problem, budget, progress)
    for candidate in beginnings(problem, calls):
        tally.measure(candidate)
    lowest = _level(problem.schedule, problem.schedule.t_min)
    while tally.affords(calls):
        parents = tally.best(PARENTS)
        children = {child(parents, lowest, rng) for _ in range(CHILDREN)} - tally.errors.keys()
        ranked = ranking(tally.errors, sorted(children, key=repr))
        for candidate in ranked[:MEASURED]:
            tally.measure(candidate)
    return tally.best(1)[0].plan(problem.schedule)


class _Tally:
    """The candidates that were measured, and what it cost."""

    def __init__(self, problem: Problem, budget: int, progress: Callable[[int, int], None] | None):
        self.problem, self.budget, self.progress, self.spent = problem, budget, progress, 0
        self.errors: dict[Candidate, float] = {}  # the logarithm of the mean error; inf for no plan

    def affords(self, calls: int) -> bool:
        return self.spent + calls <= self.budget

    def measure(self, candidate: Candidate) -> None:
        calls = len(candidate.levels)
        if candidate in self.errors or not self.affords(calls):
            return
        self.errors[candidate] = math.inf
        try:
            plan = candidate.plan(self.problem.schedule)
        except ValueError:
            return
        self.spent += calls
        try:
            error = float(errors(plan, self.problem.fitting, self.problem.prediction).mean())
        except FloatingPointError:  # it ran away
            return
        if 0.0 < error < math.inf:
            self.errors[candidate] = math.log(error)
        if self.progress is not None:
            self.progress(self.spent, self.budget)

    def best(self, count: int) -> list[Candidate]:
        return sorted(self.errors, key=lambda candidate: self.errors[candidate])[:count]


def beginnings(problem: Problem, calls: int) -> list[Candidate]:
    """Classical solvers on the default rule's grid and on two usual ones: the first generation."""
    schedule = problem.schedule
    grids = [problem.rule(calls).grid or Grid(schedule), Grid(schedule), Grid(schedule, "time")]
    found = []
    for grid in grids:
        levels = tuple(_level(schedule, t) for t in grid.nodes(calls).t[:-1])
        for order, target, corrected in product((1, 2, 3), TARGETS, (False, True)):
            decisions = []
            for i in range(calls):
                p = max(1, min(order, i + 1, calls - i + 1))
                decisions.append(Decision(p, p, target, 0, "bh2", p + 1 if corrected else 0))
            found.append(Candidate(levels, tuple(decisions)))
    return found


def child(parents: list[Candidate], lowest: float, rng: np.random.Generator) -> Candidate:
    """Two parents crossed at a step, or one of them; then one to three mutations, of decisions or of levels."""
    first, second = (parents[int(rng.integers(len(parents)))] for _ in range(2))
    levels, decisions, calls = np.array(first.levels), list(first.decisions), len(first.levels)
    if rng.random() < 0.5:
        cut, share = int(rng.integers(calls + 1)), rng.choice([0.0, 0.5, 1.0])
        decisions[cut:] = second.decisions[cut:]
        levels = share * levels + (1.0 - share) * np.array(second.levels)
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.5 and calls > 1:
            k = int(rng.integers(1, calls))
            up, down = levels[k - 1], levels[k + 1] if k + 1 < calls else lowest
            move = rng.uniform(-0.5, 0.5)
            levels[k] += move * (up - levels[k] if move > 0 else levels[k] - down)
        else:
            i = int(rng.integers(calls))
            decisions[i] = _changed(decisions[i], rng)
    return Candidate(tuple(levels.tolist()), tuple(decisions))


def _changed(decision: Decision, rng: np.random.Generator) -> Decision:
    name = list(OPTIONS)[int(rng.integers(len(OPTIONS)))]
    options = OPTIONS[name]
    given = {name: options[int(rng.integers(len(options)))]}
    order, points = given.get("order", decision.order), given.get("points", decision.points)
    if order > points:  # the one that was not drawn follows
        given |= {"points": order} if name == "order" else {"order": points}
    return replace(decision, **given)


def ranking(errors: dict[Candidate, float], children: list[Candidate]) -> list[Candidate]:
    """The children by what a Gaussian process predicts for them: its mean less one standard deviation, lowest first."""
    finite = {candidate: error for candidate, error in errors.items() if math.isfinite(error)}
    nearest = sorted(finite, key=lambda candidate: finite[candidate])[:MOST_SEEN]
    if len(nearest) < 2 or not children:
        return children
    mean, std = predict(
        np.stack([candidate.features() for candidate in nearest]),
        np.array([finite[candidate] for candidate in nearest]),
        np.stack([candidate.features() for candidate in children]),
    )
    return [children[k] for k in np.argsort(mean - std)]


def predict(
    seen: np.ndarray, values: np.ndarray, new: np.ndarray, noise: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a Gaussian process at `new` (M, F), given values (N,) at `seen` (N, F).

    The kernel is a Gaussian of the distance, whose length is the median distance of what was seen.

    Args:
        noise: variance of the values' noise, as a part of their variance.
    """

    def squared(a, b):
        gaps = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2.0 * (a @ b.T)
        return np.maximum(gaps, 0.0)

    distances = squared(seen, seen)
    length = np.median(distances[distances > 1e-9]) if (distances > 1e-9).any() else 1.0
    center, spread = values.mean(), max(values.std(), 1e-12)
    kernel = np.exp(-0.5 * distances / length) + noise * np.eye(len(seen))
    cross = np.exp(-0.5 * squared(new, seen) / length)
    mean = cross @ np.linalg.solve(kernel, (values - center) / spread)
    variance = 1.0 - (cross * np.linalg.solve(kernel, cross.T).T).sum(1)
    return center + spread * mean, spread * np.sqrt(np.maximum(variance, 0.0))


def _level(schedule: Schedule, t: float) -> float:
    """sigma / (alpha + sigma) at time t."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return sigma / (alpha + sigma)
