"""Maximum mean discrepancies of two sets of features: KID and CMMD.

Both are estimated without bias (Gretton et al. 2012, equation 3), over all pairs of pictures. The interval comes from
a bootstrap over pictures or whole prompts, in which a picture is never paired with its own copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..statistics import Estimate
from .sample import around, pair, resampled

ROWS = 1024  # of a kernel matrix in memory
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def kid(x, y, groups=None, reference_groups=None) -> Estimate:
    """KID (Binkowski et al. 2018, section 4.1): the unbiased squared MMD with the kernel (a.b / d + 1)^3.

    ``x`` (n, d), ``y`` (m, d). All pictures are used at once; the mean over subsets that other programs print has the
    same expectation and a larger error, and its deviation between overlapping subsets is no standard error.
    """
    x, y = pair(x, y)
    return _estimate(x, y, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, groups, reference_groups)


def cmmd(x, y, groups=None, reference_groups=None, as_published: bool = False) -> Estimate:
    """CMMD (Jayasumana et al. 2024, "Rethinking FID"): 1000 times the squared MMD of CLIP vectors of length 1, with
    the kernel exp(-|a - b|^2 / (2 10^2)).

    ``x`` (n, d), ``y`` (m, d): CLIP's vectors; they are normalised here. ``as_published``: the authors' program, which
    counts each picture with itself and so adds about 1000 (1 - mean kernel) (1 / n + 1 / m).
    """
    x, y = (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in pair(x, y))

    def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        return np.exp(-np.maximum(squares, 0) / (2 * SIGMA**2))

    found = _estimate(x, y, gaussian, groups, reference_groups, with_itself=as_published)
    return Estimate(SCALE * found.value, SCALE * found.low, SCALE * found.high)


def _estimate(x, y, kernel: Kernel, groups, reference_groups, with_itself: bool = False) -> Estimate:
    """The squared MMD with the interval of the bootstrap's standard deviation."""
    rng = np.random.default_rng(0)  # fixed: the same features give the same interval
    weights = [
        np.concatenate([np.ones((1, len(each))), resampled(group, len(each), rng)])
        for each, group in ((x, groups), (y, reference_groups))
    ]
    within = [_within(each, weight, kernel, with_itself) for each, weight in zip((x, y), weights, strict=True)]
    between = _sums(x, y, weights[0], weights[1], kernel) / (weights[0].sum(1) * weights[1].sum(1))
    values = within[0] + within[1] - 2 * between
    return around(values[0], float(np.std(values[1:], ddof=1)))


def _within(x: np.ndarray, weights: np.ndarray, kernel: Kernel, with_itself: bool) -> np.ndarray:
    """(r,) the mean of the kernel over pairs of different pictures of ``x``, for each row of ``weights`` (r, n)."""
    total, pairs = _sums(x, x, weights, weights, kernel), weights.sum(1) ** 2
    if with_itself:
        return total / pairs
    diagonal = np.array([kernel(each[None], each[None])[0, 0] for each in x])
    return (total - (weights**2) @ diagonal) / (pairs - (weights**2).sum(1))


def _sums(x: np.ndarray, y: np.ndarray, left: np.ndarray, right: np.ndarray, kernel: Kernel) -> np.ndarray:
    """(r,) sum_ij left[r, i] kernel(x_i, y_j) right[r, j], a few rows of the kernel at a time."""
    total = np.zeros(len(left))
    for start in range(0, len(x), ROWS):
        block = slice(start, start + ROWS)
        total += ((left[:, block] @ kernel(x[block], y)) * right).sum(1)
    return total
