"""PNDM: pseudo numerical methods (Liu, Ren, Lin & Zhao 2022, arXiv 2202.09778)."""

from __future__ import annotations

import numpy as np

from ..grid import Grid, Nodes
from ..plan import Plan, row
from .adams import EQUAL
from .line import Line


def pndm(grid: Grid, steps: int, *, skip_prk: bool = True, space: str | None = None) -> Plan:
    """PNDM: the transfer of eq. 11 (= a DDIM step along a combined value) with the linear multistep combination eq. 12.

    Second order, as in the paper's Property 3.2. The combination is the fourth-order one for equal steps, so on a grid
    that is uniform on the line (rectified flow without shift, uniform in time) it is fourth order.

    Args:
        skip_prk: warm up as Stable Diffusion's PLMS does, with one Heun step (2 calls) and shorter combinations. False:
            the paper's three pseudo Runge-Kutta steps (4 calls each; midpoints in time).
        space: the line, 'kappa' (the paper's) or 'flow' (line.py).

    Calls: n intervals make n + 1 calls with skip_prk (diffusers calls this n steps). Without it, n = 1, 2, 3 make 4 n
    calls and each further interval one more. The warm-up calls the network at its end, so it cannot end at sigma = 0.
    """
    least, warm = (2, 1) if skip_prk else (4, 3)
    if steps < least or (not skip_prk and steps in (5, 6, 7, 9, 10, 11)):
        possible = "2, 3, 4, ..." if skip_prk else "4, 8, 12, 13, 14, ..."
        raise ValueError(f"pndm(skip_prk={skip_prk}) makes {possible} model calls, not {steps}")
    n = steps - 1 if skip_prk else steps // 4 if steps < 12 else steps - 9
    nodes = grid.nodes(n)
    warm = min(warm, n)
    if nodes.sigma[warm] == 0.0:
        raise ValueError(
            f"the warm-up of pndm calls the network after interval {warm}, where this grid has sigma = 0: "
            "use more steps or end='t_end'"
        )
    middle = Nodes.at(grid.schedule, (nodes.t[:warm] + nodes.t[1 : warm + 1]) / 2)
    points = Nodes(*(np.append(a, b) for a, b in zip(vars(nodes).values(), vars(middle).values(), strict=True)))
    line = Line(points, space)

    def move(s: int, t: int, *combination: float):  # eq. 11, phi(x_s, e, s, t) with e = sum_j combination_j e_j
        return line.row(s, t, *((line.u[t] - line.u[s]) * np.asarray(combination)))

    calls: list[int] = []  # where the network is called
    rows = []
    kept = []  # the call whose value stands for node i in eq. 12
    for i in range(n):
        kept.append(len(calls))
        if i >= warm:
            values = EQUAL[min(i, 3)]
            spread = np.zeros(len(calls) - kept[i - len(values) + 1] + 1)
            spread[[len(calls) - kept[i - j] for j in range(len(values))]] = values
            calls.append(i)
            rows.append(move(i, i + 1, *spread))  # eq. 12
        elif skip_prk:
            calls += [i, i + 1]
            rows += [(move(i, i + 1, 1.0), row(1.0)), move(i, i + 1, 0.5, 0.5)]
        else:  # eq. 13
            mid = n + 1 + i
            calls += [i, mid, mid, i + 1]
            rows += [(move(i, mid, 1.0), row(1.0)), (move(i, mid, 1.0), row(1.0)), (move(i, i + 1, 1.0), row(1.0))]
            rows.append(move(i, i + 1, 1 / 6, 2 / 6, 2 / 6, 1 / 6))
    return Plan.build("pndm", line.target, points.take([*calls, n]), rows)
