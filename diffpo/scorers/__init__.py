"""Scorers: pictures and their prompts in, numbers out.

`load` takes a name in `SCORERS` (``judge=FILE.yaml`` and ``sum=TERMS`` have settings), ``http://HOST:PORT`` of
`diffpo serve-scorer`, or ``package.module:Class`` of a scorer of your own. Naming one of your own imports its module,
which runs it; `Scorer` defines what the class must have.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..common import devices
from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.imports import load_attribute
from ..common.names import hint

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# file here and class in it, which is made by its `load(source, device)`
SCORERS = {
    "shapes": "shapes:ShapesScorer",
    "pickscore": "pickscore:PickScore",
    "hps": "hps:HPS",
    "hps2.0": "hps:HPS20",
    "hpsv3": "hpsv3:HPSv3",
    "imagereward": "imagereward:ImageReward",
    "mps": "mps:MPS",
    "clip": "clip:ClipScore",
    "aesthetic": "aesthetic:Aesthetic",
    "judge": "vlm:VlmJudge",
    "sum": "ensemble:Sum",
    "votes": "votes:Votes",
}
# those that have `rate`; a sum has it if its terms do
DIFFERENTIABLE = ("pickscore", "hps", "hps2.0", "imagereward", "mps", "clip", "aesthetic")
# names that people know these numbers by, and what to write instead
ELSEWHERE = {
    **dict.fromkeys(("hpsv2", "hpsv2.1", "hps2.1", "hps2"), "write hps for HPS v2.1, and hps2.0 for v2.0"),
    **dict.fromkeys(("hpsv2.0", "hps-v2.0"), "write hps2.0"),
    **dict.fromkeys(("hps3", "hps3.0"), "write hpsv3=FOLDER (docs/score.md)"),
    **dict.fromkeys(("clipscore", "clip-score"), "write clip, or clip=ARCHITECTURE:WEIGHTS"),
    **dict.fromkeys(("vqascore", "vqa", "unifiedreward", "unified-reward"), "write judge=FILE.yaml (docs/score.md)"),
    **dict.fromkeys(("dinov2", "dino", "lpips", "inception"), "it compares pictures: use --features in eval"),
    **dict.fromkeys(("fid", "kid", "cmmd"), "it compares sets of pictures: use diffpo distance"),
}
HOST = r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]"
OUTSIDE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
URL = re.compile(rf"(https?://(?:{HOST})(?::([0-9]{{1,5}}))?)(?:/([A-Za-z0-9_.-]*))?")


class Scorer(Protocol):
    """What a scorer has, one of your own too.

    A class of your own is called with ``(source, device)`` if it takes two arguments, else with none. ``source`` is the
    text behind "=" in ``package.module:Class=SOURCE``, or None; ``device`` is "cpu", "cuda" or "mps".

    Attributes:
        names: of its numbers, e.g. ("sharpness",); letters, digits, ".", "_" and "-".
        optional: the names whose numbers may be NaN, which means that the prompt does not ask for them. A class of your
            own may leave this out.
        reads_prompt: False if the numbers do not depend on the prompts, which may then be empty. Left out, it is True.
    """

    names: tuple[str, ...]
    optional: frozenset[str]

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """``{name: float64 array of shape (n,)}`` for n PIL pictures and their n prompts; higher is better. NaN means
        failure, except under the names in ``optional``. A prompt that says how to edit pictures is a
        `diffpo.common.instruction.Instruction`, whose ``pictures()`` gives them.

        A scorer that reward fine-tuning can follow has also ``rate(pixels, prompts)``: ``{name: (n,) tensor}`` for
        pictures (n, 3, H, W) in [0, 1], with gradients by ``pixels``.
        """


class Spec(NamedTuple):
    """What names a scorer, in its parts.

    Attributes:
        name: in `SCORERS`, a URL, or `package.module:Class`.
        source: weights or settings behind "=".
        number: the one of its numbers that is meant; None: all, or the only one.
    """

    name: str
    source: str | None = None
    number: str | None = None


def parse(spec: str) -> Spec:
    """``NAME``, ``NAME.NUMBER``, each with ``=SOURCE``, or ``http://HOST:PORT/NUMBER`` in its parts.

    DiffpoError that names the nearest for an unknown name; so it does for a class of your own, whose module is imported
    for that. Nothing else is loaded, and no server is asked.
    """
    if is_url(spec):
        url, number = split_url(spec)
        return Spec(url, None, number)
    given, _, source = spec.partition("=")
    if ":" in given:
        module, _, rest = given.partition(":")
        attribute, _, number = rest.partition(".")
        found = Spec(f"{module}:{attribute}", source or None, number or None)
        _class(found.name)
        return found
    if given in SCORERS:  # hps2.0
        return Spec(given, source or None)
    name, dot, _ = given.partition(".")
    if given.lower() in ELSEWHERE:
        raise DiffpoError(f"unknown scorer {given!r}: {ELSEWHERE[given.lower()]}")
    if name not in SCORERS:
        raise DiffpoError(f"unknown scorer {name!r}: {hint(name, SCORERS)}")
    return Spec(name, source or None, given if dot else None)


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def is_outside(spec: str) -> bool:
    """Whether ``spec`` names a class of the user's, ``package.module:Class``."""
    return bool(OUTSIDE.fullmatch(spec.partition("=")[0]))


def split_url(spec: str) -> tuple[str, str | None]:
    """``http://HOST:PORT`` or ``http://HOST:PORT/NUMBER`` -> the server's URL and the number; DiffpoError otherwise.
    The server is not asked."""
    found = URL.fullmatch(spec)
    if not found or not 0 < int(found[2] or 80) < 2**16:
        raise DiffpoError(f"{spec!r} is not the URL of a scorer: write http://HOST:PORT or http://HOST:PORT/NUMBER")
    return found[1], found[3] or None


def default_device(spec: str) -> str:
    """Where the scorer runs if no device is given: on a GPU where there is one."""
    if is_url(spec) or spec.partition("=")[0] in ("shapes", "judge", "votes"):
        return "cpu"  # spares the import
    return devices.best()


def load(spec: str, device: str = "cpu") -> Scorer:
    """The scorer that ``spec`` names, see `parse`. Behind "=" stands a local file or folder or another hub id with its
    weights. Of a URL and of a class of your own a number may be named, and is given alone."""
    name, source, number = parse(spec)
    if is_url(name):
        from .client import HttpScorer

        return HttpScorer(name, number)
    if name not in SCORERS:
        from .outside import Outside

        return Outside(name, _class(name), source, device, number)
    if number is not None:
        raise DiffpoError(f"{spec} is one number of the scorer {name}, which computes all at once: write {name}")
    limit_waiting()
    module, _, attribute = SCORERS[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute).load(source, device)


def _class(name: str) -> type:
    return load_attribute(name, "scorer", "a class, see diffpo.scorers.Scorer", callable)
