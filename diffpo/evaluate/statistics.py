"""Paired statistics of two arms: the same prompts, the same seeds, one score each.

Several images of one prompt are not independent, so everything here is clustered by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927, JASA 22, 209-212).

    ``successes`` and ``n`` may be fractional: ties count half, and ``n`` may be an effective sample size.
    Raises ValueError unless ``0 <= successes <= n`` and ``n > 0``.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"wilson needs 0 <= successes <= n and n > 0, not {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # the exact interval never leaves [0, 1]; rounding at p = 0 or 1 could
    return max(0.0, centre - half), min(1.0, centre + half)


def _clusters(values: np.ndarray, prompt_id) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of ``values`` (n,) within every prompt."""
    _, cluster = np.unique(np.asarray(prompt_id), return_inverse=True)
    return np.bincount(cluster, weights=values), np.bincount(cluster).astype(float)


def win_rate(base, tuned, prompt_id, confidence: float = 0.95) -> Estimate:
    """Share of pairs in which ``tuned`` scores higher, ties counting half, with a Wilson interval.

    ``base``, ``tuned``, ``prompt_id``: shape (n,). With one image per prompt the interval is Wilson's for n trials.
    With several, n is divided by the design effect, the ratio of the cluster-robust variance of the rate to that of
    independent pairs (Kish 1965), never below 1.
    """
    base, tuned = np.asarray(base, float), np.asarray(tuned, float)
    wins = (tuned > base) + 0.5 * (tuned == base)
    n, rate = len(wins), float(np.mean(wins))
    residuals, counts = _clusters(wins - rate, prompt_id)
    independent = float(np.sum((wins - rate) ** 2))
    if independent > 0:
        effect = max(1.0, float(np.sum(residuals**2)) / independent)
    else:  # every pair came out alike: the data cannot say how much the seeds of a prompt differ, so assume not at all
        effect = n / len(counts)
    return Estimate(rate, *wilson(rate * n / effect, n / effect, confidence))


def mean_difference(
    base, tuned, prompt_id, *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean of ``tuned - base`` (n,) with the percentile interval of a bootstrap that resamples whole prompts.

    The seed is fixed, so the same scores always give the same interval.
    """
    difference = np.asarray(tuned, float) - np.asarray(base, float)
    sums, counts = _clusters(difference, prompt_id)
    rng, means = np.random.default_rng(seed), []
    for start in range(0, resamples, 500):  # in slices: 10,000 resamples of 3,200 prompts at once would take 256 MB
        drawn = rng.integers(len(sums), size=(min(500, resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(float(difference.mean()), float(low), float(high))


def diversity(images: np.ndarray, prompt_id) -> float:
    """Mean pairwise root-mean-square distance between images, in units of the full range (0..1).

    ``images``: (n, ...) in 0..1. Pairs of one prompt (other seeds) where any prompt has two images, else pairs of
    different prompts. NaN for a single image. Alignment tends to lower it, so every report shows it.
    """
    flat = np.asarray(images, float).reshape(len(images), -1)
    squares = (flat**2).sum(1)
    squared = np.maximum(squares[:, None] + squares[None] - 2 * flat @ flat.T, 0) / flat.shape[1]
    prompt_id = np.asarray(prompt_id)
    upper = np.triu(np.ones(squared.shape, bool), 1)
    same = upper & (prompt_id[:, None] == prompt_id[None])
    pairs = same if same.any() else upper
    return float(np.sqrt(squared[pairs]).mean()) if pairs.any() else float("nan")
