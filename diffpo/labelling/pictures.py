"""The pictures to judge: made by arms as in `diffpo eval`, or found in folders, and grouped by their prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import scorers
from ..common.errors import DiffpoError
from ..common.names import hint
from ..common.text import plain
from ..evaluation import generate, items
from ..evaluation.arms import Source
from ..evaluation.generation import Generation
from ..evaluation.items import Found, Item
from ..evaluation.scoring import Scores
from .aggregate import Floats


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt: of which arm and seed, and its file."""

    arm: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Prompted:
    """The k pictures of a prompt that can be judged, and their numbers (k, m). A number that the prompt does not ask
    for is NaN for all of them."""

    index: int
    prompt: str
    pictures: tuple[Picture, ...]
    scores: Floats

    @property
    def there(self) -> NDArray[np.bool_]:
        """Which numbers the prompt asks for, (m,)."""
        return np.asarray(np.isfinite(self.scores).all(0))

    @property
    def asked(self) -> Floats:
        """These numbers, (k, at most m), without NaN."""
        return self.scores[:, self.there]


def collect(
    arms: Mapping[str, Source], prompts: Any, out: Path, n: int | None, gaps: list[str]
) -> tuple[list[Item], list[dict[str, Any]]]:
    """One item for each picture, and the manifest rows of those that were made for it.

    Equal prompts are one prompt. Pictures are made by `evaluation.generate`; of a folder those of the first ``n``
    ``prompts`` are used, or all. Sentences on what is left out go into ``gaps``. DiffpoError without any picture.
    """
    texts = items.prompts_of(prompts)
    made = {name: each for name, each in arms.items() if isinstance(each, Generation)}
    if made and prompts is None:
        raise DiffpoError("label needs --prompts to make pictures, or --images with a folder of them")
    rows = generate.run(made, prompts, out, n) if made else []
    first = None if texts is None else {*texts[:n]}
    numbers = {text: k for k, text in enumerate(dict.fromkeys(texts or ()))}
    single: list[Item] = []
    for name, each in arms.items():
        if isinstance(each, Path):
            found: Sequence[Found] = items.of_folder(each, texts, gaps)
        else:
            found = items.of_rows(out, (row for row in rows if row["arm"] == name))
        for one in sorted(found):
            if first is None or one.prompt in first:
                index = numbers.setdefault(one.prompt, len(numbers))
                single.append(Item(index, one.seed, one.prompt, {name: one.path}))
    if first is None and n is not None:
        single = [item for item in single if item.index < n]
    if not single:
        raise DiffpoError("there is no picture to label: check --prompts, --images and --arm")
    return sorted(single, key=lambda item: item.index), rows


def loaded_as(spec: str) -> str:
    """What `scorers.load` takes for ``spec``, which may name one number of several: shapes.total is shapes."""
    name, source, _ = scorers.parse(spec)
    if ":" in name:  # a URL, or a class of the user's, which give one number alone
        return spec
    return name if source is None else f"{name}={source}"


def resolve(specs: Sequence[str], prompts: Sequence[str]) -> dict[str, list[str]]:
    """{scorer as `scorers.load` takes it: the numbers to label by}. Each scorer is loaded once, so that missing weights
    are found before a picture is made. DiffpoError for a scorer of several numbers of which none is named."""
    found: dict[str, list[str]] = {}
    for spec in specs:
        name, _, number = scorers.parse(spec)
        where = loaded_as(spec)
        scorer = scorers.load(where)
        if callable(check := getattr(scorer, "check_prompts", None)) and prompts:
            check(list(prompts))
        if number is None or where == spec:
            number = scorer.names[0] if len(scorer.names) == 1 else None
        if number is None:
            raise DiffpoError(
                f"the scorer {spec} gives {', '.join(scorer.names)}: name the one to label by, e.g. {scorer.names[0]}"
            )
        if number not in scorer.names:
            raise DiffpoError(f"the scorer {name} gives no number {number!r}: {hint(number, scorer.names)}")
        if any(number in numbers for numbers in found.values()):
            raise DiffpoError(f"the number {number!r} is named twice: leave one of them out")
        found.setdefault(where, []).append(number)
    if not found:
        raise DiffpoError("no scorer named; for example --scorers pickscore")
    return found


def group(singles: Sequence[Item], scores: Scores, numbers: Sequence[str]) -> tuple[list[Prompted], list[str]]:
    """The prompts with at least two pictures that have all ``numbers``, and sentences on what is left out."""
    prompts: dict[int, list[tuple[Item, Floats]]] = {}
    for k, item in enumerate(singles):
        (arm,) = item.pictures
        row = [scores.values.get(name, {}).get(arm, _NONE) for name in numbers]
        prompts.setdefault(item.index, []).append((item, np.array([each[k] if len(each) else np.nan for each in row])))
    kept: list[Prompted] = []
    gaps: list[str] = []
    few: list[str] = []
    lost = 0
    for index, own in sorted(prompts.items()):
        table = np.stack([row for _, row in own])
        asked = np.isfinite(table).any(0)  # an optional number may not be asked for by this prompt
        good = np.asarray(np.isfinite(table[:, asked]).all(1) & asked.any())
        lost += int((~good).sum())
        if good.sum() < 2:
            few.append(own[0][0].prompt)
            continue
        there = [item for (item, _), ok in zip(own, good.tolist(), strict=True) if ok]
        pictures = tuple(Picture(next(iter(i.pictures)), i.seed, next(iter(i.pictures.values()))) for i in there)
        kept.append(Prompted(index, there[0].prompt, pictures, table[good]))
    if lost:
        gaps.append(f"{lost} of {len(singles)} pictures lack a number and are left out")
    if few:
        gaps.append(
            f"{len(few)} of {len(prompts)} prompts have fewer than two pictures with all numbers and are left out, "
            f"such as {plain(few[0], 60)!r}"
        )
    if not kept:
        raise DiffpoError(f"there is nothing to compare: {'; '.join([*scores.gaps()[:3], *gaps])}")
    return kept, gaps


_NONE: Floats = np.zeros(0)
