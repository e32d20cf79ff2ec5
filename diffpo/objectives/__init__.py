"""Objectives: one file per published method, holding its preset of (source, reference, link), its paper and its
numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..reward import Reference
from ..states import Regression


@dataclass(frozen=True)
class Objective:
    """What a method chooses; everything else is shared."""

    source: Callable[[Any, Any], Regression]  # (family, batch) -> where (x_t, t, target) come from
    reference: Reference
    link: Callable[[Tensor, Tensor, Tensor], Tensor]  # (r_chosen, r_rejected, preference), each (n,) -> loss (n,)
    paper: str


def load(name: str) -> Objective:
    """The preset in diffpo/objectives/``name``.py (the config admits only names that exist)."""
    return importlib.import_module(f"{__name__}.{name}").OBJECTIVE
