"""Learned plans: every time and coefficient of a plan of n calls, fitted to what a long solver makes of the noises.

The family is that of Bespoke Non-Stationary solvers (Shaul et al. 2024, arXiv 2403.01329, sec. 3): each next input is
any combination of the initial noise and of all outputs so far, which holds every multistep and single-step solver, and
each call has any label. n calls make n (n + 5) / 2 numbers.

They are fitted by stochastic Gauss-Newton steps, not by Adam: outputs of neighbouring calls are almost equal, so the
coefficients are strongly coupled, and a gradient step in them is badly scaled. With J the derivative of one sample's
result by the numbers and v standard normal, E[J'v v'J] = J'J, so one more backward pass gives the curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..grid import Nodes
from ..plan import Plan
from ..schedule import Schedule
from .baseline import baseline
from .combinations import combined, rows_of
from .problem import Batch, Problem, mean_squares


@dataclass(frozen=True)
class GaussNewton:
    """How a learned plan is fitted.

    Attributes:
        iterations: Gauss-Newton steps, each on one batch of the problem; 0 returns the start.
        rate: length of the first steps, as a share of the Gauss-Newton step; it falls to 0 along a cosine.
        damping: added to the curvature, as a share of its diagonal. It keeps the numbers near the start where the
            samples hardly determine them.
        reach: the longest step, as a share of the error: what it changes in the result, to first order.
        robust: samples whose error exceeds this many times the median count less (Cauchy's loss).
        validation: share of the fitting batches that only choose among the steps.
        seed: of the order of the batches and the probes.
    """

    iterations: int = 24
    rate: float = 0.6
    damping: float = 3e-3
    reach: float = 0.5
    robust: float = 2.0
    validation: float = 0.25
    seed: int = 0


def learned(
    problem: Problem,
    calls: int,
    start: Plan | None = None,
    optimiser: GaussNewton | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The plan of `calls` calls whose result is nearest to the problem's targets.

    Args:
        problem: at least two fitting batches; each Gauss-Newton step takes one, so 16 to 64 samples in a batch.
        start: a plan without noise whose numbers are fitted; None: `baseline`.
        optimiser: None: the defaults of `GaussNewton`.
        progress: called as `progress(done, total)` after each step.

    Raises:
        ValueError: fewer than two fitting batches; a start with noise, with coefficients that vary over the sample, or
            of another number of calls.
    """
    optimiser = optimiser or GaussNewton()
    if len(problem.fitting) < 2:
        raise ValueError(
            f"a learned plan needs at least two fitting batches, got {len(problem.fitting)}: pass the samples in "
            "smaller batches, since one batch only chooses among the steps"
        )
    start = (start or baseline(problem, calls)).for_prediction(problem.prediction)
    if len(start) != calls:
        raise ValueError(f"the start {start.name!r} makes {len(start)} calls, not {calls}: build it with as many calls")
    if optimiser.iterations == 0:
        return start
    numbers = Numbers.of(start, problem.schedule)
    aside = max(1, round(optimiser.validation * len(problem.fitting)))
    fitting, checking = problem.fitting[:-aside], problem.fitting[-aside:]
    delta = _gauss_newton(numbers, fitting, checking, optimiser, progress)
    return numbers.plan(delta, f"learned {calls} from {start.name}")


@dataclass(frozen=True, eq=False)
class Numbers:
    """A plan as one vector: changes of log gaps between its calls, then of its coefficients, row by row.

    Attributes:
        start: what the vector 0 means.
        schedule: the network's.
        gaps: (K + 1,) angles arctan(sigma / alpha) between the most noise, the calls and no noise.
        weights: (K, K + 1), of the next inputs over (initial state, m_0, ..., m_k), with m the network's outputs.
    """

    start: Plan
    schedule: Schedule
    gaps: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, plan: Plan, schedule: Schedule) -> Numbers:
        angle = _angle(schedule, plan.t[:-1])
        top = max(_angle(schedule, schedule.t_max), angle[0])
        gaps = -np.diff(np.concatenate([[top], angle, [0.0]]))
        return cls(plan, schedule, np.maximum(gaps, 1e-3 * top / len(plan)), combined(plan))

    @property
    def size(self) -> int:
        return len(self.gaps) + int(_used(self.weights).sum())

    def times(self, delta: np.ndarray) -> np.ndarray:
        """(K,) the times of the calls."""
        share = self.gaps * np.exp(delta[: len(self.gaps)])
        angle = self.gaps.sum() * (1.0 - np.cumsum(share)[:-1] / share.sum())
        inside = np.clip(angle, *_angle(self.schedule, [self.schedule.t_min, self.schedule.t_max]))
        t = self.schedule.t_of_lambda(-np.log(np.tan(inside)))
        return np.clip(t, self.schedule.t_min, self.schedule.t_max)

    def rows(self, delta: np.ndarray) -> np.ndarray:
        """(K, K + 1), as `weights`."""
        rows = self.weights.copy()
        rows[_used(rows)] += delta[len(self.gaps) :]
        return rows

    def plan(self, delta: np.ndarray, name: str) -> Plan:
        t, rows = self.times(delta), self.rows(delta)
        nodes = Nodes.at(self.schedule, t)
        table = rows_of(np.vstack([np.eye(1, len(t) + 1), rows]))
        end = self.start
        t, alpha = np.append(t, end.t[-1]), np.append(nodes.alpha, end.alpha[-1])
        sigma = np.append(nodes.sigma, end.sigma[-1])
        reads = np.tile([0.0, 1.0], (len(nodes.t), 1))
        return Plan(name, end.prediction, t, alpha, sigma, nodes.label, table, reads)


