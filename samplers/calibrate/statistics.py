"""The empirical model statistics of DPM-Solver-v3, estimated with the memory of a few model outputs.

At each noise level lambda, x = alpha x_0 + sigma e for the targets x_0 of the problem, and (Zheng et al. 2023, arXiv
2310.13268, eq. 58-63; l, f, kappa and y as in solvers/v3.py)

    l = E[diag(sigma d eps / dx)],   s = Cov(f, f') / Var(f),   b = E[f'] - s E[f]      (' is d/dlambda along the ODE)

elementwise. f and f' are combinations of y, of the network's quantity u and of w = kappa eps', with coefficients of l
and l' (`Level.combinations`). So running sums of products of u, y and w are enough, and l and l' may be known later:
one pass, one noise level after another. The same noises and probes serve all levels, because l' is a difference of
neighbours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..prediction import conversion, convert
from ..schedule import Schedule
from ..statistics import Statistics
from .derivative import STENCILS, Derivative
from .problem import Batch, Problem

LARGEST_LEVEL = 100.0  # sigma / alpha at which the levels begin if the schedule begins at pure noise
GOOD_ERROR = 0.1  # of the derivatives that the statistics predict


def estimate(
    problem: Problem,
    levels: int = 60,
    *,
    probes: int | Literal["exact"] = 1,
    repeats: int = 1,
    pooled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """The statistics of the problem's model from its fitting batches, in the dtype of their targets (best float32).

    The model is called with noise levels between those of its training, so with fractional labels. Derivatives in x
    are forward-mode, with attention as plain products. A network with a layer that has none is differentiated by
    central differences in x. Derivatives along the ODE are central differences.

    Args:
        levels: M; uniform in lambda. A level costs about five calls per sample and repeat.
        probes: random vectors per sample for the diagonal. 'exact': one per element of a sample.
        repeats: how many noises per target.
        pooled: one number per channel, for samples of any size, averaged over its elements.
        progress: called as `progress(levels done, levels)`.

    Raises:
        ValueError: fewer than three samples, or a number that is too small.

    Warns:
        UserWarning: too few samples; the message has the expected error and a better number.
    """
    samples = repeats * sum(len(batch.target) for batch in problem.fitting)
    if samples < 3 or not 1 <= repeats < samples:
        raise ValueError(
            f"statistics need at least three samples, and fewer repeats than samples; these are {samples} with "
            f"repeats={repeats}: take more noises in the fitting batches"
        )
    if levels < 1 or (probes != "exact" and int(probes) < 1):
        raise ValueError(f"levels and probes must be at least 1 (or probes='exact'), got {levels} and {probes}")
    lam = np.linspace(*_range(problem.schedule), levels + 1)
    derivative = Derivative()
    l: list[np.ndarray] = []
    found: list[tuple[np.ndarray, ...]] = []
    before: Level | None = None
    for j, at in enumerate(lam):
        level = Level(problem, float(at))
        l.append(level.measure(_pairs(problem, repeats), probes, pooled, derivative))
        if before is not None:  # whose l' can be had now
            low = max(j - 2, 0)
            found.append(before.regression(l[j - 1], (l[j] - l[low]) / (lam[j] - lam[low])))
        before = level
        if progress is not None:
            progress(j + 1, levels + 1)
    assert before is not None  # noqa: S101 -- for mypy
    found.append(before.regression(l[-1], (l[-1] - l[-2]) / (lam[-1] - lam[-2])))
    s, b, rest, size = (np.stack(each) for each in zip(*found, strict=True))
    count = samples * (problem.fitting[0].target[0, 0].numel() if pooled else 1)
    error = math.sqrt(rest.mean() / (count - 2) / max(size.mean(), 1e-300))
    if error > GOOD_ERROR:
        enough = int(samples * (error / GOOD_ERROR) ** 2) + 1
        warnings.warn(
            f"{samples} samples are few: the derivatives that s and b predict are off by about {error:.0%} from that "
            f"alone. Take about {enough} samples or repeats, or pooled=True",
            stacklevel=2,
        )
    return Statistics(lam, np.stack(l), s, b, samples, problem.guidance, problem.prediction)


def _range(schedule: Schedule) -> tuple[float, float]:
    start, end = (float(schedule.lam(t)) for t in (schedule.t_max, schedule.t_min))
    return start if math.isfinite(start) else -math.log(LARGEST_LEVEL), end


def _pairs(problem: Problem, repeats: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The fitting batches with noises that are independent of their targets: those of the next samples."""
    noise = torch.cat([batch.noise.cpu() for batch in problem.fitting]) / problem.schedule.init_scale
    for repeat in range(1, repeats + 1):
        parts = noise.roll(-repeat, 0).split([len(batch.noise) for batch in problem.fitting])
        for batch, e in zip(problem.fitting, parts, strict=True):
            yield batch, e.to(batch.target)


