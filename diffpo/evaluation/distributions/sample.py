"""What every distance starts from: checked features, their groups, and intervals from independent groups."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from ...common.errors import DiffpoError
from ..statistics import Estimate, win_rate

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval
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


@dataclass(frozen=True)
class Labels:
    """The group, such as the prompt, of each picture of two sets, as numbers below ``count``. A number that occurs in
    both sets is one prompt in both, so that its pictures are not independent either."""

    mine: np.ndarray
    reference: np.ndarray
    count: int

    @classmethod
    def of(cls, n: int, m: int, groups=None, reference_groups=None) -> Labels:
        """From anything comparable, (n,) and (m,). None, or the same for all, makes each picture a group of its own."""
        parts = []
        for size, given, side in ((n, groups, "picture"), (m, reference_groups, "reference")):
            names = [] if given is None else [str(each) for each in given]
            if given is not None and len(names) != size:
                raise ValueError(f"{len(names)} groups for {size} pictures")
            parts.append(names if len(set(names)) > 1 else [f"\0{side} {number}" for number in range(size)])
        number = np.unique(parts[0] + parts[1], return_inverse=True)[1].reshape(-1)
        return cls(number[:n], number[n:], int(number.max()) + 1)

    def resampled(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(1 + RESAMPLES, n) and (1 + RESAMPLES, m) how often each picture counts: first once each, then as in samples
        of whole groups, drawn with replacement."""
        drawn = rng.multinomial(self.count, np.full(self.count, 1 / self.count), size=RESAMPLES)
        drawn = np.concatenate([np.ones((1, self.count), int), drawn]).astype(float)
        return drawn[:, self.mine], drawn[:, self.reference]


def around(value: float, error: float) -> Estimate:
    """``value`` with the normal 95 % interval of its standard error."""
    return Estimate(float(value), float(value - Z * error), float(value + Z * error))


def error_of_mean(values: np.ndarray, group: np.ndarray) -> float:
    """Standard error of the mean of ``values`` (n,), which are independent between groups (n,) only."""
    sums = np.bincount(group, weights=values - values.mean())
    count = len(np.unique(group))
    return sqrt(count / (count - 1) * float(np.sum(sums**2))) / len(values)


def share(hits: np.ndarray, group: np.ndarray) -> Estimate:
    """The share of true values in ``hits`` (n,), with the clustered Wilson interval of `statistics.win_rate`."""
    return win_rate(np.full(len(hits), 0.5), np.asarray(hits, float), group)
