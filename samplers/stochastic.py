"""Predictor-corrector sampling of the reverse SDE (Song et al. 2021, arXiv 2011.13456).

The predictors are solvers like all others, `x_t = keep x_s + push score + spread z` with score = -eps / sigma; so is
annealed Langevin dynamics. The Langevin corrector is not linear, because its step size depends on the score. It is a
`LangevinPlan`, with the same `step` as any plan. The formulas use noise levels only: VPLinear and VPDiscrete give the
paper's VP SDE, EDM (alpha = 1) its VE SDE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from ._names import unknown
from .grid import Grid, Nodes
from .plan import Plan, Row, State, row
from .schedule import EDM, VPLinear
from .transition import Transition


class Undone(NamedTuple):
    """The noising steps that n predictor calls undo: `x_s = carry x_t + sqrt(g2) z`, from node t to the noisier s."""

    nodes: Nodes  # where the calls are, then the end
    carry: np.ndarray  # (n,)
    g2: np.ndarray  # (n,) variance of the noise
    ratio: np.ndarray  # (n,) sigma_t / sigma_s


def _forward(grid: Grid, n: int, as_published: bool) -> Undone:
    if as_published:
        return _published(grid, n)
    nodes = grid.nodes(n)
    carry = nodes.alpha[:-1] / nodes.alpha[1:]
    g2 = nodes.sigma[:-1] ** 2 - (carry * nodes.sigma[1:]) ** 2  # so that the marginals are exactly the schedule's
    if (g2 < 0).any():
        raise ValueError("the reverse SDE needs a grid that runs from noise to data")
    return Undone(nodes, carry, g2, nodes.sigma[1:] / nodes.sigma[:-1])


def _published(grid: Grid, n: int) -> Undone:
    """The discrete SDE of the authors' code. It has n levels of its own, and each time is rounded to one of them."""
    nodes, schedule = _published_nodes(grid, n), grid.schedule
    eps = grid.t_end
    if isinstance(schedule, EDM):  # the t of sigma(t) = sigma_min (sigma_max / sigma_min)^t
        eps = math.log(eps / schedule.t_min) / math.log(schedule.t_max / schedule.t_min)
    index = (torch.linspace(1.0, eps, n, dtype=torch.float64) * (n - 1)).long().numpy()  # the code truncates
    if isinstance(schedule, VPLinear):
        betas = np.linspace(schedule.beta_min / n, schedule.beta_max / n, n)
        if betas.max() >= 1.0:
            raise ValueError(f"as_published needs more than beta_max = {schedule.beta_max:g} predictor steps, got {n}")
        level = np.sqrt(1.0 - np.cumprod(1.0 - betas))
        carry, g2 = np.sqrt(1.0 - betas), betas
    else:
        level = np.exp(np.linspace(math.log(schedule.t_min), math.log(schedule.t_max), n))
        carry, g2 = np.ones(n), np.diff(level**2, prepend=0.0)
    ratio = np.append(0.0, level[:-1]) / level
    return Undone(nodes, carry[index], g2[index], ratio[index])


def _published_nodes(grid: Grid, n: int) -> Nodes:
    """n calls from t_start to t_end inclusive: uniform in t (VP) or in log sigma (VE, whose sigma(t) is geometric)."""
    kind = {VPLinear: "time", EDM: "logsnr"}.get(type(grid.schedule))
    if kind is None or grid.given is not None or grid.kind != kind or grid.t_start != grid.schedule.t_max:
        raise ValueError("as_published needs VPLinear with grid 'time' or EDM with grid 'logsnr', from t_max on")
    return Grid(grid.schedule, kind, t_end=grid.t_end).nodes(n)


class Moves(NamedTuple):
    """The steps `x_t = keep x_s + push score + spread z`; arrays (n,)."""

    keep: np.ndarray
    push: np.ndarray
    spread: np.ndarray

    def of_flow(self) -> Moves:
        """The same steps of the probability flow (eq. 13): half the push and no noise."""
        return Moves(self.keep, self.push * 0.5, self.spread * 0.0)


