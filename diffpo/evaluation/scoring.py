"""Scores of all pictures of all arms, one scorer in memory at a time. An interrupted run goes on where it was.

OUT/.scores/<digest>.jsonl   a line for each picture that is scored; deleted once scores.parquet is written
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import scorers
from ..common import processes
from ..common.errors import DiffpoError
from ..common.images import named, remarks
from ..common.instruction import encodable, key_of
from ..common.names import hint
from ..common.parts import Parts, file_key
from ..common.text import plain
from ..scorers import features
from ..scorers.careful import Careful
from .items import Item
from .manifest import open_image

PARTS = ".scores"
BATCH = 16
SAID = 4  # gaps in an error


@dataclass(frozen=True)
class Scoring:
    """How pictures are scored.

    Attributes:
        scorers: as for `diffpo.scorers.load`.
        train_scorer: the score that labelled the training pairs, if it is known.
        features: what diversity is measured in (`diffpo.scorers.features.load`); None: small pictures.
        device: None is each scorer's own default.
    """

    scorers: tuple[str, ...] = ("shapes",)
    train_scorer: str | None = None
    features: str | None = None
    device: str | None = None


@dataclass
class Scores:
    """Numbers by score and arm, (n,) float64 each. NaN: no picture, an unreadable one, or a prompt without this score.
    The first arm has all scores; others may lack some.

    Attributes:
        unreadable: the pictures of each arm that could not be read, with the reason.
        failed: by scorer and arm, the pictures that the scorer failed on, with the reason.
        nan: by score and arm, the pictures whose number came out as NaN or infinite.
        stopped: by scorer, why it gave up. It has no numbers here; the finished ones are kept.
        dropped: sentences on arms and scores without any number.
        notes: conversions of the pictures (`common.images.decode`).
    """

    values: dict[str, dict[str, np.ndarray]]
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    nan: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def gaps(self) -> list[str]:
        """What is missing, in sentences."""
        lines = [
            f"{len(names)} pictures of the arm {arm} cannot be read and are left out: {named(names)}"
            for arm, names in self.unreadable.items()
        ]
        lines += [
            f"the scorer {spec} fails on {len(names)} pictures of the arm {arm}, which are left out: {named(names)}"
            for (spec, arm), names in self.failed.items()
        ]
        lines += [
            f"the score {plain(score, 100)} is NaN for {len(names)} pictures of the arm {arm}, which are left out: "
            f"{named(names)}"
            for (score, arm), names in self.nan.items()
        ]
        lines += [
            f"the scorer {spec} gave up, and its scores are left out: {reason}. The same command continues it"
            for spec, reason in self.stopped.items()
        ]
        return lines + self.dropped


def check_scoring(scoring: Scoring, texts: Sequence[str] | None = None) -> None:
    """Load every scorer once before the first picture is made, so that missing weights are reported at once, and so is
    a scorer that can judge none of the prompts ``texts``."""
    if not scoring.scorers:
        raise DiffpoError("no scorer named; for example --scorers shapes")
    loaded = [scorers.load(spec) for spec in scoring.scorers]
    names = [name for scorer in loaded for name in scorer.names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DiffpoError(f"two of the scorers give the number {twice[0]!r}; compare them in two folders (--out)")
    _check_train_scorer(scoring.train_scorer, names)
    if scoring.features is not None:
        features.load(scoring.features)
    for scorer in loaded:
        if texts and callable(check := getattr(scorer, "check_prompts", None)):
            check(texts)


def _check_train_scorer(train_scorer: str | None, names: list[str]) -> None:
    """The training scorer need not be among the scorers, but a misspelt name is an error."""
    if train_scorer is None or train_scorer in names:
        return
    name = scorers.parse(train_scorer).name
    if parts := [known for known in names if known.partition(".")[0] == name]:
        raise DiffpoError(f"unknown training scorer {train_scorer!r}: {hint(train_scorer, parts)}")


def score_items(items: Sequence[Item], arms: Sequence[str], scoring: Scoring, out: Path | None = None) -> Scores:
    """`score_pictures`, of which the scores stay that the first arm and another one have. DiffpoError if that leaves
    nothing to compare with the first arm."""
    found = score_pictures(items, arms, scoring, out)
    found.values = {name: own for name, own in found.values.items() if arms[0] in own and len(own) > 1}
    if not found.values:
        raise DiffpoError(f"there is nothing to compare: {'; '.join(found.gaps()[:SAID])}")
    return found


def score_pictures(items: Sequence[Item], arms: Sequence[str], scoring: Scoring, out: Path | None = None) -> Scores:
    """The scores of all pictures. ``out``: where to keep what is finished; None keeps nothing.

    Of several processes each scores a share, and all get all scores. A scorer that gives up, and an arm or a score
    without numbers, are left out.
    """
    ours = processes.here()
    if ours.count > 1 and out is not None:
        for _ in _rows(ours.share(items), arms, scoring, out, Scores({})):
            pass
        ours.wait()
    found = Scores({})
    for spec, scorer, rows in _rows(items, arms, scoring, out, found):
        _collect(found, spec, scorer, rows)
    for arm, names in found.unreadable.items():
        if len(names) == sum(arm in item.pictures for item in items):
            found.dropped.append(f"no picture of the arm {arm} can be read; this arm is left out")
    if ours.main:
        for line in remarks(found.notes):
            print(line)
    return found


def _rows(
    items: Sequence[Item], arms: Sequence[str], scoring: Scoring, out: Path | None, found: Scores
) -> Iterator[tuple[str, Any, dict[str, list[_Row]]]]:
    """For each scorer that does not give up: by arm, a row of numbers for every item. They are kept in ``out``."""
    from tqdm.auto import tqdm

    ours, total = processes.here(), sum(len(item.pictures) for item in items)
    for number, spec in enumerate(scoring.scorers):
        scorer = scorers.load(spec, scoring.device or scorers.default_device(spec))
        about = {"desc": f"scoring by {plain(spec.partition('=')[0], 60)}", "unit": "image", "delay": 1}
        notes = found.notes if number == 0 else Counter()  # every scorer reads the same pictures
        with tqdm(total=total, disable=not ours.main, **about) as bar:
            pictures = _Arm(spec, Careful(scorer), found, notes, bar.update)
            try:
                yield spec, scorer, {arm: pictures.rows(items, arm, out) for arm in arms}
            except DiffpoError as error:  # of a server, or of a class of the user's: the other scorers go on
                found.stopped[spec] = plain(error, 1000)


def forget_parts(out: Path) -> None:
    """Delete what `score_items` kept, once the scores are written."""
    shutil.rmtree(out / PARTS, ignore_errors=True)


_Row = tuple[Item, dict[str, float] | None]  # without a picture, or with one that has no numbers: None


@dataclass
class _Arm:
    """One scorer, going from arm to arm. ``step``: moves the progress bar."""

    spec: str
    careful: Careful
    found: Scores
    notes: Counter[str]
    step: Callable[[int], object]

    def rows(self, items: Sequence[Item], arm: str, out: Path | None) -> list[_Row]:
        """A row for each item; those that are finished come from ``out``."""
        spec = self.spec + getattr(self.careful.scorer, "state", "")  # of votes: how many there are
        kept = Parts(None if out is None else out / PARTS, f"{spec} {arm}", processes.here().rank)
        own = [item for item in items if arm in item.pictures]
        keys = {id(item): file_key(item.pictures[arm], *_asked(item.prompt)) for item in own}
        rows = {id(item): row for item in own if (row := _numbers_in(kept.rows.get(keys[id(item)])))}
        todo = [item for item in own if id(item) not in rows]
        self.step(len(rows))
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            for item, row in zip(batch, self._scored(batch, arm), strict=True):
                if row is not None:
                    rows[id(item)] = row
                    kept.add(keys[id(item)], row)
            self.step(len(batch))
        return [(item, rows.get(id(item))) for item in items]

    def _scored(self, batch: Sequence[Item], arm: str) -> list[dict[str, float] | None]:
        """A row of numbers for each item; None where the picture cannot be read, or the scorer fails."""
        images: list[Any] = []
        for item in batch:
            try:
                images.append(open_image(item.pictures[arm]))
                self.notes.update(images[-1].info["notes"])
            except DiffpoError as error:
                images.append(None)
                names = self.found.unreadable.setdefault(arm, [])
                path = item.pictures[arm]
                reason = str(error).removeprefix(f"cannot read the image {path}: ").partition("; repair")[0]
                if (text := f"{_short(path)} ({plain(reason, 200)})") not in names:
                    names.append(text)
        there = [k for k, image in enumerate(images) if image is not None]
        rows: list[dict[str, float] | None] = [None] * len(batch)
        if there:
            scored = self.careful.score([images[k] for k in there], [encodable(batch[k].prompt) for k in there])
            for position, k in enumerate(there):
                if position in scored.failed:
                    text = f"{_short(batch[k].pictures[arm])} ({plain(scored.failed[position], 300)})"
                    self.found.failed.setdefault((self.spec, arm), []).append(text)
                else:
                    rows[k] = {name: float(values[position]) for name, values in scored.numbers.items()}
        return rows


def _asked(prompt: str) -> list[str]:
    """The prompt and, if it is about a picture, that one's hash."""
    return [prompt, *filter(None, [key_of(prompt)])]


