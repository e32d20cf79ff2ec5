"""Scorers: pictures and their prompts in, numbers out.

A scorer is any object with ``score(images, prompts) -> {name: float64 array of shape (n,)}``: ``images`` is a list of
n PIL pictures, ``prompts`` a list of n texts, and one scorer may give several numbers, its ``names``. NaN means
failure, except under the names in ``optional``, where it means that the prompt does not ask for this. Another model is
another file here and one line in `load`, or runs behind `diffpo serve-scorer` and is named by its URL.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.names import hint

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

NAMES = ("shapes", "pickscore", "hps", "clip", "aesthetic")
HOST = r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]"
URL = re.compile(rf"(https?://(?:{HOST})(?::([0-9]{{1,5}}))?)(?:/([A-Za-z0-9_.-]*))?")


class Scorer(Protocol):
    names: tuple[str, ...]
    optional: frozenset[str]

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]: ...


def check_name(spec: str) -> tuple[str, str | None]:
    """Split ``name`` or ``name=source``; raises DiffpoError for an unknown name, offering the nearest."""
    name, _, source = spec.partition("=")
    if name not in NAMES:
        raise DiffpoError(f"unknown scorer {name!r}: {hint(name, NAMES)}")
    return name, source or None


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def split_url(spec: str) -> tuple[str, str | None]:
    """``http://HOST:PORT`` or ``http://HOST:PORT/NUMBER`` -> the server's URL and the number; DiffpoError otherwise.
    The server is not asked."""
    found = URL.fullmatch(spec)
    if not found or not 0 < int(found[2] or 80) < 2**16:
        raise DiffpoError(f"{spec!r} is not the URL of a scorer: write http://HOST:PORT or http://HOST:PORT/NUMBER")
    return found[1], found[3] or None


def default_device(spec: str) -> str:
    """Where the scorer runs if nobody says: on CUDA where there is one."""
    if spec.startswith("shapes") or is_url(spec):
        return "cpu"  # spares the import
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(spec: str, device: str = "cpu") -> Scorer:
    """The scorer ``name``, or ``name=source`` with weights from a local file or folder or another hub id, or the one
    that answers at ``http://HOST:PORT`` (``/NUMBER``: that number alone)."""
    if is_url(spec):
        from .client import HttpScorer

        return HttpScorer(*split_url(spec))
    name, source = check_name(spec)
    if name == "shapes":
        from .shapes import ShapesScorer

        return ShapesScorer()
    limit_waiting()
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
