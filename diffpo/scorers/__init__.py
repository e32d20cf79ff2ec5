"""Scorers: pictures and their prompts in, numbers out.

A scorer is any object with ``score(images, prompts) -> {name: float64 array of shape (n,)}``: ``images`` is a list of
n PIL pictures, ``prompts`` a list of n texts, and one scorer may give several numbers, its ``names``. NaN means
failure, except under the names in ``optional``, where it means that the prompt does not ask for this. Another model is
another file here and one line in `load`.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol

from ..errors import DiffpoError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

NAMES = ("shapes", "pickscore", "hps", "clip", "aesthetic")


class Scorer(Protocol):
    names: tuple[str, ...]
    optional: frozenset[str]

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]: ...


def check_name(spec: str) -> tuple[str, str | None]:
    """Split ``name`` or ``name=source``; raises DiffpoError for an unknown name, offering the nearest."""
    name, _, source = spec.partition("=")
    if name not in NAMES:
        near = get_close_matches(name, NAMES, 1)
        raise DiffpoError(
            f"unknown scorer {name!r}{f', did you mean {near[0]!r}?' if near else ''} (there are {', '.join(NAMES)})"
        )
    return name, source or None


def load(spec: str, device: str = "cpu") -> Scorer:
    """The scorer ``name``, or ``name=source`` with weights from a local file or folder or another hub id."""
    name, source = check_name(spec)
    if name == "shapes":
        from .shapes import ShapesScorer

        return ShapesScorer()
    if name == "pickscore":
        from .pickscore import PickScore

        return PickScore.load(source, device)
    if name == "hps":
        from .hps import HPS

        return HPS.load(source, device)
    if name == "clip":
        from .clip import ClipScore

        return ClipScore.load(source, device)
    from .aesthetic import Aesthetic

    return Aesthetic.load(source, device)


def missing(what: str, error: Exception, advice: str) -> DiffpoError:
    """The one error of a scorer whose weights are not at hand."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DiffpoError(f"cannot load {what}: {reason}\n{advice}")
