"""What every distance starts from: checked features, their groups, and intervals from independent groups."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

import numpy as np

from ...common.errors import DiffpoError
from ..statistics import Estimate, wilson

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
RESAMPLES = 200


def checked(features, what: str = "the features") -> np.ndarray:
    """``features`` as a float64 array (n, d). DiffpoError unless n is at least 2 and all numbers are finite."""
    found = np.asarray(features, np.float64)
    if found.ndim != 2 or not found.shape[1]:
        raise DiffpoError(f"{what} have the shape {found.shape}; one row of numbers for each picture was expected")
    if len(found) < 2:
        raise DiffpoError(f"{what} are of {len(found)} picture; a distance of distributions needs at least 2 of them")
    if not np.isfinite(found).all():
        row = int((~np.isfinite(found)).any(1).argmax())
        raise DiffpoError(f"{what} of picture {row} are not finite; leave that picture out, or take other features")
    return found


def pair(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Both sets, `checked`. DiffpoError if they have different numbers of features."""
    x, y = checked(x), checked(y, "the reference features")
    if x.shape[1] != y.shape[1]:
        raise DiffpoError(f"the pictures have {x.shape[1]} features and the reference has {y.shape[1]}: take the same")
    return x, y


def numbered(groups, n: int) -> np.ndarray:
    """(n,) numbers 0, 1, ... of the groups, such as prompts, whose pictures are not independent. None: every picture
    is a group of its own."""
    if groups is None:
        return np.arange(n)
    found = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if len(found) != n:
        raise ValueError(f"{len(found)} groups for {n} pictures")
    return found


def resampled(groups, n: int, rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, n) how often each picture occurs in samples of whole groups, drawn with replacement."""
    group = numbered(groups, n)
    count = int(group.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return drawn[:, group].astype(float)


def around(value: float, error: float) -> Estimate:
    """``value`` with the normal interval of its standard error."""
    return Estimate(float(value), float(value - Z * error), float(value + Z * error))


def error_of_mean(values: np.ndarray, groups) -> float:
    """Standard error of the mean of ``values`` (n,), from the sums of groups. Infinite for a single group."""
    group = numbered(groups, len(values))
    count = int(group.max()) + 1
    if count < 2:
        return float("inf")
    sums = np.bincount(group, weights=values - values.mean())
    return sqrt(count / (count - 1) * float(np.sum(sums**2))) / len(values)


def share(hits: np.ndarray, groups) -> Estimate:
    """The share of true values in ``hits`` (n,), with Wilson's interval for n over the design effect of the groups
    (Kish 1965), as `statistics.win_rate` has it."""
    hits, group = np.asarray(hits, float), numbered(groups, len(hits))
    n, rate = len(hits), float(np.mean(hits))
    sums, count = np.bincount(group, weights=hits - rate), int(group.max()) + 1
    independent = float(np.sum((hits - rate) ** 2))
    effect = max(1.0, float(np.sum(sums**2)) / independent) if independent > 0 else n / count
    return Estimate(rate, *wilson(rate * n / effect, n / effect, CONFIDENCE))
