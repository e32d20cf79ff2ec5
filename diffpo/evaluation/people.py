"""What the votes of people add to an evaluation: how far each scorer agrees with them, and how many more are needed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from ..annotate.agreement import cohen_kappa
from . import statistics
from .statistics import Estimate

if TYPE_CHECKING:
    from .compare import Evaluation

VOTES = "votes"  # the score of `scorers.votes`


@dataclass(frozen=True)
class Agreement:
    """Of a scorer with the votes, over all pairs of arms where the votes name a winner.

    Attributes:
        rate: share of these n pairs in which the scorer prefers the same picture, ties half; clustered by prompt.
        kappa: Cohen's, of which picture is preferred; without the scorer's ties. None if both always prefer the
            same arm.
    """

    scorer: str
    rate: Estimate
    kappa: float | None
    n: int


@dataclass(frozen=True)
class Needed:
    """``prompts`` with votes of an arm against the first one, and how many ``more`` would show its win rate if it is
    the true one, with probability 0.8 (`statistics.needed_more`); 0: these should do."""

    arm: str
    rate: Estimate
    prompts: int
    more: int


def agreements(evaluation: Evaluation) -> list[Agreement]:
    """Of every scorer but the votes; those without a pair in common with them are left out."""
    votes = evaluation.scores.get(VOTES, {})
    ids = np.array([item.index for item in evaluation.items])
    found = []
    for name, by_arm in evaluation.scores.items():
        arms = [arm for arm in votes if arm in by_arm]
        if name == VOTES or len(arms) < 2:
            continue
        parts = [_signs(votes, by_arm, pair) for pair in combinations(arms, 2)]
        said, scored = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
        prompts = np.concatenate([ids] * len(parts))
        good = np.isfinite(said) & np.isfinite(scored) & (said != 0)
        if not good.any():
            continue
        said, scored, prompts = said[good], scored[good], prompts[good]
        rate = statistics.win_rate(np.zeros(len(said)), said * scored, prompts)
        decided = scored != 0
        kappa = cohen_kappa(said[decided].tolist(), scored[decided].tolist())
        found.append(Agreement(name, rate, None if np.isnan(kappa) else kappa, len(said)))
    return found


def _signs(votes: dict[str, np.ndarray], by_arm: dict[str, np.ndarray], pair: tuple[str, str]) -> tuple:
    """(n,) each: 1 where the second arm is preferred by the votes, and by the scorer; -1, 0 for a tie, or NaN."""
    one, other = pair
    return np.sign(votes[other] - votes[one]), np.sign(by_arm[other] - by_arm[one])


def needed(evaluation: Evaluation) -> list[Needed]:
    """For every arm but the first that has votes in common with it."""
    votes, first = evaluation.scores.get(VOTES, {}), evaluation.arms[0]
    ids = np.array([item.index for item in evaluation.items])
    found = []
    for arm in evaluation.arms[1:]:
        if not {arm, first} <= votes.keys():
            continue
        good = np.isfinite(votes[arm]) & np.isfinite(votes[first])
        if not good.any():
            continue
        data = (votes[first][good], votes[arm][good], ids[good])
        more = statistics.needed_more(*data)
        found.append(Needed(arm, statistics.win_rate(*data), len(np.unique(ids[good])), more))
    return found


def lines(evaluation: Evaluation) -> list[str]:
    """Both in sentences; none without votes."""
    found = []
    for each in needed(evaluation):
        rate = each.rate
        share = f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
        if not rate.low <= 0.5 <= rate.high:
            rest = "a difference is shown"
        elif each.more:
            rest = f"votes on {each.more} more prompts are needed to tell them apart"
        else:
            rest = "no difference is shown, and 55 % would have shown"
        found.append(f"people prefer {each.arm} to {evaluation.arms[0]} on {share} of {each.prompts} prompts; {rest}")
    for one in agreements(evaluation):
        kappa = "" if one.kappa is None else f", kappa {one.kappa:.2f}"
        share = f"{one.rate.value:.1%} [{one.rate.low:.1%}, {one.rate.high:.1%}]"
        found.append(f"{one.scorer} agrees with the votes on {share} of {one.n} pairs{kappa}")
    return found
