"""How far annotators agree with each other, and each with their own earlier votes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from math import nan

from .store import Vote


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Agreement of two annotators on n items beyond chance, of nominal categories: (p_o - p_e) / (1 - p_e), where p_e
    follows from how often each uses each category (Cohen 1960, Educ. Psychol. Meas. 20, 37-46).

    NaN without items, and where both use one category only. ValueError for sequences of different lengths.
    """
    pairs = list(zip(one, other, strict=True))
    if not pairs:
        return nan
    n = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    observed = sum(a == b for a, b in pairs) / n
    expected = sum(first[value] * second[value] for value in first) / n**2
    return nan if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float:
    """Agreement of any number of annotators of nominal categories: 1 - D_o / D_e (Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability", eq. for nominal data).

    ``units``: the values that each item got, in any order; items with fewer than two do not count. NaN if none counts
    or if all values are equal.
    """
    pairable = [Counter(unit) for unit in units if len(unit) > 1]
    totals: Counter[Hashable] = Counter()
    disagreement = 0.0
    for unit in pairable:
        m = unit.total()
        disagreement += (m * m - sum(count * count for count in unit.values())) / (m - 1)
        totals.update(unit)
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    return nan if expected == 0 else 1 - (n - 1) * disagreement / expected


def category(vote: Vote) -> Hashable:
    """What a vote says, as a nominal category: which pictures have which rank; all bad is one of its own."""
    return "bad" if vote.bad else vote.ranks


def between(votes: Iterable[Vote]) -> tuple[float, dict[tuple[str, str], tuple[float, int]]]:
    """Krippendorff's alpha of first votes, skips left out, and Cohen's kappa of every two annotators with the number of
    tasks that both voted on."""
    by_task: dict[str, dict[str, Hashable]] = {}
    for vote in votes:
        if vote.ranks is not None and not vote.repeat:
            by_task.setdefault(vote.task, {})[vote.annotator] = category(vote)
    names = sorted({name for each in by_task.values() for name in each})
    kappa = {}
    for one, other in combinations(names, 2):
        both = [(each[one], each[other]) for each in by_task.values() if one in each and other in each]
        if both:
            kappa[one, other] = (cohen_kappa(*zip(*both, strict=True)), len(both))
    return krippendorff_alpha([[*each.values()] for each in by_task.values()]), kappa


def repeated(votes: Iterable[Vote]) -> dict[str, tuple[int, int]]:
    """By annotator: how many of the repeated tasks got the same answer, and how many were repeated."""
    found: dict[tuple[str, str], dict[int, Hashable]] = {}
    for vote in votes:
        if vote.ranks is not None:
            found.setdefault((vote.annotator, vote.task), {})[vote.repeat] = category(vote)
    counts: dict[str, tuple[int, int]] = {}
    for (name, _), each in found.items():
        if len(each) == 2:
            same, n = counts.get(name, (0, 0))
            counts[name] = (same + (each[0] == each[1]), n + 1)
    return counts


def first_side(votes: Iterable[Vote]) -> tuple[int, int]:
    """Of pairs with a winner: how often the picture that was shown first won, and how many there are. Sides are random,
    so a share far from a half says that votes follow the side."""
    won = n = 0
    for vote in votes:
        if vote.ranks is not None and len(vote.ranks) == 2 and vote.ranks[0] != vote.ranks[1]:
            n += 1
            won += vote.ranks[vote.order[0]] == 1
    return won, n
