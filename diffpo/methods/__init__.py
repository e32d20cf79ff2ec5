"""Objectives: one file per published method, holding its preset, its paper and its numbers.

A preset is data: settings of the section `objective:` that the user's own are laid over. Nothing here imports torch, so
that `diffpo check` can refuse a composition that makes no sense before anything is loaded.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.names import hint


@dataclass(frozen=True)
class Preset:
    """A published method.

    Attributes:
        title, paper: of the publication, and where it is ("Wallace et al. 2023, arXiv 2311.12908").
        settings: what differs from the defaults of the config's section `objective`, nested as there.
        equation: the loss, in this project's notation (docs/papers.md).
        published: hyper-parameters by model ("SDXL"), as one line each, in the paper's own units.
        results: the paper's headline numbers, one line; where they are from if not from the paper.
        notes: how the paper's beta converts, where its code departs from its text, what is left out here.
    """

    title: str
    paper: str
    settings: Mapping[str, Any]
    equation: str
    published: Mapping[str, str] = field(default_factory=dict)
    results: str = ""
    notes: str = ""


def names() -> list[str]:
    """The methods there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Preset:
    """The preset in diffpo/methods/``name``.py; ValueError with the nearest name if there is none."""
    if name not in names():
        raise ValueError(f"unknown objective {name!r}: {hint(name, names())}")
    return importlib.import_module(f"{__name__}.{name}").PRESET


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, section by section."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result
