"""From several scorers' numbers to one judgement of the k pictures of a prompt: which wins, and what each is worth.

All rules but `score` give a table P (k, k): P_ij is the probability, or the share of votes, by which picture i beats
picture j, with P_ij + P_ji = 1 and 1/2 for a tie. A picture's worth is its mean over the others, sum_j P_ij / (k - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.errors import DiffpoError
from ..evaluation.statistics import Estimate, win_rate

Floats = NDArray[np.float64]
RULES = ("win-rate", "bradley-terry", "majority", "pareto", "score")


@dataclass(frozen=True)
class Judged:
    """The judgement of k pictures of one prompt.

    Attributes:
        beats: (k, k), P_ij; the diagonal is 1/2.
        worth: (k,), higher is better.
        gaps: (k, k), antisymmetric: how clearly i beats j, which a margin is compared with. P_ij - P_ji, or with the
            rule `score` the difference of the numbers.
    """

    beats: Floats
    worth: Floats
    gaps: Floats

    @property
    def order(self) -> list[int]:
        """The pictures from the best to the worst; equal ones in their own order."""
        return sorted(range(len(self.worth)), key=lambda i: -self.worth[i])


def judge(scores: Floats, rule: str, scales: Floats) -> Judged:
    """Judge k pictures by their ``scores`` (k, m), m numbers each without NaN; higher is better.

    ``scales`` (m,): by how much a number must differ for odds of e : 1, used by `bradley-terry` alone.

    win-rate       P_ij is the share of the m numbers by which i is better; an equal number counts half. A picture's
                   worth is then its share of wins over the other pictures and the numbers, as Syn-Pic ranks pictures
                   (Karthik et al. 2024, arXiv 2410.18013, section 3).
    bradley-terry  P_ij is the mean over the numbers of sigma((s_i - s_j) / scale): near-ties count less.
    majority       P_ij is 1 if more numbers prefer i than j, 1/2 if equally many do.
    pareto         P_ij is 1 if i is nowhere worse and somewhere better (D3PO's rule for several rewards), 1/2 if
                   neither is.
    score          one number alone: P_ij is 1 if it is larger, and a picture is worth this number.
    """
    k = len(scores)
    difference = scores[:, None, :] - scores[None, :, :]
    if rule == "bradley-terry":
        beats = _sigmoid(difference / scales).mean(-1)
    else:
        votes = np.sign(difference)
        if rule == "win-rate":
            beats = (votes.mean(-1) + 1) / 2
        elif rule == "majority":
            beats = (np.sign(votes.sum(-1)) + 1) / 2
        elif rule == "pareto":
            better, worse = (votes > 0).any(-1), (votes < 0).any(-1)
            beats = (1.0 + (better & ~worse) - (worse & ~better)) / 2
        elif rule == "score":
            if scores.shape[1] != 1:
                raise DiffpoError(
                    f"--rule score takes one number, and the scorers give {scores.shape[1]}: add them up with "
                    "--scorers sum=A*0.5+B, or use another rule"
                )
            beats = (votes[:, :, 0] + 1) / 2
        else:
            raise DiffpoError(f"unknown rule {rule!r}: use {', '.join(RULES)}")
    worth = (beats.sum(1) - 0.5) / max(1, k - 1)
    gaps = beats - beats.T
    return Judged(beats, scores[:, 0], difference[:, :, 0]) if rule == "score" else Judged(beats, worth, gaps)


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def scales(tables: Sequence[Floats]) -> Floats:
    """The scale (m,) of each number: the root mean square of the difference of two pictures of a prompt, over all pairs
    in the ``tables`` (k, m) of all prompts; 1 where nothing differs. NaN are left out."""
    differences = []
    for table in tables:
        i, j = np.triu_indices(len(table), 1)
        differences.append(table[i] - table[j])
    squares = np.concatenate(differences) ** 2
    there = np.isfinite(squares)
    spread = np.sqrt(np.where(there, squares, 0).sum(0) / np.maximum(1, there.sum(0)))
    return np.where(spread > 0, spread, 1.0)


def agreement(tables: Sequence[Floats], names: Sequence[str]) -> dict[tuple[str, str], tuple[Estimate, int]]:
    """For two numbers each: the share of pairs of pictures of a prompt that both order alike, with an interval
    clustered by prompt, and the number of pairs. Pairs that either calls equal are left out, and so are two numbers
    without any pair.

    ``tables``: (k, m) of each prompt.
    """
    found = {}
    for a in range(len(names)):
        for b in range(a):
            alike: list[float] = []
            prompts: list[int] = []
            for prompt, table in enumerate(tables):
                i, j = np.triu_indices(len(table), 1)
                signs = np.sign(table[i][:, [b, a]] - table[j][:, [b, a]])
                signs = signs[np.isfinite(signs).all(1) & (signs != 0).all(1)]
                alike += (signs[:, 0] == signs[:, 1]).astype(float).tolist()
                prompts += [prompt] * len(signs)
            if alike:
                half = np.full(len(alike), 0.5)
                found[names[b], names[a]] = (win_rate(half, np.array(alike), np.array(prompts)), len(alike))
    return found