def _plan(name: str, grid: Grid, nodes: Nodes, moves: Moves, as_published: bool) -> Plan:
    """The plan of these steps, whose last one ends as `grid` says."""
    keep, push, spread = (each.copy() for each in moves)
    if as_published:
        spread[-1] *= grid.end != "zero"  # the result is the mean of the last step
    elif nodes.sigma[-1] == 0.0 and nodes.alpha[-2] == 0.0:
        raise ValueError(f"{name} needs a call between alpha = 0 and sigma = 0: take more steps or a smaller t_start")
    elif nodes.sigma[-1] == 0.0:  # Tweedie's formula, the paper's last step without noise (app. G)
        keep[-1], push[-1], spread[-1] = 1 / nodes.alpha[-2], nodes.sigma[-2] ** 2 / nodes.alpha[-2], 0.0
    rows = [row(a, -b / s, noise=c) for a, b, c, s in zip(keep, push, spread, nodes.sigma[:-1], strict=True)]
    return Plan.build(name, "epsilon", nodes, rows)


def reverse_diffusion(grid: Grid, steps: int, *, probability_flow: bool = False, as_published: bool = False) -> Plan:
    """Reverse diffusion sampling (arXiv 2011.13456, app. E): the reverse SDE discretised as the forward one is.

    Weak order 1, one call per step; also from alpha = 0. A step to sigma = 0 is the denoised mean.

    Args:
        probability_flow: the ODE with the same marginals instead; no noise, order 1.
        as_published: the betas and sigmas of the authors' code (docs/corrections.md), on VPLinear with grid 'time' or
            EDM with grid 'logsnr'. Calls at both t_start and t_end, more than beta_max of them on VP. end='zero'
            returns the mean of the last step (their denoise=True), end='t_end' the state with its noise.
    """
    nodes, carry, g2, _ = _forward(grid, steps, as_published)
    # eq. 46: x - f(x) + G^2 score + G z, with f(x) = (carry - 1) x
    moves = Moves(2.0 - carry, g2, np.sqrt(g2))
    return _plan("reverse_diffusion", grid, nodes, moves.of_flow() if probability_flow else moves, as_published)


def ancestral_sampling(
    grid: Grid, steps: int, *, variance: Literal["small", "large"] | None = None, as_published: bool = False
) -> Plan:
    """Ancestral sampling (arXiv 2011.13456, eq. 4 and app. F): the mean and a variance of p(x_t | x_s).

    Weak order 1, one call per step. 'small' is the same method as `ddim` with eta = 1.

    Args:
        variance: 'small' is the posterior's at known x_0 (the paper's VE), 'large' the forward step's (the paper's
            VP). None is 'small', and what the paper has if as_published.
        as_published: as in `reverse_diffusion`.
    """
    if variance not in (None, "small", "large"):
        raise unknown("variance", variance, ("small", "large"))
    if variance is None:
        variance = "large" if as_published and isinstance(grid.schedule, VPLinear) else "small"
    nodes, carry, g2, ratio = _forward(grid, steps, as_published)
    if (carry == 0.0).any():
        raise ValueError("ancestral_sampling cannot start at alpha = 0: use ddim with eta=1, or a smaller t_start")
    spread = np.sqrt(g2) * (ratio if variance == "small" else 1.0)
    # eq. 4 (carry = sqrt(1 - beta_i), G^2 = beta_i); app. F (carry = 1, G^2 = sigma_i^2 - sigma_{i-1}^2)
    return _plan("ancestral_sampling", grid, nodes, Moves(1.0 / carry, g2 / carry, spread), as_published)


