"""Objectives: one file per published method, holding its preset, its paper and its numbers.

A preset is data: settings of the section `objective:` that the user's own are laid over. Nothing here imports torch, so
that `diffpo check` can refuse a composition that makes no sense before anything is loaded. A preset of your own is a
YAML file or a `Preset` in a module (config/presets.py).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ..common.errors import DiffpoError
from ..common.names import hint

LABEL = re.compile(r"[A-Za-z0-9_.-]{1,100}(?:\.ya?ml|:[A-Za-z0-9_-]{1,100})")  # of a method from outside


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A method. Of a method of your own, ``settings`` are enough.

    Attributes:
        title, paper: of the publication, and where it is ("Wallace et al. 2023, arXiv 2311.12908").
        settings: what differs from the defaults of the config's section `objective`, nested as there.
        equation: the loss, in this project's notation (docs/papers.md).
        published: hyper-parameters by model ("SDXL"), as one line each, in the paper's own units.
        results: the paper's main numbers, one line; where they are from if not from the paper.
        notes: how the paper's beta converts, where its code departs from its text, what is left out here.
    """

    title: str = ""
    paper: str = ""
    settings: Mapping[str, Any]
    equation: str = ""
    published: Mapping[str, str] = field(default_factory=dict)
    results: str = ""
    notes: str = ""


def names() -> list[str]:
    """The methods there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Preset:
    """The preset in diffpo/methods/``name``.py; DiffpoError with the nearest name if there is none."""
    if name not in names():
        raise DiffpoError(f"unknown objective {name!r}: {hint(name, names())}")
    return importlib.import_module(f"{__name__}.{name}").PRESET


def is_file(name: str) -> bool:
    """Whether the method ``name`` is a YAML file."""
    return name.endswith((".yaml", ".yml"))


def is_outside(name: str) -> bool:
    """Whether the method ``name`` is not one of this package: a YAML file or `package.module:attribute`."""
    return is_file(name) or ":" in name


def label(name: str) -> str:
    """How files that others may see (LoRA headers, model cards) call the method ``name``.

    A method of this package has its name. Another has the name of its YAML file, without the folder, or its
    `module:attribute`, with "-" for all but letters, digits and `_.-:`.
    """
    if name in names():
        return name
    text = re.sub("[^A-Za-z0-9_.:-]", "-", PurePath(name).name if is_file(name) else name)
    return text if is_label(text) else "other"


def is_label(text: str) -> bool:
    """Whether `label` may have made ``text``. It is shown, and never loaded."""
    return text in names() or bool(LABEL.fullmatch(text))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, section by section."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result
