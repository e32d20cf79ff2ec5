"""Who prefers what: scorers on pictures, Pareto dominance over several of them, and labels given by people."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import scorers
from ..common.errors import DiffpoError
from ..common.names import hint

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

KEY = "objective.rollout.scorers"


def check_scorer(spec: str) -> tuple[str, str, str]:
    """``shapes.total``, ``pickscore=FOLDER`` or ``http://HOST:PORT/NUMBER`` -> the number's name, the scorer's, and the
    spec that loads it; nothing is loaded and no server asked."""
    if scorers.is_url(spec):
        url, number = scorers.split_url(spec)
        return number or url, url, url
    number, equals, source = spec.partition("=")
    name = number.partition(".")[0]
    scorers.check_name(name)
    return number, name, name + equals + source


class Judge:
    """Numbers for pictures, one column for each of ``specs``; higher is better.

    Attributes: names, of the columns.
    """

    def __init__(self, specs: Sequence[str], device: Any = "cpu") -> None:
        self._loaded: dict[str, Any] = {}
        self._columns: list[tuple[str, str]] = []
        for spec in specs:
            number, name, source = check_scorer(spec)
            if source not in self._loaded:
                self._loaded[source] = scorers.load(source, str(device))
            known = self._loaded[source].names
            if number not in known and number == name and len(known) == 1:
                number = known[0]
            if number not in known:
                if number == name and scorers.is_url(name):
                    several = f"the scorer {name} gives {', '.join(known)}"
                    raise DiffpoError(f"{KEY}: {several}; choose one, as in {name}/{known[0]}")
                raise DiffpoError(f"{KEY}: the scorer {name} gives no number {number!r}: {hint(number, known)}")
            self._columns.append((source, number))
        self.names = [number for _, number in self._columns]

    def scores(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """(n, len(names)) float64. A number that a prompt does not ask for (NaN where the scorer calls that optional)
        is 0 for all its images. DiffpoError for any other NaN and for wrong shapes, naming scorer and prompt."""
        import torch

        found = {source: scorer.score(images, prompts) for source, scorer in self._loaded.items()}
        columns = []
        for source, number in self._columns:
            values = torch.as_tensor(found[source].get(number, ()), dtype=torch.float64)
            if values.shape != (len(images),):
                raise DiffpoError(
                    f"{KEY}: the scorer {number} returned shape {tuple(values.shape)} for {len(images)} images of the "
                    f"prompts {prompts[0]!r}, ...: a scorer returns one number for each image"
                )
            if number in self._loaded[source].optional:
                values = values.nan_to_num(0.0)
            if not values.isfinite().all():
                first = int((~values.isfinite()).nonzero()[0])
                raise DiffpoError(
                    f"{KEY}: the scorer {number} returned {values[first].item()} for an image of the prompt "
                    f"{prompts[first]!r}; leave out the prompt or the scorer"
                )
            columns.append(values)
        return torch.stack(columns, 1)


def better(one: Tensor, other: Tensor) -> int:
    """Pareto dominance of two rows of scores (D3PO): 1 if ``one`` is nowhere worse and somewhere better, -1 if
    ``other`` is, 0 if neither (equal, or each better at something)."""
    above, below = bool((one > other).any()), bool((one < other).any())
    return int(above and not below) - int(below and not above)


def pairs(scores: Tensor) -> list[tuple[int, int]]:
    """(S, K) -> all (winner, loser) of the S images."""
    found = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        if order := better(scores[i], scores[j]):
            found.append((i, j) if order > 0 else (j, i))
    return found


def standardised(scores: Tensor) -> Tensor:
    """(S, K) -> (S,): each number in units of its standard deviation over the S images, from their mean; then the mean
    over the numbers. 0 where all are equal."""
    spread = scores.std(0, correction=0)
    return ((scores - scores.mean(0)) / spread.where(spread > 0, 1)).mean(1)
