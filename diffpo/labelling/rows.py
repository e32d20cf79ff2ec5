"""From judged prompts to rows: pairs, rankings or likes, with ties by a margin and a chosen share of wrong labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch

from ..common.errors import DiffpoError
from ..common.rng import generator
from .aggregate import Judged
from .pictures import Prompted

Form = Literal["pairs", "rankings", "likes"]
Which = Literal["best-worst", "all", "best-random"]


@dataclass(frozen=True)
class Row:
    """A row of the file: pictures of one prompt by their places, and what is said of them.

    Attributes:
        members: two pictures of a pair, all of a ranking, or one that is liked or not.
        label: P(the first is better) of a pair, P(it is liked) of a single picture; 0.5 is a tie.
        worth: of each member.
        gap: how clear it is, in 0..1, or in units of the number with the rule `score`.
        flipped: the label was turned round on purpose.
        captions: one for each picture of a pair (DCPO); None: they have the prompt alone.
        displacement: the score of `displacement.py`.
    """

    prompt: Prompted
    members: tuple[int, ...]
    label: float
    worth: tuple[float, ...]
    gap: float
    flipped: bool = False
    captions: tuple[str, str] | None = None
    displacement: float | None = None

    @property
    def files(self) -> list[Path]:
        """Of its pictures."""
        return [self.prompt.pictures[k].path for k in self.members]

    @property
    def tie(self) -> bool:
        return self.label == 0.5 and len(self.members) < 3

    @property
    def best_first(self) -> tuple[int, ...]:
        """The members of a pair with the better one first."""
        return self.members if self.label >= 0.5 else self.members[::-1]


@dataclass(frozen=True)
class Choice:
    """Which rows are made.

    Attributes:
        which: the pairs of a prompt: best against worst, all, or best against a random other one.
        margin: a gap that is no larger is a tie.
        drop: ties are left out, instead of written with label 0.5.
        flip: the share of the labels that are turned round; ``seed``: of these, and of best against random.
    """

    form: Form = "pairs"
    which: Which = "best-worst"
    margin: float = 0.0
    drop: bool = False
    flip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise DiffpoError(f"--margin {self.margin:g}: a margin is at least 0")
        if not 0 <= self.flip <= 1:
            raise DiffpoError(f"--flip {self.flip:g}: a share is between 0 and 1")


def make(prompts: Sequence[tuple[Prompted, Judged]], choice: Choice) -> tuple[list[Row], int]:
    """The rows of all prompts, in their order, and how many ties there were. DiffpoError if all are ties."""
    makers: dict[Form, Callable[[Prompted, Judged, Choice], list[Row]]] = {
        "pairs": _pairs,
        "rankings": _ranking,
        "likes": _likes,
    }
    rows = [row for prompt, judged in prompts for row in makers[choice.form](prompt, judged, choice)]
    ties = sum(row.tie for row in rows)
    if ties == len(rows):
        raise DiffpoError(f"all {ties} rows are ties, so nothing can be learnt: lower --margin, or add scorers")
    if choice.drop:
        rows = [row for row in rows if not row.tie]
    return _flipped(rows, choice), ties


def _pairs(prompt: Prompted, judged: Judged, choice: Choice) -> list[Row]:
    best, *others = judged.order
    pairs = [(best, others[-1])]
    if choice.which == "all":
        pairs = list(combinations(range(len(judged.worth)), 2))
    elif choice.which == "best-random":
        draw = generator(choice.seed, "label best-random", prompt.index)
        pairs = [(best, others[int(torch.randint(len(others), (), generator=draw))])]
    rows = []
    for i, j in map(sorted, pairs):  # the order of the pictures, which says nothing about the label
        gap = float(judged.gaps[i, j])
        label = 0.5 if abs(gap) <= choice.margin else float(judged.beats[i, j])
        rows.append(Row(prompt, (i, j), label, (float(judged.worth[i]), float(judged.worth[j])), abs(gap)))
    return rows


def _ranking(prompt: Prompted, judged: Judged, choice: Choice) -> list[Row]:
    """All pictures of the prompt with their worth; none where all are worth the same, to within the margin."""
    worth = tuple(map(float, judged.worth))
    gap = max(worth) - min(worth)
    return [Row(prompt, tuple(range(len(worth))), 1.0, worth, gap)] if gap > choice.margin else []


def _likes(prompt: Prompted, judged: Judged, choice: Choice) -> list[Row]:
    """Each picture by itself: liked if it is worth more than the mean of its prompt."""
    mean = float(judged.worth.mean())
    rows = []
    for k, worth in enumerate(map(float, judged.worth)):
        gap = worth - mean
        label = 0.5 if abs(gap) <= choice.margin else float(gap > 0)
        rows.append(Row(prompt, (k,), label, (worth,), abs(gap)))
    return rows


def _flipped(rows: list[Row], choice: Choice) -> list[Row]:
    """Exactly ``choice.flip`` of the rows that are no ties turned round, rounded; a ranking's worths are mirrored."""
    clear = [k for k, row in enumerate(rows) if not row.tie]
    order = torch.randperm(len(clear), generator=generator(choice.seed, "label flip", 0)).tolist()
    for k in (clear[place] for place in order[: round(choice.flip * len(clear))]):
        row = replace(rows[k], label=1 - rows[k].label, flipped=True)
        if choice.form == "rankings":
            low, high = min(row.worth), max(row.worth)
            row = replace(row, label=1.0, worth=tuple(low + high - each for each in row.worth))
        rows[k] = row
    return rows