def _numbers_in(kept: Any) -> dict[str, float] | None:
    """A row as it was kept; None for anything else, whose picture is scored again."""
    try:
        return {name: float(value) for name, value in kept.items()} if kept else None
    except (ValueError, TypeError, AttributeError):
        return None


def _short(path: Path) -> str:
    """A picture in a sentence that names its arm."""
    return f"{path.parent.name}/{path.name}"


def _collect(found: Scores, spec: str, scorer: Any, rows: dict[str, list[_Row]]) -> None:
    """Put a scorer's rows into the arrays; what is not a number is counted. A score is left out for an arm that has no
    number."""
    empty: dict[str, list[str]] = {}  # by score, the arms without a number
    for name in scorer.names:
        by_arm = {arm: _numbers(found, name, arm, scorer, own) for arm, own in rows.items()}
        lacking = [arm for arm, values in by_arm.items() if not np.isfinite(values).any()]
        if name not in scorer.optional:
            if any(row for arm in lacking for _, row in rows[arm]):  # others are unreadable, which is said
                empty[name] = lacking
        if len(lacking) < len(rows):
            found.values[name] = {arm: values for arm, values in by_arm.items() if arm not in lacking}
    found.dropped += [f"the scorer {spec} gave no {name} for {named(arms, 10)}" for name, arms in empty.items()]


def _numbers(found: Scores, name: str, arm: str, scorer: Any, rows: Sequence[_Row]) -> np.ndarray:
    """One score of an arm, (n,)."""
    values = np.array([np.nan if row is None else row[name] for _, row in rows])
    for k, (item, row) in enumerate(rows):
        if row is not None and (np.isinf(values[k]) or (np.isnan(values[k]) and name not in scorer.optional)):
            text = f"{_short(item.pictures[arm])} (prompt {item.index}, {plain(item.prompt, 60)!r})"
            found.nan.setdefault((name, arm), []).append(text)
            values[k] = np.nan
    return values
