"""What makes a table of numbers a plan that can run."""

from __future__ import annotations

import numpy as np

from ._names import unknown
from ._table import ARRAYS, HISTORY, Table
from .grid import MOST_CALLS
from .origin import Origin
from .prediction import PREDICTIONS

_LARGEST = float(np.finfo(np.float32).max)


def check(plan: Table) -> None:
    """That a plan can run.

    Raises:
        ValueError: it cannot; the message names the plan and the array.
    """
    if not (isinstance(plan.name, str) and len(plan.name) <= 1000 and plan.name.isprintable()):
        raise ValueError(f"a plan's name must be one line of at most 1000 characters, got {str(plan.name)[:100]!r}")
    if not isinstance(plan.prediction, str) or plan.prediction not in PREDICTIONS:
        raise unknown("prediction", plan.prediction, PREDICTIONS)
    if not isinstance(plan.origin, Origin | None):
        raise ValueError(f"plan {plan.name!r}: origin must be a samplers.Origin, got {type(plan.origin).__name__}")

    def require(condition, what: str) -> None:
        if not condition:
            raise ValueError(f"plan {plan.name!r}: {what}")

    t, alpha, sigma, label, rows, reads, start = (getattr(plan, name) for name in ARRAYS)
    calls = len(label) if label.ndim == 1 else 0
    require(0 < calls <= MOST_CALLS, f"label has shape {label.shape}, not (K,) with 1 to {MOST_CALLS} calls")
    for name, array in {"t": t, "alpha": alpha, "sigma": sigma}.items():
        require(array.shape == (calls + 1,), f"{name} has shape {array.shape}, not {(calls + 1,)}")
    fits = rows.ndim > 2 and rows.shape[:2] == (calls, 2) and rows.shape[2] > HISTORY and rows.size
    require(fits, f"rows have shape {rows.shape}, not ({calls}, 2, 3+H, *shape) with H at least 1")
    fits = reads.ndim > 1 and reads.shape[:2] == (calls, 2) and reads.size
    require(fits, f"reads have shape {reads.shape}, not ({calls}, 2, *shape)")
    width = rows.shape[2] - HISTORY
    fits = start.ndim == 2 and 2 <= len(start) <= 2 + width and start.shape[1] == 2
    require(fits, f"start has shape {start.shape}, not (2+P, 2) with P <= {width}")
    for name in ARRAYS:
        largest = np.abs(getattr(plan, name)).max()  # NaN if one is
        require(largest <= _LARGEST, f"{name} holds a number that is not finite in float32; try other nodes")
    require((alpha >= 0).all() and (sigma >= 0).all(), "alpha and sigma must not be negative")
    require((sigma[:-1] > 0).all() and alpha[-1] + sigma[-1] > 0, "the network is called at sigma = 0")

    used = (rows[:, :, HISTORY:] != 0).any(axis=(1, *range(3, rows.ndim)))  # (call, how many calls ago)
    early = used & (np.arange(width) >= np.arange(calls)[:, None] + len(start) - 1)
    require(not early.any(), f"call {early.any(1).argmax()} uses an output older than the first")

    angle = np.arctan2(sigma, alpha)
    order = np.lexsort((angle, t))
    level, apart = np.diff(angle[order]), np.diff(t[order]) > 1e-9 * np.abs(t).max()
    moved = (np.diff(alpha[order]) != 0) | (np.diff(sigma[order]) != 0)
    grows = (level[apart] > -1e-12).all() and moved[apart].all() and (level[~apart] < 1e-5).all()
    require(grows, "the noise level does not grow with t")
    labels, apart = np.diff(label[order[order < calls]]), np.diff(t[order[order < calls]]) > 1e-9 * np.abs(t).max()
    slack = 1e-5 * np.abs(label).max() + 1e-12
    require((labels >= -slack).all() and (labels[~apart] <= slack).all(), "the labels do not grow with t")


def check_direction(plan: Table) -> None:
    """That the times of a saved plan run one way from step to step.

    Stages may lie anywhere, and noise may raise the level (EDM's churn). A plan in memory may also go up in the steps
    of `tail`, which lead out of a step in whose middle an image-to-image run begins.

    Raises:
        ValueError: they change direction.
    """
    ends = np.flatnonzero([*plan._loop.same[:-1], True])  # the calls that end a step
    moves = np.diff(plan.t[np.append(0, ends + 1)])
    moves = moves[~(np.array(plan._loop.noisy)[ends] & (moves > 0))]
    if not ((moves <= 0).all() or (moves >= 0).all()):
        raise ValueError(f"plan {plan.name!r}: its times change direction, but t must go down from step to step")
