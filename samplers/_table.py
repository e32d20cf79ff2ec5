"""A row of a plan as arithmetic: the columns, and one linear combination of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from .origin import Origin

ANCHOR, NOISE, ONE, HISTORY = 0, 1, 2, 3  # columns of a row; the newest m is at HISTORY
ARRAYS = ("t", "alpha", "sigma", "label", "rows", "reads", "start")  # of a plan

Terms = list[tuple[int, "float | torch.Tensor"]]  # (column, coefficient), zeros left out


class Loop(NamedTuple):
    """A plan as the executor uses it: Python numbers, without zeros."""

    rows: list[list[Terms]]  # per call: next input, next anchor
    reads: list[Terms]
    start: list[Terms]
    same: list[bool]  # the next anchor is the next input, so one combination is enough
    direct: list[bool]  # m is the network's output itself
    noisy: list[bool]
    noisy_start: bool
    labels: list[float]
    levels: list[float]  # sigma / alpha, inf where alpha is 0


@dataclass(frozen=True, eq=False)
class Table:
    """What a `Plan` holds, and what the functions beside it read; see there for the shapes."""

    name: str
    prediction: str  # what the network returns (prediction.py); see `for_prediction`
    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    label: np.ndarray
    rows: np.ndarray
    reads: np.ndarray
    start: np.ndarray = field(default_factory=lambda: np.array([[1.0, 0.0], [1.0, 0.0]]))
    origin: Origin | None = field(default=None, kw_only=True)  # of a plan that was fitted to a model
    _loop: Loop = field(init=False, repr=False)


class State(NamedTuple):
    """All that changes during a run, so that any number of runs can share one plan. float32 or wider."""

    input: torch.Tensor  # the model's next input; after the last call, the result
    anchor: torch.Tensor
    history: tuple[torch.Tensor, ...]  # m_k, newest first


def terms(coefficients: np.ndarray) -> Terms:
    """The non-zero terms of a row: (column, Python float), or (column, tensor) where it broadcasts over the sample."""
    if coefficients.ndim == 1:
        return [(j, c) for j, c in enumerate(coefficients.tolist()) if c]
    return [(j, torch.tensor(c)) for j, c in enumerate(coefficients) if c.any()]


def combine(row: Terms, values: Sequence[torch.Tensor | None], where: str) -> torch.Tensor:
    """The linear combination `row` of `values`; values[ONE], the constant 1, is passed as None.

    One new tensor, then additions in place: most of a step's time is memory traffic.
    """
    total = None
    for column, c in row:
        if isinstance(c, torch.Tensor):
            c = c.to(values[ANCHOR])  # does nothing after `Plan.to`
        if column >= len(values):
            raise ValueError(f"{where} uses more outputs than the state holds: call `begin`, then every step in order")
        value = values[column]
        if value is None and column == NOISE:
            raise ValueError(f"{where} of this plan adds noise: pass noise=")
        if total is None:  # the constant comes after anchor and noise, so it is first only in a row without either
            total = _zeros(values).add_(c) if value is None else value * c
        elif value is None:
            total = total.add_(c)
        elif isinstance(c, torch.Tensor):
            total = total.addcmul_(value, c)
        else:
            total = total.add_(value, alpha=c)
    return _zeros(values) if total is None else total


def _zeros(values: Sequence[torch.Tensor | None]) -> torch.Tensor:
    like = values[ANCHOR]
    if like is None:
        raise ValueError("a row needs the anchor")
    return torch.zeros_like(like)
