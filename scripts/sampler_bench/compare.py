"""Error of many methods on one problem, and ratios of such errors with paired bootstrap intervals.

A problem has `name, schedule, prediction, z, model(x, label), exact[end]`; a method is a function `(problem, calls) ->
(result, end)` that raises ValueError where it cannot make that number of calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Methods = dict[str, Callable]


def errors(problem, method: Callable, calls: int) -> np.ndarray | None:
    """(samples,): mean squared error of every sample against the exact solution at the method's own end.

    None where the method cannot make that many calls; inf where the result is not finite.
    """
    try:
        x, end = method(problem, calls)
    except (ValueError, FloatingPointError):
        return None
    square = (x.double() - problem.exact[end]).square().flatten(1).mean(1)
    return torch.nan_to_num(square, nan=torch.inf).numpy()


def measure(problem, methods: Methods, calls: int) -> dict[str, np.ndarray]:
    """Every method's errors, the best first."""
    found = {name: errors(problem, method, calls) for name, method in methods.items()}
    return dict(sorted(((n, e) for n, e in found.items() if e is not None), key=lambda item: rmse(item[1])))


def rmse(squares: np.ndarray) -> float:
    return float(np.sqrt(squares.mean()))


def ratio(a: np.ndarray, b: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """RMSE(a) / RMSE(b) and its 95 % interval over the samples, which both methods share."""
    pick = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    low, high = np.quantile(np.sqrt(a[pick].mean(1) / b[pick].mean(1)), [0.025, 0.975])
    return rmse(a) / rmse(b), float(low), float(high)


def geometric_mean(values) -> float:
    return float(np.exp(np.mean(np.log(values))))
