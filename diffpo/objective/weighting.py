"""Weights of timesteps, omega(t): each multiplies a reward before the link, r = (beta/2) omega(t) (err_ref - err).

A weighting is a table over the model's T timesteps, and none depends on the policy, so that a resumed run goes on with
the same one.

uniform   1, as Diffusion-DPO.
min_snr   min(snr, 5) / snr where the network predicts noise, min(snr, 5) / (snr + 1) where it predicts v, and
          min(snr, 5) sigma^2 for a flow: all weigh the error of x_0 by min(snr, 5) (Hang et al. 2023, arXiv 2303.09556,
          section 3.4). Not normalised: it is at most 1, so rewards shrink as if beta were smaller.
measured  proportional to 1 / E[error of the base | t], mean 1 over t. The error of predicted noise falls by orders of
          magnitude from t = 0 to T, and rewards with it; this brings the timesteps to one scale. The errors are means
          over `BINS` equal ranges of t, on a fixed set of draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..common.errors import DiffpoError

if TYPE_CHECKING:
    from torch import Tensor

    from ..common.worker import Worker
    from ..data.batches import Batch, Batches
    from ..models.process import ForwardProcess
    from ..problems.policy import Policy
    from ..problems.regression import Regression

GAMMA = 5.0  # of min-SNR; the paper's choice
BINS = 16  # ranges of t within which `measured` is constant
DRAWS = 256  # groups that it is measured on


class Omega:
    """(N,) timesteps -> (N,) float32 weights, from a table (T,)."""

    def __init__(self, table: Tensor) -> None:
        self.table = table.float()

    def __call__(self, t: Tensor) -> Tensor:
        self.table = self.table.to(t.device)
        return self.table[t]


def make(kind: str, family: ForwardProcess, errors: Tensor | None = None) -> Omega:
    """The weighting that ``objective.weighting`` names; ``errors`` (T,) of `measure` for `measured`."""
    import torch

    if kind == "uniform":
        return Omega(torch.ones(family.train_timesteps))
    if kind == "min_snr":
        return Omega(min_snr(family))
    if errors is None:
        raise ValueError(f"weighting {kind} needs the measured errors")
    inverse = 1 / errors.double()
    return Omega(inverse / inverse.mean())


def min_snr(family: ForwardProcess, gamma: float = GAMMA) -> Tensor:
    """(T,) float64; exact at both ends: 1 (0 for v and flows) without signal, 0 without noise."""
    import torch

    alpha, sigma = (each.double().flatten() for each in family.alpha_sigma(torch.arange(family.train_timesteps)))
    if family.prediction == "epsilon":
        return (gamma * (sigma / alpha).square()).clamp(max=1)
    # v: snr + 1 = 1 / sigma^2 where alpha^2 + sigma^2 = 1; a flow's error is that of x_0 over sigma^2, as v's is
    return torch.minimum(alpha.square(), gamma * sigma.square())


def measure(
    policy: Policy,
    error: Callable[[Policy, Regression], Tensor],
    source: Callable[[Batch], Regression],
    batches: Batches,
    rows: int,
    worker: Worker,
) -> Tensor:
    """E[error of the base | t] for every timestep, (T,) float64, constant within a bin; on all processes together.

    ``error(base, regression)`` gives (N,) errors as the objective measures them. The draws are `DRAWS` groups spread
    over those of ``batches``, ``rows`` in a forward pass, turned into regressions by ``source``: fixed by the run's
    seed, whatever the number of processes. A bin without draws (a source with few levels) takes the mean of the
    nearest one. DiffpoError if an error is not finite or a bin's mean is 0.
    """
    found: list[tuple[int, int, float]] = []  # position, t, error
    mine = list(range(DRAWS))[worker.index :: worker.count]
    for start in range(0, len(mine), rows):
        positions = mine[start : start + rows]
        indices = [position * len(batches.groups) // DRAWS for position in positions]
        regression = source(batches.batch(indices, positions, purpose="weighting"))
        with policy.switched(None) as base:
            errors = error(base, regression).cpu().double().tolist()
        found += zip(positions * regression.judgement.members, regression.t.tolist(), errors, strict=True)
    found = sorted(worker.gather(found))  # the same order of summation on every machine
    return by_bin([t for _, t, _ in found], [e for _, _, e in found], policy.family.train_timesteps)


def by_bin(t: Sequence[int], errors: Sequence[float], timesteps: int) -> Tensor:
    """Means of ``errors`` within `BINS` equal ranges of the timesteps, spread over the ranges: (timesteps,) float64."""
    import torch

    place = torch.tensor(t) * BINS // timesteps
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, torch.tensor(errors, dtype=torch.float64))
    counts = torch.bincount(place, minlength=BINS)
    filled = counts.nonzero().flatten()
    means = sums[filled] / counts[filled]
    if not (means.isfinite() & (means > 0)).all():
        raise DiffpoError(
            "objective.weighting=measured: the base model's error is not a positive number at every timestep; check "
            "its weights and train.precision, or use weighting=uniform"
        )
    nearest = (torch.arange(BINS)[:, None] - filled).abs().argmin(1)
    return means[nearest][torch.arange(timesteps) * BINS // timesteps]
