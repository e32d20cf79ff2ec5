"""What was measured of several arms, as the tests and the verdict take it. Works on arrays; no picture is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .statistics import Estimate

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


def percent(rate: Estimate) -> str:
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f} %, {100 * rate.high:.1f} %]"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