def euler_maruyama(grid: Grid, steps: int, *, probability_flow: bool = False, as_published: bool = False) -> Plan:
    """Euler-Maruyama for the reverse SDE (arXiv 2011.13456, eq. 6) in the schedule's own time.

    Weak order 1, one call per step. A step to sigma = 0 is the denoised mean.

    Args:
        probability_flow: Euler's method for eq. 13 instead.
        as_published: as in `reverse_diffusion`, any number of steps; dt = 1/N although the calls are
            (1 - t_end) / (N - 1) apart.
    """
    schedule = grid.schedule
    nodes = _published_nodes(grid, steps) if as_published else grid.nodes(steps)
    t, sigma, dt = nodes.t[:-1], nodes.sigma[:-1], np.diff(nodes.t)
    if (nodes.alpha[:-1] == 0.0).any():
        raise ValueError("the reverse SDE is singular at alpha = 0: use a smaller t_start, or reverse_diffusion")
    if as_published and isinstance(schedule, VPLinear):
        dt = np.full(steps, -1.0 / steps)
    elif as_published:  # the same in the clock log sigma, in which sigma(t) is geometric
        dt = -t * math.log(schedule.t_max / schedule.t_min) / steps
    d_alpha, d_sigma = schedule.rates(t)
    f = d_alpha / nodes.alpha[:-1]  # -beta / 2 in eq. 11
    g2 = 2.0 * sigma * (d_sigma - sigma * f)  # beta in eq. 11, d sigma^2 / dt in eq. 9
    if (dt > 0).any():
        raise ValueError("the reverse SDE needs a grid that runs from noise to data")
    # eq. 6: x + (f x - g^2 score) dt + g sqrt(|dt|) z, dt < 0
    moves = Moves(1.0 + f * dt, -g2 * dt, np.sqrt(-g2 * dt))
    return _plan("euler_maruyama", grid, nodes, moves.of_flow() if probability_flow else moves, as_published)


@dataclass(frozen=True, eq=False)
class LangevinPlan(Plan):
    """A plan some of whose calls are Langevin correctors, which are not linear in the model's output.

    There the row is the step of size 1, `x + score + sqrt(2) z`; the size is 2 (pace ||z|| / ||score||)^2.

    pace: (K,) the paper's r, 0 at the calls that are linear. batch_norms: average both norms over the batch. If not,
        each sample has its own ||score||, and ||z|| is sqrt(d), because a step size that depends on the noise would
        change the noise's distribution. A sample whose score is exactly 0 then stays as it is.
    """

    pace: tuple[float, ...] = ()
    batch_norms: bool = False

    _minus_sigma: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_minus_sigma", (-self.sigma).tolist())

    def step(self, k: int, state: State, model_output: torch.Tensor, noise: torch.Tensor | None = None) -> State:
        after = super().step(k, state, model_output, noise)
        pace = self.pace[k - len(self)]  # counted from the end, which a tail of the plan shares
        if not pace or noise is None:
            return after
        score = after.history[0] / self._minus_sigma[k]
        noise = noise.to(score.dtype)
        norm = score.flatten(1).norm(dim=1)
        if self.batch_norms:
            length = (noise.flatten(1).norm(dim=1).mean() / norm.mean()).expand_as(norm)
        else:
            length = math.sqrt(score[0].numel()) / norm.masked_fill(norm == 0, math.inf)
        size = 2 * (pace * length.view(-1, *[1] * (score.ndim - 1))) ** 2
        x = state.input + size * score + (2 * size).sqrt() * noise  # Algorithms 4 and 5, the corrector's lines
        return after._replace(input=x, anchor=x)

    def transition(self, k: int) -> Transition:
        found = super().transition(k)
        if self.pace[k - len(self)]:
            raise ValueError(
                f"call {k} of plan {self.name!r} is a Langevin corrector. The size of its noise depends on the "
                "network's output, so its draw has no fixed standard deviation: use corrector='ald' or 'none'"
            )
        return found

    def save(self, path) -> None:
        raise ValueError(f"plan {self.name!r} has Langevin correctors, which are no table, so it cannot be saved")


