"""How much of one set of pictures lies near the other: precision and recall, density and coverage.

The neighbourhood of a picture is the ball around its features that reaches its k-th nearest neighbour in its own set.
Intervals count the pictures that are tested; the balls are taken as given.
"""

from __future__ import annotations

import numpy as np

from ..statistics import Estimate
from .sample import Labels, around, error_of_mean, pair, share

K = 3  # of precision and recall
K_DENSITY = 5  # of density and coverage
ROWS = 1024


def precision_recall(x, y, groups=None, reference_groups=None, k: int = K) -> dict[str, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equation 2).

    ``precision``: the share of pictures ``x`` (n, d) in a ball of the reference ``y`` (m, d), that is how many look
    real. ``recall``: the share of the reference in a ball of ``x``, that is how much of the variety is there.
    """
    x, y = pair(x, y)
    labels = Labels.of(len(x), len(y), groups, reference_groups)
    return {
        "precision": share(_inside(x, y, radii(y, k)), labels.mine),
        "recall": share(_inside(y, x, radii(x, k)), labels.reference),
    }


def density_coverage(x, y, groups=None, reference_groups=None, k: int = K_DENSITY) -> dict[str, Estimate]:
    """Density and coverage (Naeem et al. 2020, equations 6 and 7), less sensitive to single odd pictures.

    ``density``: in how many balls of the reference a picture of ``x`` lies on average, over k; it may exceed 1.
    ``coverage``: the share of balls of the reference that hold a picture of ``x``.
    """
    x, y = pair(x, y)
    labels, radius = Labels.of(len(x), len(y), groups, reference_groups), radii(y, k)
    counts, covered = np.zeros(len(x)), np.zeros(len(y), bool)
    for start in range(0, len(x), ROWS):
        near = squares(x[start : start + ROWS], y) < radius
        counts[start : start + ROWS] = near.sum(1) / k
        covered |= near.any(0)
    return {
        "density": around(float(counts.mean()), error_of_mean(counts, labels.mine)),
        "coverage": share(covered, labels.reference),
    }


def squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m) squared distances."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """(n,) the squared distance of each row to its k-th nearest other one; to the farthest if there are fewer."""
    found, k = np.empty(len(x)), min(k, len(x) - 1)
    for start in range(0, len(x), ROWS):
        block = squares(x[start : start + ROWS], x)
        block[np.arange(len(block)), start + np.arange(len(block))] = np.inf
        found[start : start + ROWS] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return found


def _inside(x: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """(n,) whether each row of ``x`` lies in one of the balls."""
    blocks = [(squares(x[start : start + ROWS], centres) <= radius).any(1) for start in range(0, len(x), ROWS)]
    return np.concatenate(blocks)
