"""Maximum mean discrepancies of two sets of features: KID and CMMD.

Both are estimated without bias (Gretton et al. 2012, equation 3), over all pairs of pictures of different prompts. (A
prompt with pictures in both sets, or with several in one, would pull the estimate down or up.) The interval comes from
a bootstrap over pictures or whole prompts, in which a picture is never paired with its own copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..statistics import Estimate
from .sample import Labels, around, pair

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
    labels = Labels.of(len(x), len(y), groups, reference_groups)
    mine, reference = labels.resampled(np.random.default_rng(0))  # fixed: the same features give the same interval
    sides = ((x, mine, labels.mine), (y, reference, labels.reference))
    means = [_mean(left, right, kernel, with_itself) for left, right in ((sides[0],) * 2, (sides[1],) * 2, sides)]
    values = means[0] + means[1] - 2 * means[2]
    return around(float(values[0]), float(np.nanstd(values[1:], ddof=1)))


def _mean(left: tuple, right: tuple, kernel: Kernel, with_itself: bool) -> np.ndarray:
    """(r,) the weighted mean of the kernel over pairs of pictures of different groups, or of all; a few rows of the
    kernel at a time. ``left``, ``right``: features (n, d), weights (r, n), groups (n,)."""
    (x, mine, group), (y, other, reference) = left, right
    total, weight = np.zeros(len(mine)), np.zeros(len(mine))
    for start in range(0, len(x), ROWS):
        block = slice(start, start + ROWS)
        counted = np.ones((len(x[block]), len(y)), bool) if with_itself else group[block, None] != reference[None]
        total += ((mine[:, block] @ np.where(counted, kernel(x[block], y), 0)) * other).sum(1)
        weight += ((mine[:, block] @ counted) * other).sum(1)
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)