@dataclass
class Level:
    """One noise level, and after `measure` the mean over the samples of u, y, w and of their products.

    u is -x_0 where there is more noise than signal, else kappa eps: so neither f nor f' is a small difference of large
    numbers.
    """

    problem: Problem
    lam: float

    def measure(self, pairs: Iterator, probes: int | str, pooled: bool, derivative: Derivative) -> np.ndarray:
        """Calls the model on all samples. Returns l."""
        alpha, sigma = scales(self.problem.schedule, self.lam)
        self.sigma, self.noisy = sigma, sigma > alpha
        self.kind, factor = ("sample", -1.0) if self.noisy else ("epsilon", sigma / alpha)
        mean: np.ndarray | float = 0.0
        products: np.ndarray | float = 0.0
        diagonal: np.ndarray | float = 0.0
        count = 0

        def total(v: torch.Tensor) -> np.ndarray:
            v = v.double().sum(0)
            return (v.mean(tuple(range(1, v.ndim)), keepdim=True) if pooled else v).cpu().numpy()

        with torch.no_grad():
            for number, (batch, e) in enumerate(pairs):
                x = alpha * batch.target + sigma * e
                directions = _directions(x, probes, number)
                for v in directions:
                    value, slope = self.slope(batch, x, v, derivative)
                    of_eps = v - alpha * slope if self.noisy else sigma * slope  # sigma d eps / dx v
                    diagonal = diagonal + total(of_eps * v) / (1 if probes == "exact" else len(directions))
                parts = [factor * value.double(), x.double() / alpha, factor * self.along(batch, x, value)]
                mean = mean + np.stack([total(a) for a in parts])
                products = products + np.stack([[total(a * b) for b in parts] for a in parts])
                count += len(x)
        self.mean, self.products = np.asarray(mean / count), np.asarray(products / count)
        return np.asarray(diagonal / count)

    def slope(self, batch: Batch, x: torch.Tensor, v: torch.Tensor, derivative: Derivative):
        """The prediction of `kind` at x and its derivative in the direction v.

        Only the network is differentiated, so that one without a derivative is noticed.
        """
        schedule = self.problem.schedule
        output, slope = derivative(lambda z: batch.model(z, label(schedule, self.lam, x)), x, v, self.sigma)
        of_x, of_output = conversion(self.problem.prediction, self.kind, *scales(schedule, self.lam))
        return of_x * x + of_output * output, of_x * v + of_output * slope

    def predict(self, batch: Batch, x: torch.Tensor, offset: float) -> torch.Tensor:
        """The network's prediction of `kind` at x, at lambda + offset."""
        schedule, lam = self.problem.schedule, self.lam + offset
        output = batch.model(x, label(schedule, lam, x))
        return convert(x, output, self.problem.prediction, self.kind, *scales(schedule, lam))

    def along(self, batch: Batch, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """d/dlambda of the prediction along the ODE: at x after short DDIM steps to both sides. float64."""
        alpha, sigma = scales(self.problem.schedule, self.lam)
        slope = torch.zeros_like(x, dtype=torch.float64)
        for offset, weight in STENCILS[x.dtype == torch.float64].items():
            alpha_to, sigma_to = scales(self.problem.schedule, self.lam + offset)
            if self.noisy:
                there = sigma_to / sigma * x + (alpha_to - sigma_to / sigma * alpha) * value
            else:
                there = alpha_to / alpha * x + (sigma_to - alpha_to / alpha * sigma) * value
            slope += weight * self.predict(batch, there, offset).double()
        return slope

    def combinations(self, l: np.ndarray, rise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f and f' as combinations of (u, y, w): (3, *shape) each. rise: l'.

        With y' = -kappa eps: u = -x_0 gives u' = w, f = u + (1 - l) y; u = kappa eps gives u' = w - u, f = u - l y.
        """
        zero, one = np.zeros_like(l), np.ones_like(l)
        if self.noisy:
            return np.stack([one, 1 - l, zero]), np.stack([l - 1, l - 1 - rise, one])
        return np.stack([one, -l, zero]), np.stack([l - 1, -rise, one])

    def regression(self, l: np.ndarray, rise: np.ndarray) -> tuple[np.ndarray, ...]:
        """s, b, the variance of f' that they leave, and the mean square of f'."""
        f, df = self.combinations(l, rise)
        cov = self.products - self.mean[:, None] * self.mean[None]
        ff, fd, dd = (np.einsum("i...,ij...,j...->...", a, cov, b) for a, b in ((f, f), (f, df), (df, df)))
        size = (f**2 * np.einsum("ii...->i...", self.products)).sum(0)
        varies = ff > 1e-12 * size  # else f is a constant: one Gaussian
        ff = np.where(varies, ff, 1.0)
        s = np.where(varies, fd / ff, 0.0)
        mean = (df * self.mean).sum(0)
        rest = np.where(varies, np.maximum(dd - s * fd, 0.0), 0.0)
        return s, mean - s * (f * self.mean).sum(0), rest, dd + mean**2


def _directions(x: torch.Tensor, probes: int | str, seed: int) -> list[torch.Tensor]:
    if probes == "exact":
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
        return [v.expand_as(x) for v in basis]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, x.shape, generator=generator).mul(2).sub(1).to(x) for _ in range(int(probes))]


def label(schedule: Schedule, lam: float, x: torch.Tensor) -> torch.Tensor:
    """The network's time input at lambda, of x's dtype and device."""
    return torch.tensor(float(schedule.model_time(schedule.t_of_lambda(lam))), dtype=x.dtype, device=x.device)


def scales(schedule: Schedule, lam: float) -> tuple[float, float]:
    """alpha and sigma at lambda."""
    t = schedule.t_of_lambda(lam)
    return float(schedule.alpha(t)), float(schedule.sigma(t))