def _used(rows: np.ndarray) -> np.ndarray:
    """Where rows may be other than 0: at the initial state and the outputs so far."""
    return np.tri(rows.shape[0], rows.shape[1], 1) > 0


def _angle(schedule: Schedule, t) -> np.ndarray:
    return np.arctan2(schedule.sigma(t), schedule.alpha(t))


def result(numbers: Numbers, delta: np.ndarray, batch: Batch, changes: torch.Tensor | None = None) -> torch.Tensor:
    """The state at sigma = 0 with these numbers: (batch, *shape).

    changes: (batch, numbers.size), zeros that are added to `delta` for each sample, so that one backward pass gives the
        derivatives per sample. Those by the label come from a second call of the model, half a percent of the range
        away: a network need not be smooth, nor differentiable, in its label.
    """
    rows, labels = numbers.rows(delta), numbers.schedule.model_time(numbers.times(delta))
    noise = batch.noise
    calls = len(labels)
    far = 0.005 * float(np.ptp(numbers.schedule.model_time([numbers.schedule.t_min, numbers.schedule.t_max])))
    column = len(numbers.gaps)
    moves = None if changes is None else changes[:, :column] @ _slopes(numbers, delta).to(noise)
    state, history = noise, [noise]
    for k in range(calls):
        label = torch.tensor(labels[k], dtype=noise.dtype, device=noise.device)
        m = batch.model(state, label)
        if moves is not None:
            if k and not m.requires_grad:
                raise ValueError("the model's output has no gradient by its input: do not call it under no_grad")
            with torch.no_grad():
                side = -far if labels[k] > labels.mean() else far
                slope = (batch.model(state.detach(), label + side) - m.detach()) / side
            m = m + slope * _column(moves[:, k], noise)
        history.append(m)
        state = torch.zeros_like(noise)
        for j, value in enumerate(history):
            c = rows[k, j] if changes is None else rows[k, j] + _column(changes[:, column + j], noise)
            state = state + c * value
        column += len(history)
    return state


