"""The rest of a plan from one of its calls on, for a run that starts in the middle (image-to-image, a refiner)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .plan import ANCHOR, HISTORY, Plan
from .prediction import conversion


def tail(plan: Plan, first: int) -> Plan:
    """Calls first, first + 1, ... of `plan`, begun from a state at the level of call `first`; the labels stay.

    The plan's own rows begin at the first call that is at the beginning of a step (its input is its anchor) and from
    which no row uses an output older than this run. The calls before it become first-order (DDIM) steps from each
    call's time to the next. They fill the history that the plan's rows need.

    Args:
        first: 0 <= first < len(plan).

    Raises:
        ValueError: `first` is out of range, or x_0 cannot be computed at a call that becomes a DDIM step. The message
            names the calls at which the plan can begin.
    """
    if not 0 <= first < len(plan):
        raise ValueError(f"this plan has {len(plan)} calls: it can begin at 0 to {len(plan) - 1}, not at {first}")
    if first == 0:
        return plan
    own = _own_rows_from(plan, first)
    rows = plan.rows[first:].copy()
    for k in range(first, own):
        carry, weight = _ddim(plan, k, first)
        rows[k - first] = 0.0
        rows[k - first, :, ANCHOR], rows[k - first, :, HISTORY] = carry, weight
    cut = {name: getattr(plan, name)[first:] for name in ("t", "alpha", "sigma", "label", "reads")}
    return replace(plan, rows=rows, start=np.array([[1.0, 0.0], [1.0, 0.0]]), **cut)


def _own_rows_from(plan: Plan, first: int) -> int:
    """The first call >= `first` from which the plan's own rows can be used; len(plan) if there is none."""
    used = plan.rows[:, :, HISTORY:] != 0.0
    used = used.any(axis=(1, *range(3, used.ndim)))  # (call, how many calls ago)
    oldest = np.array([k - max(np.flatnonzero(u), default=0) for k, u in enumerate(used)])
    for k in range(first, len(plan)):
        if (plan.rows[k - 1, 0] == plan.rows[k - 1, 1]).all() and oldest[k:].min() >= first:
            return k
    return len(plan)


def _ddim(plan: Plan, k: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of (x_k, m_k) in a DDIM step from call k to the next point: arXiv 2010.02502, eq. 12."""
    of_x, of_output = plan.reads[k]
    try:
        x_to_x0, output_to_x0 = conversion(plan.prediction, "sample", plan.alpha[k], plan.sigma[k])
        if not np.all(of_output):
            raise ValueError(f"the history of call {k} does not hold the network's output")
    except ValueError as error:
        able = [i for i in range(len(plan)) if i == 0 or _own_rows_from(plan, i) == i]
        raise ValueError(f"this plan cannot begin at call {first} ({error}); it can at {able}") from None
    carry = plan.sigma[k + 1] / plan.sigma[k]
    x0 = plan.alpha[k + 1] - carry * plan.alpha[k]
    # x_0 = x_to_x0 x + output_to_x0 output, and m = of_x x + of_output output
    return carry + x0 * (x_to_x0 - output_to_x0 * of_x / of_output), x0 * output_to_x0 / of_output
