"""What two arms' scores say: paired differences and win rates with intervals, prompt by prompt, and diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.errors import DiffpoError
from . import statistics
from .generation import ARMS
from .manifest import open_image
from .statistics import Estimate

_DIVERSITY_IMAGES, _DIVERSITY_SIZE = 512, 64  # more or larger pictures take minutes and change little


@dataclass(frozen=True)
class Pair:
    """One prompt and seed with the picture of each arm."""

    index: int
    seed: int
    prompt: str
    base: Path
    tuned: Path


@dataclass(frozen=True)
class Comparison:
    """One line of the table. ``difference`` is tuned - base; ``training_signal``: yes, same scorer, or no."""

    scorer: str
    base: float
    tuned: float
    difference: Estimate
    win_rate: Estimate
    n: int
    training_signal: str


@dataclass(frozen=True)
class Evaluation:
    """``primary`` names the row that sorts the prompts; ``by_prompt`` is sorted by its difference, best first."""

    rows: list[Comparison]
    primary: str
    diversity: dict[str, float]
    by_prompt: list[dict]
    pairs: list[Pair]
    scores: dict[str, dict[str, np.ndarray]]
    files: dict[str, Path]

    def row(self, scorer: str) -> Comparison:
        return next(row for row in self.rows if row.scorer == scorer)


def summarise(pairs: Sequence[Pair], scores: dict[str, dict[str, np.ndarray]], train_scorer: str | None) -> Evaluation:
    """The statistics of given scores. A pair whose score is NaN, because its prompt has none, is left out of that row.
    DiffpoError if no pair is left."""
    ids = np.array([pair.index for pair in pairs])
    rows = []
    for name, arms in scores.items():
        base, tuned = arms["base"], arms["tuned"]
        scored = ~(np.isnan(base) | np.isnan(tuned))
        if not scored.any():
            continue
        base, tuned, own_ids = base[scored], tuned[scored], ids[scored]
        rows.append(
            Comparison(
                name,
                float(base.mean()),
                float(tuned.mean()),
                statistics.mean_difference(base, tuned, own_ids),
                statistics.win_rate(base, tuned, own_ids),
                len(base),
                _training_signal(name, train_scorer),
            )
        )
    if not rows:
        raise DiffpoError(f"no prompt has any of the scores {', '.join(scores)}; name other scorers")
    names = [row.scorer for row in rows]
    primary = train_scorer if train_scorer in names else names[0]
    return Evaluation(
        rows=rows,
        primary=primary,
        diversity=_diversity(pairs),
        by_prompt=_by_prompt(pairs, scores[primary]),
        pairs=list(pairs),
        scores=scores,
        files={},
    )


def _training_signal(name: str, train_scorer: str | None) -> str:
    if name == train_scorer:
        return "yes"
    same = train_scorer is not None and name.partition(".")[0] == train_scorer.partition(".")[0]
    return "same scorer" if same else "no"


def _by_prompt(pairs: Sequence[Pair], arms: dict[str, np.ndarray]) -> list[dict]:
    """Per prompt, the means over its seeds and the difference; best first."""
    groups: dict[int, list[int]] = {}
    for k, pair in enumerate(pairs):
        groups.setdefault(pair.index, []).append(k)
    entries = []
    scored = ~(np.isnan(arms["base"]) | np.isnan(arms["tuned"]))
    for index, group in groups.items():
        if not (ks := [k for k in group if scored[k]]):
            continue
        base, tuned = float(arms["base"][ks].mean()), float(arms["tuned"][ks].mean())
        entries.append(
            {
                "prompt_id": index,
                "prompt": pairs[ks[0]].prompt,
                "base": base,
                "tuned": tuned,
                "difference": tuned - base,
            }
        )
    return sorted(entries, key=lambda e: (-e["difference"], e["prompt_id"]))


def _diversity(pairs: Sequence[Pair]) -> dict[str, float]:
    chosen = pairs[:_DIVERSITY_IMAGES]
    sizes = {open_image(path).size for path in (chosen[0].base, chosen[0].tuned)}
    size = min(min(min(s) for s in sizes), _DIVERSITY_SIZE)
    numbers = {}
    for arm in ARMS:
        small = [open_image(getattr(p, arm)).resize((size, size), Image.Resampling.BOX) for p in chosen]
        numbers[arm] = statistics.diversity(np.stack([np.asarray(s) for s in small]) / 255, [p.index for p in chosen])
    return numbers
