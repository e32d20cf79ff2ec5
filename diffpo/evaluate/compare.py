"""What the scores of several arms say: differences and win rates with intervals, prompt by prompt, and diversity.

The first arm is the one that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.errors import DiffpoError
from . import statistics
from .items import Item
from .manifest import open_image
from .statistics import Estimate

_DIVERSITY_IMAGES, _DIVERSITY_SIZE = 512, 64  # more or larger pictures take minutes and change little


@dataclass(frozen=True)
class Comparison:
    """One line of the table: an arm against the first one, by one score.

    Attributes:
        base, tuned: means of the first arm and of this one, over the ``n`` pictures that both have.
        difference: tuned - base.
        training_signal: yes, same scorer, or no.
    """

    scorer: str
    arm: str
    base: float
    tuned: float
    difference: Estimate
    win_rate: Estimate
    n: int
    training_signal: str


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    Attributes:
        arms: their names; the first is compared with.
        rows: by score, and within a score by arm.
        primary: the score that sorts the prompts.
        diversity: by arm.
        by_prompt: by arm but the first: prompts, sorted by the difference of the primary score, best first.
        scores: by score and arm, (n,) each for n ``items``; NaN where there is none.
        files: what was written, by name.
    """

    arms: tuple[str, ...]
    items: list[Item]
    scores: dict[str, dict[str, np.ndarray]]
    rows: list[Comparison]
    primary: str
    diversity: dict[str, float]
    by_prompt: dict[str, list[dict]]
    files: dict[str, Path]

    def row(self, scorer: str, arm: str | None = None) -> Comparison:
        """The line of a score; of several arms the first one's unless ``arm`` is named."""
        return next(row for row in self.rows if row.scorer == scorer and arm in (None, row.arm))

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return len({item.index for item in self.items})


def summarise(
    items: Sequence[Item], scores: dict[str, dict[str, np.ndarray]], train_scorer: str | None = None
) -> Evaluation:
    """The statistics of given scores; the order of the arms is that in ``scores``. A picture whose score is NaN in
    either arm is left out of that row. DiffpoError if there is no row."""
    ids = np.array([item.index for item in items])
    arms = tuple(dict.fromkeys(arm for by_arm in scores.values() for arm in by_arm))
    rows = [
        row
        for name, by_arm in scores.items()
        for arm in arms[1:]
        if arms[0] in by_arm
        and arm in by_arm
        and (row := _compared(name, arm, by_arm[arms[0]], by_arm[arm], ids, train_scorer))
    ]
    if not rows:
        raise DiffpoError(f"no prompt has any of the scores {', '.join(scores)}; name other scorers")
    names = [row.scorer for row in rows]
    primary = train_scorer if train_scorer is not None and train_scorer in names else names[0]
    return Evaluation(
        arms=arms,
        items=list(items),
        scores=scores,
        rows=rows,
        primary=primary,
        diversity=_diversity(items, arms),
        by_prompt={arm: _by_prompt(items, scores[primary], arms[0], arm) for arm in arms[1:]},
        files={},
    )


def _compared(
    name: str, arm: str, base: np.ndarray, tuned: np.ndarray, ids: np.ndarray, train_scorer: str | None
) -> Comparison | None:
    """A line of the table; None if no picture has the score in both arms."""
    scored = ~(np.isnan(base) | np.isnan(tuned))
    if not scored.any():
        return None
    base, tuned, ids = base[scored], tuned[scored], ids[scored]
    return Comparison(
        scorer=name,
        arm=arm,
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        difference=statistics.mean_difference(base, tuned, ids),
        win_rate=statistics.win_rate(base, tuned, ids),
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


def _diversity(items: Sequence[Item], arms: Sequence[str]) -> dict[str, float]:
    """Of each arm, over the first pictures that all arms have; NaN where there are none."""
    small: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
    ids: list[int] = []
    size = 0
    for item in [item for item in items if all(arm in item.pictures for arm in arms)][:_DIVERSITY_IMAGES]:
        try:
            opened = [open_image(item.pictures[arm]) for arm in arms]
        except DiffpoError:  # the scorers counted it
            continue
        size = size or min(_DIVERSITY_SIZE, *(side for image in opened for side in image.size))
        for arm, image in zip(arms, opened, strict=True):
            small[arm].append(np.asarray(image.resize((size, size), Image.Resampling.BOX)))
        ids.append(item.index)
    return {arm: statistics.diversity(np.stack(small[arm]) / 255, ids) if ids else float("nan") for arm in arms}
