"""The nearest known name for one that is misspelt."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

CUTOFF = 0.6  # of difflib's ratio, 1 for equal words


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name in ``known`` that ``word`` most likely means; None if none is near."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=CUTOFF)), None)


def hint(word: str, known: Iterable[str]) -> str:
    """For an error message: the nearest name, or all there are."""
    known = list(known)
    if near := nearest(word, known):
        return f"did you mean {near}?"
    return f"choose one of {', '.join(known)}" if known else "there is none to choose from"
