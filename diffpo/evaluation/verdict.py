"""From numbers to words: which arm to use, and how many more prompts it takes to say.

Everything here works on arrays; no picture is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from . import statistics
from .bradley_terry import bradley_terry
from .hacking import hacking
from .measured import Measured, listed, percent
from .statistics import Estimate


@dataclass(frozen=True)
class Verdict:
    """What the numbers say.

    Attributes:
        sentence: the answer in words.
        arm: the arm to use, which may be the base; None if no difference from the base is shown.
        needed: further prompts that would settle it; 0 if it is settled, or if more are not worth it.
        findings: what suggests that an arm games the score that it was trained on, a sentence each.
        flagged: the arms that ``findings`` are about.
        score: the score that decided.
        adjusted: p-value of every two arms on that score after Holm's correction, in the order of the scores' arms.
    """

    sentence: str
    arm: str | None
    needed: int
    findings: list[str]
    flagged: list[str]
    score: str
    adjusted: dict[tuple[str, str], float]


def judge(measured: Measured, alpha: float = 0.05) -> Verdict:
    """Which arm to use.

    One score decides (`deciding`). On it every two arms are compared by `statistics.p_value`, and Holm's correction
    over all these pairs keeps the probability of any false difference at ``alpha``. Arms with `hacking` findings are
    left out, unless the score is of another scorer than the one that they were trained on and they beat the base on it.
    The others are ordered by their strength (`bradley_terry`).

    - The strongest arm that is shown to beat the base is to be used. Arms that it is not shown to beat are named.
    - The base is to be kept if it is shown to beat all others, or if all others are left out.
    - Otherwise more prompts are needed, as many as show the strongest arm's win rate with probability 0.8 if it is the
      true one (`statistics.needed_more`; Bonferroni in place of Holm). A rate nearer to 1/2 than 55 % counts as 55 %.
    - If there are as many prompts already, no difference is shown.

    ValueError if the deciding score lacks the base or another arm, or if no item has it for two arms.
    """
    score = deciding(measured)
    arms = list(measured.scores[score])
    if measured.base not in arms or len(arms) < 2:
        raise ValueError(f"{score} compares {', '.join(arms)}: a verdict needs {measured.base} and another arm")
    rates, p = {}, {}
    for one, other in combinations(arms, 2):
        mine, theirs, prompts = measured.pair(score, one, other)
        if len(prompts):
            rates[one, other] = statistics.win_rate(theirs, mine, prompts)
            p[one, other] = statistics.p_value(theirs, mine, prompts)
    if not p:
        raise ValueError(f"no two arms have the score {score} for the same prompt and seed")
    adjusted = dict(zip(p, map(float, statistics.holm(list(p.values()))), strict=True))
    found = hacking(measured, alpha)
    table = np.stack([np.asarray(measured.scores[score][arm], float) for arm in arms], 1)
    strength = {arm: s.value for arm, s in zip(arms, bradley_terry(table, measured.prompt_id), strict=True)}
    standing = _Standing(measured, score, rates, adjusted, alpha, sorted(arms, key=lambda arm: -strength[arm]))
    independent = score != measured.trained and score not in measured.related
    left_out = [arm for arm in found if not (independent and standing.beats(arm, measured.base))]
    sentence, arm, needed = standing.without(left_out).conclusion()
    if left_out:
        sentence += f" Left out for signs of hacking: {listed(left_out)}."
    if arm in found:
        sentence += f" But {arm} shows signs of hacking too: look at its pictures."
    if score == measured.trained:
        sentence += f" But {score} is what was trained on: judge with another scorer."
    findings = [sentence for sentences in found.values() for sentence in sentences]
    return Verdict(sentence, arm, needed, findings, list(found), score, adjusted)


def without(verdict: Verdict, stopped: list[str]) -> Verdict:
    """The verdict, with a sentence on the scorers that gave up, since another score may have decided."""
    if not stopped:
        return verdict
    return replace(verdict, sentence=f"{verdict.sentence} This is without {listed(stopped)}, which gave up.")


def deciding(measured: Measured) -> str:
    """The score that decides: the first that was not trained on; failing that, the first other number of the training
    scorer; failing that, the one that was trained on. So it is chosen before any number is looked at."""
    unseen = [name for name in measured.scores if name != measured.trained and name not in measured.related]
    others = [name for name in measured.scores if name != measured.trained]
    return (unseen or others or list(measured.scores))[0]


@dataclass(frozen=True)
class _Standing:
    """The arms that may be used, strongest first, and what is shown between them."""

    measured: Measured
    score: str
    rates: Mapping[tuple[str, str], Estimate]
    adjusted: Mapping[tuple[str, str], float]
    alpha: float
    order: list[str]

    def without(self, arms: list[str]) -> _Standing:
        return replace(self, order=[arm for arm in self.order if arm not in arms])

    def rate(self, one: str, other: str) -> Estimate | None:
        """The win rate of ``one`` over ``other``."""
        if (one, other) in self.rates:
            return self.rates[one, other]
        back = self.rates.get((other, one))
        return back and Estimate(1 - back.value, 1 - back.high, 1 - back.low)

    def beats(self, one: str, other: str) -> bool:
        """Is it shown that ``one`` beats ``other``?"""
        rate = self.rate(one, other)
        p = self.adjusted.get((one, other), self.adjusted.get((other, one), 1.0))
        return rate is not None and rate.value > 0.5 and p < self.alpha

    def conclusion(self) -> tuple[str, str | None, int]:
        """In words, the arm to use, and how many more prompts are needed."""
        base, others = self.measured.base, [arm for arm in self.order if arm != self.measured.base]
        if not others:
            return f"Keep {base}: no other arm may be used.", base, 0
        if better := [arm for arm in others if self.beats(arm, base)]:
            best = better[0]
            equals = [arm for arm in others if arm != best and not self.beats(best, arm)]
            tied = f" No difference is shown between {best} and {listed(equals)}." if equals else ""
            return f"Use {best}: {self._against(best, base)}.{tied}", best, 0
        first = others[0]
        seen = self._against(first, base)
        if all(self.beats(base, arm) for arm in others):
            return f"Keep {base}, which beats {listed(others)}: {seen}.", base, 0
        mine, theirs, prompts = self.measured.pair(self.score, first, base)
        if not len(prompts):
            return f"No item of {first} and {base} has a score {self.score}.", None, 0
        worse = [arm for arm in others if self.beats(base, arm)]
        down = f" Shown to be worse than {base}: {listed(worse)}." if worse else ""
        confidence = 1 - self.alpha / len(self.adjusted)
        if more := statistics.needed_more(theirs, mine, prompts, confidence=confidence):
            return f"{more} more prompts are needed to tell {first} from {base}: {seen}.{down}", None, more
        same = [base, *(arm for arm in others if arm not in worse)]
        words = f"No difference is shown between {listed(same)}: {seen}, and 55 % would have shown.{down}"
        return words, None, 0

    def _against(self, one: str, other: str) -> str:
        rate = self.rate(one, other)
        wins = f"wins {percent(rate)} of the pairs against {other}" if rate else f"is in no pair with {other}"
        return f"on {self.score}, {one} {wins}"
