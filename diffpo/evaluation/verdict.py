"""From numbers to words: which arm to use, how many more prompts it takes to say, and which arm games its scorer.

Everything here works on arrays; no picture is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from . import statistics
from .bradley_terry import bradley_terry
from .statistics import Estimate

DIVERSITY_LOST = 0.1  # share of the base's diversity; what is lost beyond it is an alarm
NAMED = 3  # numbers of one scorer in a sentence
SHIFT = 0.5  # of a signal, in standard deviations over the base's pictures; what goes beyond it is an alarm

Arms = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What was measured of the arms on n items, which are prompts with a seed.

    Attributes:
        scores: of each score the arms' numbers, (n,), NaN where there is none. The first score that qualifies decides,
            see `deciding`.
        prompt_id: (n,).
        base: the arm that the others are compared with.
        trained: the score that the arms were trained on, if it is known; ``related``: other numbers of that scorer.
        signals: as scores, of `diffpo.evaluation.signals.signals`; none is better high or low.
        distance: of each arm but the base, (n,): how far its pictures are from the base's of the same item.
        diversity: of each arm, (prompts,), in the same features as ``distance``.
    """

    scores: Mapping[str, Arms]
    prompt_id: np.ndarray
    base: str
    trained: str | None = None
    related: frozenset[str] = frozenset()
    signals: Mapping[str, Arms] = field(default_factory=dict)
    distance: Arms = field(default_factory=dict)
    diversity: Arms = field(default_factory=dict)

    def pair(self, score: str, one: str, other: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the items where both arms have this score: the numbers of ``one`` and ``other``, and the prompts."""
        first, second = (np.asarray(self.scores[score][arm], float) for arm in (one, other))
        both = ~(np.isnan(first) | np.isnan(second))
        return first[both], second[both], np.asarray(self.prompt_id)[both]


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
        sentence += f" Left out for signs of hacking: {_listed(left_out)}."
    if arm in found:
        sentence += f" But {arm} shows signs of hacking too: look at its pictures."
    if score == measured.trained:
        sentence += f" But {score} is what was trained on: judge with another scorer."
    findings = [sentence for sentences in found.values() for sentence in sentences]
    return Verdict(sentence, arm, needed, findings, list(found), score, adjusted)


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
            tied = f" No difference is shown between {best} and {_listed(equals)}." if equals else ""
            return f"Use {best}: {self._against(best, base)}.{tied}", best, 0
        first = others[0]
        seen = self._against(first, base)
        if all(self.beats(base, arm) for arm in others):
            return f"Keep {base}, which beats {_listed(others)}: {seen}.", base, 0
        mine, theirs, prompts = self.measured.pair(self.score, first, base)
        if not len(prompts):
            return f"No item of {first} and {base} has a score {self.score}.", None, 0
        worse = [arm for arm in others if self.beats(base, arm)]
        down = f" Shown to be worse than {base}: {_listed(worse)}." if worse else ""
        confidence = 1 - self.alpha / len(self.adjusted)
        if more := statistics.needed_more(theirs, mine, prompts, confidence=confidence):
            return f"{more} more prompts are needed to tell {first} from {base}: {seen}.{down}", None, more
        same = [base, *(arm for arm in others if arm not in worse)]
        words = f"No difference is shown between {_listed(same)}: {seen}, and 55 % would have shown.{down}"
        return words, None, 0

    def _against(self, one: str, other: str) -> str:
        rate = self.rate(one, other)
        wins = f"wins {percent(rate)} of the pairs against {other}" if rate else f"is in no pair with {other}"
        return f"on {self.score}, {one} {wins}"


class _Alarm(NamedTuple):
    """Something that should not happen while the trained score rises: the p-value of its not being there, and words.
    ``scorer``: of a score that is down; alarms of one scorer become one sentence."""

    arm: str
    p: float
    words: str
    scorer: str = ""


def hacking(measured: Measured, alpha: float = 0.05) -> dict[str, list[str]]:
    """The arms that seem to game the score that they were trained on, each with a sentence for every sign of it, and
    one for all numbers of a scorer.

    An arm is named if its trained score is up against the base and at least one of these alarms is shown:

    - another score is down (win rate below 1/2);
    - diversity is down by more than `DIVERSITY_LOST` of the base's;
    - unless any other score is up: a signal has moved, either way, by more than `SHIFT` standard deviations of the
      base's pictures;
    - unless any other score is up: the pictures are farther from the base's than the base's are from each other.

    The probability of naming an arm whose trained score is not up is ``alpha`` at most (Holm over the arms), and so is
    that of an alarm about something that has not moved (Holm over all alarms of all arms). Empty if it is not known
    which score was trained on.
    """
    trained, base = measured.trained, measured.base
    if trained is None or trained not in measured.scores:
        return {}
    arms = [arm for arm in measured.scores[trained] if arm != base and len(measured.pair(trained, arm, base)[2])]
    changes = {arm: _change(measured, trained, arm) for arm in arms}
    risen = dict(zip(arms, statistics.holm([changes[arm].p for arm in arms]) < alpha, strict=True))
    alarms = [alarm for arm in arms for alarm in _alarms(measured, arm, alpha)]
    shown = statistics.holm([alarm.p for alarm in alarms]) < alpha
    real = [alarm for alarm, sure in zip(alarms, shown, strict=True) if sure]
    found: dict[str, list[str]] = {}
    for arm in arms:
        rate, own = changes[arm].rate, [alarm for alarm in real if alarm.arm == arm]
        if own and risen[arm] and rate.value > 0.5:
            up = f"{arm} wins {percent(rate)} on {trained}, which it was trained on"
            found[arm] = [f"{up}, but {words}." for words in _sentences(own)]
    return found


def _sentences(alarms: list[_Alarm]) -> list[str]:
    """The words of one arm's alarms; scores of one scorer that are down stand together, the first `NAMED` of them."""
    words: list[str] = []
    for scorer in dict.fromkeys(alarm.scorer for alarm in alarms if alarm.scorer):
        down = [alarm.words for alarm in alarms if alarm.scorer == scorer]
        more = [f"{len(down) - NAMED} more numbers of {scorer}"] if len(down) > NAMED else []
        verb = "are" if len(down) > 1 else "is"
        words.append(f"{_listed([*down[:NAMED], *more])}, which {verb} down")
    return words + [alarm.words for alarm in alarms if not alarm.scorer]


class _Change(NamedTuple):
    rate: Estimate
    p: float


def _change(measured: Measured, score: str, arm: str) -> _Change:
    mine, theirs, prompts = measured.pair(score, arm, measured.base)
    return _Change(statistics.win_rate(theirs, mine, prompts), statistics.p_value(theirs, mine, prompts))


def _alarms(measured: Measured, arm: str, alpha: float) -> Iterator[_Alarm]:
    confirmed = False
    for name, arms in measured.scores.items():
        here = name != measured.trained and {arm, measured.base} <= arms.keys()
        if not here or not len(measured.pair(name, arm, measured.base)[2]):
            continue
        rate, p = _change(measured, name, arm)
        confirmed |= rate.value > 0.5 and p < alpha
        yield _Alarm(arm, p if rate.value < 0.5 else 1.0, f"{percent(rate)} on {name}", name.partition(".")[0])
    if {arm, measured.base} <= measured.diversity.keys():
        yield _diversity_lost(measured, arm)
    for name, signal in measured.signals.items():
        if {arm, measured.base} <= signal.keys():
            alarm = _shifted(measured, name, arm)
            yield alarm._replace(p=1.0) if confirmed else alarm
    if arm in measured.distance and measured.base in measured.diversity:
        alarm = _far(measured, arm)
        yield alarm._replace(p=1.0) if confirmed else alarm


def _diversity_lost(measured: Measured, arm: str) -> _Alarm:
    before, after = (np.asarray(measured.diversity[name], float) for name in (measured.base, arm))
    both = ~(np.isnan(before) | np.isnan(after))
    if not both.any():
        return _Alarm(arm, 1.0, "")
    before, after = before[both], after[both]
    allowed = DIVERSITY_LOST * before.mean()
    p = statistics.p_beyond(before - after, np.arange(len(before)), allowed)
    return _Alarm(arm, p, f"its pictures are less diverse ({after.mean():.3g}, {measured.base} {before.mean():.3g})")


def _shifted(measured: Measured, name: str, arm: str) -> _Alarm:
    before, after = (np.asarray(measured.signals[name][each], float) for each in (measured.base, arm))
    both = ~(np.isnan(before) | np.isnan(after))
    if not both.any():
        return _Alarm(arm, 1.0, "")
    change, prompts, spread = (after - before)[both], np.asarray(measured.prompt_id)[both], float(before[both].std())
    p = min(statistics.p_beyond(change, prompts, SHIFT * spread), statistics.p_beyond(-change, prompts, SHIFT * spread))
    way = "up" if change.mean() > 0 else "down"
    size = f", by {abs(change.mean()) / spread:.2g} standard deviations" if spread > 0 else ""
    words = f"no other score is up and {name} is {way} from {before[both].mean():.3g} to {after[both].mean():.3g}{size}"
    return _Alarm(arm, min(1.0, 2 * p), words)


def _far(measured: Measured, arm: str) -> _Alarm:
    distance, base = np.asarray(measured.distance[arm], float), np.asarray(measured.diversity[measured.base], float)
    there = ~np.isnan(distance)
    if not there.any() or np.isnan(base).all():
        return _Alarm(arm, 1.0, "")
    usual = float(np.nanmean(base))
    p = statistics.p_beyond(distance[there], np.asarray(measured.prompt_id)[there], usual)
    words = (
        f"no other score is up and its pictures are farther from {measured.base}'s ({distance[there].mean():.3g}) than "
        f"those are from each other ({usual:.3g})"
    )
    return _Alarm(arm, p, words)


def percent(rate: Estimate) -> str:
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f} %, {100 * rate.high:.1f} %]"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
