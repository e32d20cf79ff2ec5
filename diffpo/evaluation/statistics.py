"""Paired statistics of two arms: the same prompts, the same seeds, one score each.

Several images of one prompt are not independent, so everything here is clustered by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

LEAST_ERROR = 0.5  # of a resample, as a share of the standard error of the data
LEAST_EFFECT = 0.5  # a design effect that few prompts gave by chance must not make of seeds more than they are


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
    return _score_interval(successes / n, n, float(ndtri(0.5 + confidence / 2)))


def _score_interval(p: float, n: float, z: float) -> tuple[float, float]:
    """The rates q that differ from ``p`` by ``z`` standard errors sqrt(q (1 - q) / n) at most."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # the exact interval never leaves [0, 1]; rounding at p = 0 or 1 could
    return max(0.0, centre - half), min(1.0, centre + half)


def _clusters(values: np.ndarray, prompt_id) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of ``values`` (n,) within every prompt."""
    _, cluster = np.unique(np.asarray(prompt_id), return_inverse=True)
    return np.bincount(cluster, weights=values), np.bincount(cluster).astype(float)


@dataclass(frozen=True)
class _Trials:
    """Pairs as a number of independent yes-or-no trials that know the rate just as well.

    Attributes:
        rate: share of wins, ties counting half.
        n: trials; ties raise it, because a half win varies less, and pairs of one prompt that agree lower it.
        prompts: how many prompts there are.
        estimated: ``n`` rests on a variance that was estimated, so that Student's t takes the place of the normal.
    """

    rate: float
    n: float
    prompts: int
    estimated: bool

    def quantile(self, confidence: float) -> float:
        """How many standard errors the interval reaches on either side."""
        upper = 0.5 + confidence / 2
        return float(stdtrit(self.prompts - 1, upper) if self.estimated else ndtri(upper))


def _trials(base, tuned, prompt_id) -> _Trials:
    """The trials of pairs (n,): n p (1 - p) / v / design effect, where v is the variance of a win and the design effect
    the ratio of the cluster-robust variance of the rate to that of independent pairs (Kish 1965)."""
    base, tuned = np.asarray(base, float), np.asarray(tuned, float)
    wins = (tuned > base) + 0.5 * (tuned == base)
    if not len(wins):
        raise ValueError("no pair of scores to compare")
    n, rate = len(wins), float(np.mean(wins))
    residuals, counts = _clusters(wins - rate, prompt_id)
    prompts, independent = len(counts), float(np.sum((wins - rate) ** 2))
    if independent == 0 or prompts == 1:
        # every pair came out alike: the data cannot say how much the seeds of a prompt differ, so assume not at all
        return _Trials(rate, float(prompts), prompts, False)
    correction = prompts / (prompts - 1) * (n - 1) / n  # both variances lack a degree of freedom
    effect = max(LEAST_EFFECT, correction * float(np.sum(residuals**2)) / independent)
    estimated = prompts < n or bool(np.any(tuned == base))
    return _Trials(rate, n * n * rate * (1 - rate) / independent / effect, prompts, estimated)


def win_rate(base, tuned, prompt_id, confidence: float = 0.95) -> Estimate:
    """Share of pairs in which ``tuned`` scores higher, ties counting half, with a Wilson interval.

    ``base``, ``tuned``, ``prompt_id``: shape (n,), without NaN. With one image per prompt and no ties the interval is
    Wilson's for n trials. Otherwise n is an effective number of trials (`_trials`) and the quantile is Student's, with
    one degree of freedom less than there are prompts (Dean and Pagano 2015, J. Surv. Stat. Methodol. 3, 484-503).
    ValueError without pairs.
    """
    trials = _trials(base, tuned, prompt_id)
    return Estimate(trials.rate, *_score_interval(trials.rate, trials.n, trials.quantile(confidence)))


def p_value(base, tuned, prompt_id) -> float:
    """Two-sided p-value of "the win rate is 1/2": the score test that the interval of `win_rate` inverts.

    So it is below 0.05 exactly if the 95 % interval leaves out 1/2. Arguments and errors are those of `win_rate`.
    """
    trials = _trials(base, tuned, prompt_id)
    errors = abs(trials.rate - 0.5) * 2 * sqrt(trials.n)
    return 2 * float(stdtr(trials.prompts - 1, -errors) if trials.estimated else ndtr(-errors))


def holm(p_values) -> np.ndarray:
    """Adjusted p-values (m,) of m tests (Holm 1979, Scand. J. Stat. 6, 65-70).

    Rejecting those below 0.05 makes one false rejection or more with probability 0.05 at most, however the tests depend
    on each other.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def needed(rate: float = 0.55, power: float = 0.8, confidence: float = 0.95, design: float = 1.0) -> int:
    """Prompts at which the test of `p_value` distinguishes a win rate of ``rate`` from 1/2 with probability ``power``.

    ``design``: variance of the rate times the number of prompts, in units of that of one pair per prompt without ties.
    ValueError for a rate of 1/2, which no number of prompts tells from 1/2.
    """
    if rate == 0.5 or not 0 <= rate <= 1:
        raise ValueError(f"no number of prompts shows a win rate of {rate}: name one between 0 and 1 other than 1/2")
    errors = ndtri(0.5 + confidence / 2) / 2 + ndtri(power) * sqrt(rate * (1 - rate))
    return ceil(design * (errors / (rate - 0.5)) ** 2 - 1e-9)


