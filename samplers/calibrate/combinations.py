"""The inputs of a plan's calls as combinations of the initial state and of the outputs before them, and back."""

from __future__ import annotations

import numpy as np

from ..plan import ANCHOR, HISTORY, ONE, Plan


def rows_of(inputs: np.ndarray) -> np.ndarray:
    """(K, 2, HISTORY + K), the rows of the plan that has these inputs.

    Args:
        inputs: (K + 1, 1 + K): what each call sees, and the result, over (initial state, m_0, ..., m_{K-1}). An input
            without the initial state, before one that has it, makes a row that is not finite.
    """
    calls = len(inputs) - 1
    rows = np.zeros((calls, 2, HISTORY + calls))
    for k in range(calls):
        with np.errstate(divide="ignore", invalid="ignore"):
            carry = inputs[k + 1, 0] / inputs[k, 0]
            weights = (inputs[k + 1] - carry * inputs[k])[1:]
        rows[k, :, ANCHOR], rows[k, :, HISTORY : HISTORY + k + 1] = carry, weights[k::-1]
    return rows


def combined(plan: Plan) -> np.ndarray:
    """(K, K + 1): each next input over (initial state, m_0, ..., m_{K-1}), with m the network's outputs.

    Raises:
        ValueError: the plan adds noise or constants, or its coefficients vary over the sample.
    """
    if plan.stochastic or plan.rows.ndim > 3 or plan.reads.ndim > 2 or plan.rows[:, :, ONE].any():
        raise ValueError(
            f"plan {plan.name!r} adds noise or constants, or has coefficients that vary over the sample: pass another "
            "start, such as ipndm"
        )
    calls = len(plan)
    state = np.zeros((len(plan.start), calls + 1))
    state[:, 0] = plan.start[:, 0]
    now, anchor, *past = state
    found = []
    for k in range(calls):
        of_now, of_output = plan.reads[k]
        m = of_now * now
        m[k + 1] += of_output
        past = [m, *past]
        values = np.array(past[: plan.rows.shape[2] - HISTORY])
        now, anchor = (r[ANCHOR] * anchor + r[HISTORY : HISTORY + len(values)] @ values for r in plan.rows[k])
        found.append(now)
    return np.array(found)
