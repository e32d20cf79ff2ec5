"""A first value without a call: at high noise the network's output is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..plan import HISTORY, ONE, Plan


def without_first_call(plan: Plan) -> Plan:
    """The plan with eps = x / sqrt(alpha^2 + sigma^2) in place of its first model call ("analytical first step", GENIE,
    Dockhorn et al. 2022, arXiv 2210.05475; AFS in diff-sampler). The error is about that of data of variance 1.

    Works for every solver whose first step adds no noise.

    Raises:
        ValueError: a plan of one call, a first step with noise, or one at alpha = 0, where eps does not give x_0.
    """
    if len(plan) < 2:
        raise ValueError("without_first_call needs a plan of at least two calls")
    if plan.needs_noise(0) or plan.rows[0, :, ONE].any():
        raise ValueError(f"the first step of plan {plan.name!r} adds noise or a constant: its call must stay")
    of_x, of_eps = plan.for_prediction("epsilon").reads[0]
    eps = 1.0 / np.hypot(plan.alpha[0], plan.sigma[0])
    first, anchor, *past = plan.start  # combinations of (x, noise), as everything below
    past = [(of_x + of_eps * eps) * first, *past][: plan.rows.shape[2] - HISTORY]
    known = np.zeros((plan.rows.shape[2], 2))
    known[0], known[HISTORY : HISTORY + len(past)] = anchor, past
    start = np.stack([plan.rows[0, 0] @ known, plan.rows[0, 1] @ known, *past])
    later = {name: getattr(plan, name)[1:] for name in ("t", "alpha", "sigma", "label", "rows", "reads")}
    return replace(plan, name=f"{plan.name}, free first call", start=start, **later)