def needed_more(base, tuned, prompt_id, power: float = 0.8, confidence: float = 0.95, least: float = 0.55) -> int:
    """How many more prompts, with as many seeds each, it takes to see the observed win rate if it is the true one.

    An observed rate nearer to 1/2 than ``least`` is taken to be ``least``: what is smaller is not worth the pictures.
    0 if the prompts that are there should do. Arguments and errors are those of `win_rate`.
    """
    trials = _trials(base, tuned, prompt_id)
    distance = min(max(abs(trials.rate - 0.5), abs(least - 0.5)), 0.5)
    design = trials.prompts / trials.n
    return max(0, needed(0.5 + distance, power, confidence, design) - trials.prompts)


def mean_difference(
    base, tuned, prompt_id, *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean of ``tuned - base`` (n,) with the studentised interval of a bootstrap that resamples whole prompts.

    Each resample gives (mean* - mean) / se*, whose quantiles take the place of Student's (Efron and Tibshirani 1993,
    sec. 12.5). So skewed scores and few prompts are covered, which quantiles of mean* are not (docs/statistics.md).
    Two guards: an end is never nearer than Student's, and se* counts as `LEAST_ERROR` se at least, because a resample
    of few prompts that differ at all may have no spread. The seed is fixed, so equal scores give equal intervals.
    """
    difference = np.asarray(tuned, float) - np.asarray(base, float)
    sums, counts = _clusters(difference, prompt_id)
    mean, error = float(difference.mean()), _standard_error(sums, counts)
    if error == 0:
        return Estimate(mean, mean, mean)
    table = np.stack([sums, counts, sums**2, sums * counts, counts**2], 1)
    rng, found = np.random.default_rng(seed), []
    for start in range(0, resamples, 500):  # in slices: 10,000 resamples of 3,200 prompts at once would take 256 MB
        total, pairs, squares, products, sizes = (_times(rng, len(sums), min(500, resamples - start)) @ table).T
        means = total / pairs
        spread = np.maximum(squares - 2 * means * products + means**2 * sizes, 0) * len(sums) / (len(sums) - 1)
        found.append((means - mean) / np.maximum(np.sqrt(spread) / pairs, LEAST_ERROR * error))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    student = stdtrit(len(sums) - 1, 1 - tail)
    return Estimate(mean, float(mean - max(high, student) * error), float(mean + max(-low, student) * error))


def _times(rng: np.random.Generator, prompts: int, resamples: int) -> np.ndarray:
    """How often each prompt is drawn in each resample, (resamples, prompts)."""
    drawn = rng.integers(prompts, size=(resamples, prompts)) + prompts * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * prompts).reshape(resamples, prompts).astype(float)


def _standard_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """Cluster-robust, of the mean over all pairs; from the `_clusters` of their values. 0 for a single prompt."""
    prompts, n = len(sums), counts.sum()
    residuals = sums - sums.sum() / n * counts
    return float(np.sqrt(prompts / max(1, prompts - 1) * np.sum(residuals**2)) / n)


def p_beyond(values, prompt_id, margin: float = 0.0) -> float:
    """One-sided p-value of "the mean of ``values`` (n,) is at most ``margin``", by a t-test clustered by prompt.

    1 for a single prompt, and where all values are equal and not above the margin.
    """
    values = np.asarray(values, float)
    sums, counts = _clusters(values, prompt_id)
    error, distance = _standard_error(sums, counts), float(values.mean()) - margin
    if len(sums) == 1 or error == 0:
        return 0.0 if len(sums) > 1 and distance > 0 else 1.0
    return float(stdtr(len(sums) - 1, -distance / error))
