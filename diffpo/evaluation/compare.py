"""What the scores of several arms say: differences and win rates with intervals, prompt by prompt, and diversity.

The first arm is the one that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import DiffpoError
from . import statistics, verdict
from .bradley_terry import bradley_terry
from .items import Item
from .measured import Measured
from .statistics import Estimate
from .traits import Traits, measure
from .verdict import Verdict


@dataclass(frozen=True)
class Comparison:
    """One line of the table: an arm against the first one, by one score.

    Attributes:
        base, tuned: means of the first arm and of this one, over the ``n`` pictures that both have.
        difference: tuned - base.
        p: that the win rate is 1/2; of several arms after Holm's correction over them.
        training_signal: yes, same scorer, or no.
    """

    scorer: str
    arm: str
    base: float
    tuned: float
    difference: Estimate
    win_rate: Estimate
    p: float
    n: int
    training_signal: str


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    Attributes:
        arms: their names; the first is compared with.
        rows: by score, and within a score by arm.
        primary: the score that decides, and sorts the prompts.
        strengths: by score and arm, log-strengths of mean 0 (`bradley_terry`); only for three arms and more.
        traits: signals, diversity and distances.
        verdict: which arm to use.
        by_prompt: by arm but the first: prompts, sorted by the difference of the primary score, best first.
        scores: by score and arm, (n,) each for n ``items``; NaN where there is none.
        files: what was written, by name.
        left_out: sentences on what could not be compared.
    """

    arms: tuple[str, ...]
    items: list[Item]
    scores: dict[str, dict[str, np.ndarray]]
    rows: list[Comparison]
    primary: str
    strengths: dict[str, dict[str, Estimate]]
    traits: Traits
    verdict: Verdict
    by_prompt: dict[str, list[dict]]
    files: dict[str, Path]
    left_out: list[str] = field(default_factory=list)

    def row(self, scorer: str, arm: str | None = None) -> Comparison:
        """The line of a score; of several arms the first one's unless ``arm`` is named."""
        return next(row for row in self.rows if row.scorer == scorer and arm in (None, row.arm))

    def table(self) -> list[dict[str, Any]]:
        """`rows` as flat rows of texts and numbers, for ``pandas.DataFrame``: intervals have columns of their own."""
        flat = []
        for row in self.rows:
            values: dict[str, Any] = {"scorer": row.scorer, "arm": row.arm, "against": self.arms[0]}
            values |= {"mean": row.tuned, "mean_against": row.base}
            for name in ("difference", "win_rate"):
                estimate = getattr(row, name)
                values |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            flat.append(values | {"p": row.p, "n": row.n, "training_signal": row.training_signal})
        return flat

    @property
    def diversity(self) -> dict[str, float]:
        """The mean of each arm's."""
        return {
            arm: float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")
            for arm, each in self.traits.diversity.items()
        }

    @property
    def shown(self) -> str:
        """The arm whose best and worst prompts stand first: the one to use, or the first that is compared."""
        arm = self.verdict.arm
        return arm if arm in self.by_prompt else next(iter(self.by_prompt))

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return len({item.index for item in self.items})


def summarise(
    items: Sequence[Item],
    scores: dict[str, dict[str, np.ndarray]],
    train_scorer: str | None = None,
    traits: Traits | None = None,
) -> Evaluation:
    """The statistics of given scores; the order of the arms is that in ``scores``. A picture whose score is NaN in
    either arm is left out of that row. ``traits``: None measures them. DiffpoError if there is no row."""
    ids = np.array([item.index for item in items])
    arms = tuple(dict.fromkeys(arm for by_arm in scores.values() for arm in by_arm))
    rows: list[Comparison] = []
    for name, by_arm in scores.items():
        own = [_compared(name, (arms[0], arm), by_arm, ids, train_scorer) for arm in arms[1:]]
        there = [row for row in own if row]
        adjusted = statistics.holm([row.p for row in there]).tolist() if there else []
        rows += [replace(row, p=p) for row, p in zip(there, adjusted, strict=True)]
    if not rows:
        raise DiffpoError(f"no prompt has any of the scores {', '.join(scores)}; name other scorers")
    names = list(dict.fromkeys(row.scorer for row in rows))
    traits = measure(items, arms) if traits is None else traits
    measured = Measured(
        scores={name: scores[name] for name in names if arms[0] in scores[name]},
        prompt_id=ids,
        base=arms[0],
        trained=train_scorer,
        related=frozenset(name for name in names if _training_signal(name, train_scorer) == "same scorer"),
        signals=traits.signals,
        distance=traits.distance,
        diversity=traits.diversity,
    )
    primary = verdict.deciding(measured)
    return Evaluation(
        arms=arms,
        items=list(items),
        scores=scores,
        rows=rows,
        primary=primary,
        strengths={name: _strengths(scores[name], ids) for name in names} if len(arms) > 2 else {},
        traits=traits,
        verdict=verdict.judge(measured),
        by_prompt={arm: _by_prompt(items, scores[primary], arms[0], arm) for arm in arms[1:] if arm in scores[primary]},
        files={},
    )


def _strengths(by_arm: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, Estimate]:
    return dict(zip(by_arm, bradley_terry(np.stack(list(by_arm.values()), 1), ids), strict=True))


def _compared(
    name: str, arms: tuple[str, str], scores: dict[str, np.ndarray], ids: np.ndarray, train_scorer: str | None
) -> Comparison | None:
    """A line of the table; None if no picture has the score in both arms."""
    if not {*arms} <= scores.keys():
        return None
    base, tuned = (scores[arm] for arm in arms)
    scored = ~(np.isnan(base) | np.isnan(tuned))
    if not scored.any():
        return None
    base, tuned, ids = base[scored], tuned[scored], ids[scored]
    return Comparison(
        scorer=name,
        arm=arms[1],
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        difference=statistics.mean_difference(base, tuned, ids),
        win_rate=statistics.win_rate(base, tuned, ids),
        p=statistics.p_value(base, tuned, ids),
        n=len(base),
        training_signal=_training_signal(name, train_scorer),
    )


def _training_signal(name: str, train_scorer: str | None) -> str:
    if name == train_scorer:
        return "yes"
    same = train_scorer is not None and name.partition(".")[0] == train_scorer.partition(".")[0]
    return "same scorer" if same else "no"


def _by_prompt(items: Sequence[Item], scores: dict[str, np.ndarray], first: str, arm: str) -> list[dict]:
    """Per prompt, the means over its seeds and the difference; best first."""
    groups: dict[int, list[int]] = {}
    scored = ~(np.isnan(scores[first]) | np.isnan(scores[arm]))
    for k in np.flatnonzero(scored).tolist():
        groups.setdefault(items[k].index, []).append(k)
    entries = []
    for index, ks in groups.items():
        base, tuned = float(scores[first][ks].mean()), float(scores[arm][ks].mean())
        text = {"prompt_id": index, "prompt": items[ks[0]].prompt}
        entries.append({**text, "base": base, "tuned": tuned, "difference": tuned - base})
    return sorted(entries, key=lambda e: (-e["difference"], e["prompt_id"]))
