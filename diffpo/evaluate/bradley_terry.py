"""One strength for each of several arms, from all comparisons between them (Bradley and Terry 1952, Biometrika 39).

Arm i beats arm j with probability 1 / (1 + exp(s_j - s_i)).
"""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from .statistics import Estimate

PRIOR = 0.5  # of a win, each way, for every two arms


def bradley_terry(scores, prompt_id, confidence: float = 0.95) -> list[Estimate]:
    """The log-strengths of K arms, of mean 0, with intervals that are clustered by prompt.

    ``scores`` (n, K): one row for each prompt and seed, NaN where an arm has no score; ``prompt_id`` (n,). All arms of
    a row are compared with each other, and ties are half a win each way.

    Every two arms get `PRIOR` further wins each way. So strengths stay finite where an arm wins all, and an arm that is
    never compared is drawn to the middle. For two arms the difference of the strengths is log((w + 1/2) / (l + 1/2))
    for w wins and l losses, whose bias is of second order in 1/n (Haldane 1956, Ann. Hum. Genet. 20).

    Intervals: cluster-robust standard errors (the sandwich of the penalised likelihood, whose score is summed up within
    each prompt) times Student's quantile. ValueError for fewer than two arms, or for scores without a row.
    """
    wins = won(scores, prompt_id)
    prompts = len(wins)
    strengths, information = fit(wins.sum(0))
    # the score of a prompt: wins minus expected wins of every arm in it
    p = win_probabilities(strengths)
    residuals = (wins - (wins + wins.transpose(0, 2, 1)) * p).sum(2)
    prior = -PRIOR * (p**2 + p.T**2)  # of the further wins, which count as prompts of their own
    np.fill_diagonal(prior, 0)
    prior -= np.diag(prior.sum(1))
    meat = residuals.T @ residuals * prompts / max(1, prompts - 1) + prior
    inverse = np.linalg.pinv(information)
    errors = np.sqrt(np.maximum(np.diag(inverse @ meat @ inverse), 0))
    quantile = stdtrit(max(1, prompts - 1), 0.5 + confidence / 2)
    return [
        Estimate(float(s), float(s - quantile * e), float(s + quantile * e))
        for s, e in zip(strengths, errors, strict=True)
    ]


def won(scores, prompt_id) -> np.ndarray:
    """(prompts, K, K): how often the row's arm beat the column's in each prompt, ties half. Arguments and errors are
    those of `bradley_terry`."""
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or scores.shape[1] < 2 or not len(scores):
        raise ValueError(f"strengths need scores of two arms or more, (n, arms), not of shape {scores.shape}")
    here, there = scores[:, :, None], scores[:, None, :]
    wins = (here > there) + 0.5 * (here == there)  # NaN is neither
    wins[:, np.arange(scores.shape[1]), np.arange(scores.shape[1])] = 0
    names, prompt = np.unique(np.asarray(prompt_id), return_inverse=True)
    summed = np.zeros((len(names), *wins.shape[1:]))
    np.add.at(summed, prompt, wins)
    return summed


def fit(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log-strengths (K,) that maximise the penalised likelihood of ``wins`` (K, K), and minus its second derivative
    (K, K). Newton's method: the likelihood is concave and, with the prior, has one maximum of mean 0."""
    arms = len(wins)
    wins = wins + PRIOR * (1 - np.eye(arms))
    games, strengths = wins + wins.T, np.zeros(arms)
    for _ in range(200):  # five to ten are usual
        p = win_probabilities(strengths)
        weight = games * p * (1 - p)
        information = np.diag(weight.sum(1)) - weight
        step = np.linalg.solve(information + 1 / arms, (wins - games * p).sum(1))  # 1/K: moves keep the mean
        strengths = strengths + np.clip(step, -2, 2)
        strengths -= strengths.mean()
        if np.abs(step).max() < 1e-10:
            break
    return strengths, information


def win_probabilities(strengths) -> np.ndarray:
    """(K, K): the probability that the row's arm beats the column's, of log-strengths (K,) or of their `Estimate`s."""
    values = np.array([s.value if isinstance(s, Estimate) else s for s in strengths])
    return 1 / (1 + np.exp(values[None] - values[:, None]))
