"""Adams-Bashforth-Moulton: a linear multistep predictor whose step is corrected, at no cost, by the next call."""

from __future__ import annotations

import numpy as np

from ..grid import Grid
from ..plan import Plan
from .adams import exact
from .line import Line


def abm(
    grid: Grid, steps: int, *, order: int = 4, final_order: int = 2, corrector: bool = True, space: str | None = "flow"
) -> Plan:
    """Adams predictor-corrector (PEC; Hairer, Norsett & Wanner, Solving ODEs I, sec. III.1) along a line of line.py.

    What UniPC (Zhao et al. 2023, arXiv 2302.04867) is along lambda, this is along u = sigma / (alpha + sigma), which is
    finite at pure noise and at sigma = 0, so that no step needs a lower order. Order `order` + 1 with the corrector
    (`order` without) if `final_order` = `order`; one call per step.

        predictor   P_{i+1} = X_i + int of the polynomial through m_i, m_{i-1}, ... (`order` values)
        corrector   X_{i+1} = X_i + int of the polynomial through m_{i+1}, m_i, ... (one more); m_{i+1} is from P_{i+1}

    Args:
        order: values that the predictor uses, at least 1.
        final_order: the last predictors use order, ..., final_order values: more stable with few steps.
        corrector: False is the predictor alone, = `lms`.
        space: the line, 'flow' or 'kappa'.
    """
    for name, value in {"order": order, "final_order": final_order}.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"abm needs {name} of at least 1, got {value!r}")
    nodes = grid.nodes(steps)
    line = Line(nodes, space)
    rows, change = [], np.zeros(0)
    for i in range(steps):
        p = min(order, i + 1, max(final_order, steps - i))
        w = _weights(line.u, i, range(i, i - p, -1))
        # X_i = P_i + change: only weights differ, so the state that is carried is P and one row does both
        rows.append(line.row(i, i + 1, *_add(w, change)))
        if corrector:
            change = _add(_weights(line.u, i, range(i + 1, i - p, -1)), -np.append(0.0, w))
    return Plan.build(f"abm(order={order})", line.target, nodes, rows)


def _weights(u: np.ndarray, i: int, at) -> np.ndarray:
    """The integral over [u_i, u_{i+1}] of the polynomial through the values at the nodes `at`, one weight for each."""
    h = u[i + 1] - u[i]
    return h * exact((u[list(at)] - u[i]) / h)


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(a), len(b)))
    total[: len(a)] += a
    total[: len(b)] += b
    return total
