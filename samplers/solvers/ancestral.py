"""k-diffusion's ancestral samplers and its DPM-Solver++(SDE), on any schedule.

An ancestral step solves the ODE to a noise level `down` below the next one and adds noise of level `up` back (levels
are sigma / alpha here). With the exact solution of the ODE the next marginal would be exact, whatever the step: the
weak order of the sampler is the order of its ODE step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..grid import Grid, Nodes
from ..plan import Plan, Row, Step, row
from ..prediction import conversion
from .rungekutta import outer_nodes


def euler_ancestral(grid: Grid, steps: int, *, eta: float = 1.0, s_noise: float = 1.0) -> Plan:
    """Ancestral sampling with Euler steps: at s_noise = 1 it is DDIM with noise (Song, Meng & Ermon 2021, arXiv
    2010.02502, eq. 12). Weak order 1, one call per step.

    Args:
        eta: 0 is the ODE (DDIM), 1 ancestral sampling. Larger values are cut where the whole next level is new noise.
        s_noise: multiplies the noise that is added.
    """
    nodes, _ = _outer(grid, steps, 1, eta, s_noise)
    kappa = np.exp(-nodes.lam)
    rows = []
    for i in range(steps):
        down, up = _split(kappa[i], kappa[i + 1], eta)
        rows.append(_step(nodes, i, i + 1, down, s_noise * up))
    return Plan.build("euler_ancestral", "sample", nodes, rows)


def dpm2_ancestral(grid: Grid, steps: int, *, eta: float = 1.0, s_noise: float = 1.0) -> Plan:
    """Ancestral sampling with DPM-Solver-2 steps (Lu et al. 2022, arXiv 2206.00927, algorithm 1, r = 1/2).

    Weak order 2; two calls per step, one in a step to sigma = 0 and, if a call is left over, in the first. Options as
    in `euler_ancestral`, eta at most 1. A step from alpha = 0 adds no noise, because the whole next level would be new
    noise.
    """
    return _two_stages("dpm2_ancestral", "epsilon", grid, steps, eta, s_noise)


def dpmpp_2s_ancestral(grid: Grid, steps: int, *, eta: float = 1.0, s_noise: float = 1.0) -> Plan:
    """Ancestral sampling with DPM-Solver++(2S) steps (Lu et al. 2022, arXiv 2211.01095, algorithm 1, r = 1/2).

    Weak order 2; two calls per step, one in a step to sigma = 0 and, if a call is left over, in the first. Options as
    in `euler_ancestral`, eta at most 1. A step from alpha = 0 adds no noise, because the whole next level would be new
    noise.
    """
    return _two_stages("dpmpp_2s_ancestral", "sample", grid, steps, eta, s_noise)


def dpmpp_sde(
    grid: Grid, steps: int, *, eta: float = 1.0, s_noise: float = 1.0, independent_noise: bool = False
) -> Plan:
    """k-diffusion's single-step DPM-Solver++(SDE) with r = 1/2: the exact integral of a constant x_0 (SDE-DPM-Solver++
    1 of Lu et al. 2022, arXiv 2211.01095, app. C) with x_0 taken at a noisy middle stage.

    Weak order 2; two calls per step, one in a step to sigma = 0 and, if a call is left over, in the first. Options as
    in `euler_ancestral`, and

    Args:
        independent_noise: draw the noises of the stage and of the step independently, which is weak order 1. By
            default they belong to one Brownian motion over sigma / alpha, as with k-diffusion's Brownian tree: order 2.
    """
    nodes, of_first = _outer(grid, steps, 2, eta, s_noise)
    # from alpha = 0 the middle is where an x_0 linear in 1 / kappa has its mean under the step's weight
    nodes = _with_middles(
        grid, nodes, lambda a, b: math.sqrt(a * b) if np.isfinite(a) else b * (2 + eta**2) / (1 + eta**2), of_first
    )
    kappa = np.exp(-nodes.lam)
    rows: list[Step] = [_step(nodes, 0, 1, *_noisy(kappa, eta, s_noise))] if of_first == 1 else []
    for s in range(len(rows), steps - 1, 2):
        (down_m, up_m), (down, up) = _split(kappa[s], kappa[s + 1], eta), _split(kappa[s], kappa[s + 2], eta)
        a, m, b = kappa[s : s + 3]
        common = 0.0 if independent_noise else (a - m) / (a - b) if np.isfinite(a) else 1.0  # of the path from a to b
        carry, (gain,), *_ = _step(nodes, s, s + 2, down)
        noise = s_noise * nodes.alpha[s + 2] * up
        stage = _step(nodes, s, s + 1, down_m, s_noise * up_m)
        rows.append((stage, row(carry, 0.0, noise=noise * math.sqrt(common))))
        rows.append(row(1.0, gain, noise=noise * math.sqrt(1.0 - common)))
    if len(rows) < steps:
        rows.append(_step(nodes, steps - 1, steps, 0.0))
    return Plan.build("dpmpp_sde", "sample", nodes, rows)


def _two_stages(name: str, target: str, grid: Grid, steps: int, eta: float, s_noise: float) -> Plan:
    """The midpoint method (in lambda) on x_0 or on epsilon to `down`, then noise."""
    nodes, of_first = _outer(grid, steps, 2, eta, s_noise)

    def middle(a, b):
        if np.isinf(a):  # where the weight of x_0, uniform in 1 / kappa, has its centre
            return 2.0 * b
        down = _split(a, b, eta)[0]
        if down == 0.0:
            raise ValueError(f"eta = {eta} makes all of level {b:.4g} new noise: choose eta <= 1")
        return math.sqrt(a * down)

    nodes = _with_middles(grid, nodes, middle, of_first)
    kappa = np.exp(-nodes.lam)
    rows: list[Step] = []
    kinds: list[str] = []
    if of_first == 1:
        rows, kinds = [_step(nodes, 0, 1, *_noisy(kappa, eta, s_noise))], ["sample"]
    for s in range(len(rows), steps - 1, 2):
        from_noise = np.isinf(kappa[s])
        kind = "sample" if from_noise else target
        down, up = _split(kappa[s], kappa[s + 2], 0.0 if from_noise else eta)
        rows += [(_step(nodes, s, s + 1, kappa[s + 1], kind=kind), row(1.0))]
        rows += [_step(nodes, s, s + 2, down, s_noise * up, kind)]
        kinds += [kind] * 2
    if len(rows) < steps:
        rows.append(_step(nodes, steps - 1, steps, 0.0, kind="sample"))
        kinds.append("sample")
    # both kinds can be computed from a flow network's output at every level
    reads = [conversion("flow", *of) for of in zip(kinds, nodes.alpha[:steps], nodes.sigma[:steps], strict=True)]
    return Plan.build(name, "flow", nodes, rows, reads)


def _outer(grid: Grid, steps: int, stages: int, eta: float, s_noise: float) -> tuple[Nodes, int]:
    if not (eta >= 0 and s_noise >= 0):
        raise ValueError(f"eta and s_noise must not be negative, got {eta} and {s_noise}")
    nodes, of_first = outer_nodes(grid, steps, stages)
    if eta and nodes.lam[-1] < nodes.lam[0]:
        raise ValueError("eta > 0 needs a grid that runs from noise to data")
    return nodes, of_first


def _noisy(kappa: np.ndarray, eta: float, s_noise: float) -> tuple[float, float]:
    """(down, up) of a first step in one call; from alpha = 0 without noise, as in the steps of two calls."""
    down, up = _split(kappa[0], kappa[1], 0.0 if np.isinf(kappa[0]) else eta)
    return down, s_noise * up


def _with_middles(grid: Grid, outer: Nodes, middle: Callable[[float, float], float], of_first: int) -> Nodes:
    """A call at the level `middle(a, b)` in every step from level a to b > 0; not in a first step of one call."""
    kappa, times = np.exp(-outer.lam), []
    for i, b in enumerate(kappa[1:]):
        inner = [float(grid.schedule.t_of_lambda(-np.log(middle(kappa[i], b))))] if b and (i or of_first > 1) else []
        times += [outer.t[i], *inner]
    if kappa[-1] == 0.0:
        return Nodes.at(grid.schedule, times).then_zero()
    return Nodes.at(grid.schedule, [*times, outer.t[-1]])


def _split(a: float, b: float, eta: float) -> tuple[float, float]:
    """(down, up) of a step from level a to b: DDIM's eta, arXiv 2010.02502, eq. 16, in units of x / alpha."""
    up = b * min(1.0, eta * math.sqrt(max(0.0, 1.0 - (b / a) ** 2)))
    return math.sqrt(b**2 - up**2), up


def _step(nodes: Nodes, s: int, t: int, down: float, up: float = 0.0, kind: str = "sample") -> Row:
    """The ODE from node s to level `down` with x_0 (or epsilon) constant, then noise `up`; in the units of node t."""
    a_s, a_t, s_s = nodes.alpha[s], nodes.alpha[t], nodes.sigma[s]
    if kind == "sample":  # DPM-Solver++ eq. 8
        carry = a_t * down / s_s
        return row(carry, a_t - carry * a_s, noise=a_t * up)
    carry = a_t / a_s  # DPM-Solver eq. 3.7
    return row(carry, a_t * down - carry * s_s, noise=a_t * up)
