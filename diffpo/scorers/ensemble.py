"""A weighted sum of other scorers' numbers, with constants that are stated: sum of weight x (value - mean) / std.

Nothing is standardised by the batch, so a picture's number does not depend on the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from .. import scorers
from ..common.errors import DiffpoError
from ..common.names import hint
from ..common.text import plain
from ..config.reader import read
from .server.protocol import NAME

TERM = re.compile(r"(?P<scorer>[A-Za-z_][\w.:-]*?)(?:\*(?P<weight>-?[0-9.]+(?:e-?[0-9]+)?))?")
SHAPE = "write sum=pickscore*0.02+hps*1, or sum=FILE.yaml with terms (docs/score.md)"


class Term(BaseModel):
    """One number of a scorer: weight x (value - mean) / std."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    scorer: str
    """As for --scorers; of a scorer with several numbers, one of them, e.g. shapes.total."""

    weight: float = 1.0
    mean: float = 0.0
    std: float = Field(1.0, gt=0)


class SumSettings(BaseModel):
    """The settings of a sum, in the file of ``sum=FILE.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: list[Term] = Field(min_length=1)
    """The numbers that are added."""

    name: str = "sum"
    """Name of the sum; two sums that are compared need two names."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("use letters, digits, '.', '_' and '-'")
        return value


class Sum:
    """``parts``: for each term its scorer, and the name of the number."""

    optional: frozenset[str] = frozenset()

    def __init__(self, terms: Sequence[Term], parts: Sequence[tuple[Any, str]], name: str = "sum") -> None:
        self.terms, self.parts, self.names = list(terms), list(parts), (name,)
        self.reads_prompt = any(getattr(scorer, "reads_prompt", True) for scorer, _ in parts)

    @classmethod
    def load(cls, source: str | None, device: str) -> Sum:
        """``source``: ``NAME*WEIGHT+NAME*WEIGHT``, or a YAML file of `SumSettings`."""
        settings = read_terms(source)
        loaded: dict[tuple[str, str | None], Any] = {}
        parts = []
        for term in settings.terms:
            name, where, number = scorers.parse(term.scorer)
            if name == "sum":
                raise DiffpoError("a term of a sum cannot be a sum: write its terms instead")
            if (name, where) not in loaded:
                loaded[name, where] = scorers.load(name if where is None else f"{name}={where}", device)
            scorer = loaded[name, where]
            parts.append((scorer, _number(term.scorer, scorer, number)))
        return cls(settings.terms, parts, settings.name)

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        found: dict[int, dict[str, np.ndarray]] = {}
        total = np.zeros(len(images))
        for term, (scorer, number) in zip(self.terms, self.parts, strict=True):
            if id(scorer) not in found:
                found[id(scorer)] = scorer.score(images, prompts)
            total += term.weight * (np.asarray(found[id(scorer)][number]) - term.mean) / term.std
        return {self.names[0]: total}

    @property
    def rate(self) -> Any:
        """`score` of (n, 3, H, W) in [0, 1], with gradients; None if a part has none."""
        return self._rate if all(callable(getattr(scorer, "rate", None)) for scorer, _ in self.parts) else None

    def _rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        found: dict[int, dict[str, torch.Tensor]] = {}
        total = pixels.new_zeros(len(pixels))
        for term, (scorer, number) in zip(self.terms, self.parts, strict=True):
            if id(scorer) not in found:
                found[id(scorer)] = scorer.rate(pixels, prompts)
            total = total + term.weight * (found[id(scorer)][number] - term.mean) / term.std
        return {self.names[0]: total}


def read_terms(source: str | None) -> SumSettings:
    """The terms that ``source`` states. DiffpoError if it is neither a file nor a sum."""
    if source is None:
        raise DiffpoError(f"the scorer sum needs its terms: {SHAPE}")
    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise DiffpoError(f"there is no file {plain(source, 300)} with the terms of a sum: {SHAPE}")
        return read(source, [], SumSettings)
    terms = []
    for text in source.split("+"):
        found = TERM.fullmatch(text.strip())
        try:
            terms.append(Term(scorer=found["scorer"], weight=float(found["weight"] or 1)))  # type: ignore[index]
        except (TypeError, ValueError):
            raise DiffpoError(f"{plain(text, 100)!r} is not a term of a sum: {SHAPE}") from None
    return SumSettings(terms=terms)


def _number(spec: str, scorer: Any, number: str | None) -> str:
    """The one of the scorer's numbers that a term means."""
    if number is None and len(scorer.names) == 1:
        number = scorer.names[0]
    if number is None:
        raise DiffpoError(f"a sum adds single numbers, and {spec} gives {', '.join(scorer.names)}: name one of them")
    if number not in scorer.names:
        raise DiffpoError(f"the scorer {spec} gives no number {number!r}: {hint(number, scorer.names)}")
    if number in scorer.optional:
        raise DiffpoError(f"{number} is missing for some prompts, so it cannot be a term of a sum")
    return number