PREDICTORS: dict[str, Callable[..., Plan]] = {
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "euler_maruyama": euler_maruyama,
}
CORRECTORS = ("langevin", "ald", "none")


def predictor_corrector(
    grid: Grid,
    steps: int,
    *,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
    probability_flow: bool = False,
    as_published: bool = False,
) -> Plan:
    """Predictor-corrector sampling (arXiv 2011.13456, Algorithms 1, 4 and 5): at each node correct, then predict.

    This is the order of the authors' code; the last call denoises.
    `steps` model calls are steps / (1 + corrector_steps) predictor steps; a predictor or corrector 'none' makes no
    calls, and without predictor the state stays at the last node. Weak order 1 up to the corrector's own bias of
    O(snr^2), which more steps do not remove.

    Args:
        predictor: a name in `PREDICTORS` or 'none'.
        corrector: 'langevin' (step size 2 (snr ||z|| / ||score||)^2), 'ald' (2 (snr sigma)^2; linear) or 'none'. The
            variance of 'langevin' is too large by a factor of about d / (d - 2) in d dimensions, which is negligible
            for images.
        corrector_steps: corrector calls per node.
        snr: the paper's r, > 0. The authors use 0.16 for VE models of 32x32 images, 0.01 for VP.
        probability_flow: the predictor follows the ODE.
        as_published: the predictor as published, norms averaged over the batch (a sample's result then depends on
            the others) and the step size times alpha_i = 1 - beta_i on VP. Without it the corrector is the same on VP
            and VE.
    """
    if predictor not in (*PREDICTORS, "none"):
        raise unknown("predictor", predictor, (*PREDICTORS, "none"))
    if corrector not in CORRECTORS:
        raise unknown("corrector", corrector, CORRECTORS)
    if not snr > 0:
        raise ValueError(f"snr must be above 0, got {snr}")
    if not isinstance(corrector_steps, int) or corrector_steps < 1:
        raise ValueError(f"corrector_steps must be a whole number, at least 1, got {corrector_steps!r}")
    if probability_flow and predictor not in ("reverse_diffusion", "euler_maruyama"):
        raise ValueError(f"predictor {predictor!r} has no probability flow: use reverse_diffusion or euler_maruyama")
    m = 0 if corrector == "none" else corrector_steps
    each = m + (predictor != "none")
    if not each:
        raise ValueError("a predictor and a corrector that are both 'none' make no model call")
    n = steps // each
    if n < 1 or n * each != steps:
        near = f"{n * each} or {(n + 1) * each}" if n else f"{each}"
        raise ValueError(f"predictor_corrector makes {each} model calls per step, so not {steps}; use e.g. {near}")
    nodes = _published_nodes(grid, n) if as_published else grid.nodes(n)
    rows: list[Row] = []
    if predictor != "none":
        flow = {"probability_flow": True} if probability_flow else {}
        moves = PREDICTORS[predictor](grid, n, as_published=as_published, **flow).rows[:, 0]
    root = _forward(grid, n, True).carry if as_published and m else np.ones(n)  # sqrt(alpha_i) of Algorithm 5
    pace = []
    for k in range(n):
        r, sigma = float(snr * root[k]), nodes.sigma[k]
        size = 1.0 if corrector == "langevin" else 2 * (r * sigma) ** 2
        rows += [row(1.0, -size / sigma, noise=math.sqrt(2 * size))] * m
        pace += [r if corrector == "langevin" else 0.0] * m
        if predictor != "none":
            anchor, noise, _, eps = moves[k]
            rows.append(row(anchor, eps, noise=noise))
            pace.append(0.0)
    seen = nodes.take([*np.repeat(np.arange(n), each), n if predictor != "none" else n - 1])
    name = f"predictor_corrector({predictor}, {corrector})"
    if corrector != "langevin":
        return Plan.build(name, "epsilon", seen, rows)
    return replace(LangevinPlan.build(name, "epsilon", seen, rows), pace=tuple(pace), batch_norms=as_published)
