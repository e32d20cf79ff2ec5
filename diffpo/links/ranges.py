"""The values that a link's option may have, written beside the option: ``flip: Annotated[float, Range(0, 0.5)]``."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Numbers above ``low``, or from ``low`` on if ``closed``, and below ``high``."""

    low: float
    high: float = inf
    closed: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high or (self.closed and value == self.low)

    def __str__(self) -> str:
        text = f"{'from' if self.closed else 'above'} {self.low:g}"
        return text if self.high == inf else f"{text} and below {self.high:g}"


Positive = Annotated[float, Range(0)]
FromZero = Annotated[float, Range(0, closed=True)]
BelowHalf = Annotated[float, Range(0, 0.5, closed=True)]  # a share of wrong labels
