"""The Fréchet distance of two sets of features, FID when they are Inception's (Heusel et al. 2017, equation 6).

FID = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), with means m and covariances S. With S = F F^T the last
trace is the sum of the singular values of F1^T F2. So no root of an unsymmetric matrix is taken, and a singular
covariance is exact too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ...common.errors import DiffpoError
from ...common.text import plain
from ..statistics import Estimate
from .sample import Labels, around, checked


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) of a set of features, of ``n`` pictures; n is None where it is not known."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None = None

    @classmethod
    def of(cls, features) -> Gaussian:
        x = checked(features)
        return cls(x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]), len(x))

    @classmethod
    def read(cls, path: str | Path) -> Gaussian:
        """The statistics file of pytorch-fid and of the original FID: an .npz with ``mu`` and ``sigma``. DiffpoError
        if it is none."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            reason = getattr(error, "strerror", None) or plain(error, 200)
            raise DiffpoError(f"cannot read {path} as statistics, an .npz with mu and sigma: {reason}") from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise DiffpoError(f"{path}: the shapes of mu and sigma are {mean.shape} and {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DiffpoError(f"{path} has numbers that are not finite")
        return cls(mean, covariance)

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """The principal axes (d, r) and deviations (r,) along them, without those that are zero within rounding."""
        values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        kept = values > max(values[-1], 0) * len(values) * np.finfo(float).eps
        return vectors[:, kept], np.sqrt(values[kept])


def distance(one: Gaussian, other: Gaussian) -> float:
    """The squared Fréchet distance (2-Wasserstein) of two Gaussians."""
    _same_width(one, other)
    (q1, s1), (q2, s2) = one.axes, other.axes
    overlap = np.linalg.svd((q1 * s1).T @ (q2 * s2), compute_uv=False).sum()
    shift = one.mean - other.mean
    return float(shift @ shift + np.trace(one.covariance) + np.trace(other.covariance) - 2 * overlap)


def fid(x, y, groups=None, reference_groups=None) -> Estimate:
    """The Fréchet distance of features ``x`` (n, d) to ``y``, (m, d) or a `Gaussian`, with a 95 % interval.

    The interval is that of the first-order influence of each picture (infinitesimal jackknife), summed within groups
    (`sample.Labels`). It covers the expected distance at this n, which is larger than that of infinitely many pictures;
    see `extrapolated`. A `Gaussian` is taken as exact. DiffpoError as for `sample.checked`.
    """
    x = checked(x)
    one = Gaussian.of(x)
    other = y if isinstance(y, Gaussian) else Gaussian.of(checked(y, "the reference features"))
    value = distance(one, other)
    labels = Labels.of(len(x), 0 if isinstance(y, Gaussian) else len(y), groups, reference_groups)
    moved = np.bincount(labels.mine, weights=_influence(x, one, other) / len(x), minlength=labels.count)
    if not isinstance(y, Gaussian):
        influence = _influence(np.asarray(y, np.float64), other, one) / len(y)
        moved += np.bincount(labels.reference, weights=influence, minlength=labels.count)
    return around(value, float(np.sqrt(np.sum(moved**2) * labels.count / (labels.count - 1))))


def extrapolated(x, y, groups=None, reference_groups=None, sizes: int = 5, repeats: int = 3) -> float:
    """The distance at infinitely many pictures (Chong and Forsyth 2020, "Effectively Unbiased FID"): the line through
    the distances of random parts of the groups of both sets, from 40 % to all, against 1 / part, at 0. A `Gaussian`
    stays whole."""
    x, rng = checked(x), np.random.default_rng(0)  # fixed: the same features give the same number
    fixed = isinstance(y, Gaussian)
    labels = Labels.of(len(x), 0 if fixed else len(y), groups, reference_groups)
    inverse, values = [], []
    for part in np.linspace(0.4, 1, sizes):
        for _ in range(repeats if part < 1 else 1):
            drawn = rng.permutation(labels.count) < part * labels.count
            one, other = x[drawn[labels.mine]], y if fixed else np.asarray(y)[drawn[labels.reference]]
            if len(one) < 2 or (not fixed and len(other) < 2):
                continue
            inverse.append(1 / part)
            values.append(distance(Gaussian.of(one), other if fixed else Gaussian.of(other)))
    return float(np.polyfit(inverse, values, 1)[1]) if len(set(inverse)) > 1 else values[-1]


def _influence(x: np.ndarray, mine: Gaussian, other: Gaussian) -> np.ndarray:
    """(n,) how the distance changes, to first order, with the weight of each picture of ``mine``.

    The gradient of the distance by my covariance is I - T, with T the optimal transport map from me to ``other``.
    """
    (q1, s1), (q2, s2) = mine.axes, other.axes
    u, sigma, _ = np.linalg.svd((q1 * s1).T @ (q2 * s2), full_matrices=False)
    centred = x - mine.mean
    white = (centred @ q1) / s1
    carried = ((white @ u) ** 2) @ sigma  # centred^T T centred
    by_covariance = (centred**2).sum(1) - carried
    return by_covariance - by_covariance.mean() + 2 * centred @ (mine.mean - other.mean)


def _same_width(one: Gaussian, other: Gaussian) -> None:
    if one.mean.shape != other.mean.shape:
        raise DiffpoError(
            f"the pictures have {len(one.mean)} features and the reference has {len(other.mean)}: take the same "
            "features for both"
        )
