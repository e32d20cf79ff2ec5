"""One more call at the end of a plan that stops at t_end > 0; its x_0 is the result ("denoise to zero")."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..plan import HISTORY, Plan
from ..prediction import conversion
from ..schedule import Schedule


def then_denoise(plan: Plan, schedule: Schedule) -> Plan:
    """`plan` and one more model call, at the plan's end, whose prediction of x_0 is returned (sigma = 0).

    The same as a last DDIM step from t_end to sigma = 0; works with every solver and prediction.

    Args:
        plan: K calls, ending at t_end. schedule: the network's, for its label there.

    Returns: a plan of K + 1 calls.

    Raises:
        ValueError: the plan already ends at sigma = 0.
    """
    if plan.sigma[-1] == 0.0:
        raise ValueError(f"plan {plan.name!r} already ends at sigma = 0, so there is nothing to denoise")
    rows, reads = np.zeros_like(plan.rows[:1]), np.zeros_like(plan.reads[:1])
    rows[:, :, HISTORY] = 1.0
    reads[0, 0], reads[0, 1] = conversion(plan.prediction, "sample", plan.alpha[-1], plan.sigma[-1])
    return replace(
        plan,
        name=f"{plan.name}+denoise",
        t=np.append(plan.t, 0.0),
        alpha=np.append(plan.alpha, 1.0),
        sigma=np.append(plan.sigma, 0.0),
        label=np.append(plan.label, schedule.model_time(plan.t[-1])),
        rows=np.concatenate([plan.rows, rows]),
        reads=np.concatenate([plan.reads, reads]),
    )