def _column(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def _slopes(numbers: Numbers, delta: np.ndarray) -> torch.Tensor:
    """(K + 1, K): the labels' derivatives by the first K + 1 numbers."""
    step = 1e-5
    found = []
    for i in range(len(numbers.gaps)):
        move = np.zeros_like(delta)
        move[i] = step
        ends = [numbers.schedule.model_time(numbers.times(delta + sign * move)) for sign in (1.0, -1.0)]
        found.append((ends[0] - ends[1]) / (2.0 * step))
    return torch.from_numpy(np.array(found))


def _gauss_newton(
    numbers: Numbers,
    fitting: Sequence[Batch],
    checking: Sequence[Batch],
    optimiser: GaussNewton,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """The numbers among those of all steps that have the least loss on `checking`."""
    rng, probes = np.random.default_rng(optimiser.seed), torch.Generator().manual_seed(optimiser.seed)
    size, times = numbers.size, np.arange(numbers.size) < len(numbers.gaps)
    squares = _squares(numbers, np.zeros(size), checking)
    typical = scale = float(np.median(squares))
    delta = best = np.zeros(size)
    least = _loss(squares, scale, optimiser.robust)
    gradient, curvature, weights = np.zeros(size), np.zeros((size, size)), np.zeros(2)
    first = min(optimiser.iterations // 4, -(-2 * size // len(fitting[0].noise)))  # as many probes as make a full rank
    rate, order = optimiser.rate, list[int]()
    for i in range(optimiser.iterations):
        order = order or rng.permutation(len(fitting)).tolist()
        slopes, probed, squares = _derivatives(numbers, delta, fitting[order.pop()], probes)
        lost = not np.isfinite(slopes).all() or np.median(squares) > 16.0 * typical
        if lost:  # the steps were too long
            delta, rate = best, 0.5 * rate
        else:
            typical = 0.7 * typical + 0.3 * float(np.median(squares))
            weight = 1.0 / (1.0 + squares[:, None] / (optimiser.robust**2 * typical))
            keep = np.array([0.5 if i > first else 1.0, 0.95])
            weights = keep * weights + 1.0
            gradient = keep[0] * gradient + (weight * slopes).mean(0)
            curvature = keep[1] * curvature + (weight * probed).T @ probed / len(probed)
        if i >= first and not lost:
            metric = curvature / weights[1]
            metric = metric + np.diag(optimiser.damping * np.diag(metric) + 1e-12 * np.trace(metric) + typical * times)
            step = np.linalg.solve(metric, -gradient / weights[0])
            length = np.sqrt(step @ metric @ step)
            cosine = 0.5 * (1.0 + np.cos(np.pi * (i - first) / (optimiser.iterations - first)))
            delta = delta + rate * cosine * step * min(1.0, optimiser.reach * np.sqrt(typical) / max(length, 1e-300))
        if (i + 1) % 5 == 0 or i + 1 == optimiser.iterations:
            loss = _loss(_squares(numbers, delta, checking), scale, optimiser.robust)
            if loss < least:
                best, least = delta, loss
            elif loss > least + 0.2:
                delta, rate = best, 0.5 * rate
        if progress is not None:
            progress(i + 1, optimiser.iterations)
    return best


def _derivatives(
    numbers: Numbers, delta: np.ndarray, batch: Batch, probes: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per sample: J'r and J'v, (batch, size), with r the difference from the target and v a probe, both divided by the
    root of the number of entries of a sample; and the mean square of r, (batch,)."""
    changes = torch.zeros(len(batch.noise), numbers.size).to(batch.noise).requires_grad_()
    found = result(numbers, delta, batch, changes)
    gap = (found - batch.target).detach()
    probe = torch.randn(gap.shape, generator=probes, dtype=gap.dtype).to(gap.device)
    entries = gap[0].numel()
    slopes, probed = (
        torch.autograd.grad(found, changes, value, retain_graph=value is gap)[0].double().cpu().numpy()
        for value in (gap, probe)
    )
    return slopes / entries, probed / np.sqrt(entries), mean_squares(gap).cpu().numpy()


def _squares(numbers: Numbers, delta: np.ndarray, batches: Sequence[Batch]) -> np.ndarray:
    """Mean square difference from the target, per sample."""
    with torch.no_grad():
        gaps = [result(numbers, delta, batch) - batch.target for batch in batches]
    return mean_squares(torch.cat(gaps)).cpu().numpy()


def _loss(squares: np.ndarray, scale: float, robust: float) -> float:
    """Cauchy's loss; a sample that is lost (not finite) counts as a very bad one."""
    squares = np.nan_to_num(squares, nan=1e6, posinf=1e6)
    return float(np.log1p(squares / (robust**2 * scale)).mean())
