"""Which picture is preferred: the numbers of scorers, and Pareto dominance over several of them."""

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

    from ..config import AdvantageSettings

KEY = "objective.rollout.scorers"


class Judge:
    """Numbers for pictures, one column for each of ``specs``; higher is better.

    Attributes: names, of the columns.
    """

    def __init__(self, specs: Sequence[str], device: Any = "cpu") -> None:
        self._loaded: dict[tuple, Any] = {}  # by name and source
        self._columns: list[tuple[tuple, str]] = []
        for spec in specs:
            name, source, number = scorers.parse(spec)
            key = (name, source)
            if key not in self._loaded:
                self._loaded[key] = scorers.load(name if source is None else f"{name}={source}", str(device))
            self._columns.append((key, _number(name, number, self._loaded[key].names)))
        self.names = [number for _, number in self._columns]

    def scores(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """(n, len(names)) float64. A number that a prompt does not ask for (NaN where the scorer calls that optional)
        is 0 for all its images. DiffpoError for any other NaN and for wrong shapes, naming scorer and prompt."""
        import torch

        found = {key: scorer.score(images, prompts) for key, scorer in self._loaded.items()}
        columns = []
        for key, number in self._columns:
            values = torch.as_tensor(found[key].get(number, ()), dtype=torch.float64)
            if values.shape != (len(images),):
                raise DiffpoError(
                    f"{KEY}: the scorer {_named(key, number)} returned shape {tuple(values.shape)} for {len(images)} "
                    f"images, the first of the prompt {prompts[0]!r}: a scorer returns one number for each image"
                )
            if number in self._loaded[key].optional:
                values = values.nan_to_num(0.0)
            if not values.isfinite().all():
                first = int((~values.isfinite()).nonzero()[0])
                raise DiffpoError(
                    f"{KEY}: the scorer {_named(key, number)} returned {values[first].item()} for an image of the "
                    f"prompt {prompts[first]!r}; leave out the prompt or the scorer"
                )
            columns.append(values)
        return torch.stack(columns, 1)

    def require_gradients(self) -> None:
        """DiffpoError that names the first scorer without `rate`, and those that have one."""
        for key, number in self._columns:
            if not callable(getattr(self._loaded[key], "rate", None)):
                raise DiffpoError(
                    f"{KEY}: {_named(key, number)} has no gradient, which source reward needs. These have one: "
                    f"{', '.join(scorers.DIFFERENTIABLE)}, a folder of `diffpo train-scorer`, and a class of your own "
                    f"with rate(pixels, prompts)"
                )

    def rate(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """(n, len(names)) with gradients by ``pixels`` (n, 3, H, W) in [0, 1], after `require_gradients`. DiffpoError
        for NaN and wrong shapes, naming scorer and prompt."""
        import torch

        found = {key: scorer.rate(pixels, prompts) for key, scorer in self._loaded.items()}
        columns = []
        for key, number in self._columns:
            values = found[key].get(number)
            if getattr(values, "shape", None) != (len(pixels),):
                raise DiffpoError(
                    f"{KEY}: rate of the scorer {_named(key, number)} returned {type(values).__name__} of shape "
                    f"{tuple(getattr(values, 'shape', ()))} for {len(pixels)} images: it returns one number for each"
                )
            if not values.isfinite().all():
                first = int((~values.isfinite()).nonzero()[0])
                raise DiffpoError(
                    f"{KEY}: rate of the scorer {_named(key, number)} returned {values[first].item()} for an image of "
                    f"the prompt {prompts[first]!r}; leave out the prompt or the scorer"
                )
            columns.append(values)
        return torch.stack(columns, 1)


def _number(name: str, number: str | None, known: Sequence[str]) -> str:
    """The one of the scorer's numbers that is meant; DiffpoError if there are several, or none of that name."""
    if number is None and len(known) == 1:
        return known[0]
    if number is None:
        join = "/" if scorers.is_url(name) else "."
        example = f"{name}{join}{known[0]}" if join == "/" or scorers.is_outside(name) else known[0]
        raise DiffpoError(f"{KEY}: the scorer {name} gives {', '.join(known)}; choose one, as in {example}")
    if number not in known:
        raise DiffpoError(f"{KEY}: the scorer {name} gives no number {number!r}: {hint(number, known)}")
    return number


def _named(key: tuple, number: str) -> str:
    """The name of a number in errors: with its class if that is from outside."""
    return f"{key[0]} ({number})" if scorers.is_outside(key[0]) else number


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


def advantages(scores: Sequence[Tensor], settings: AdvantageSettings) -> list[Tensor]:
    """(S, K) of each prompt of a round -> (S,) each: (score - mean) / spread, cut at the limit; of several numbers the
    mean. Where the spread is 0 they are 0."""
    import torch

    if not scores:
        return []
    whole, found = torch.cat(list(scores)), []
    for own in scores:
        mean = (own if settings.mean == "prompt" else whole).mean(0)
        spread = torch.ones_like(mean)
        if settings.spread != "none":
            spread = (own if settings.spread == "prompt" else whole).std(0, correction=0)
        each = (own - mean) / spread.where(spread > 0, 1)
        if settings.mean == "prompt":
            each = each * (own != own[0]).any(0)  # a mean of equal numbers may be off by rounding
        found.append(each.mean(1).clamp(-settings.limit, settings.limit))
    return found


def standardised(scores: Tensor) -> Tensor:
    """(S, K) -> (S,): each number in units of its standard deviation over the S images, from their mean; then the mean
    over the numbers. 0 where all are equal."""
    spread = scores.std(0, correction=0)
    return ((scores - scores.mean(0)) / spread.where(spread > 0, 1)).mean(1)
