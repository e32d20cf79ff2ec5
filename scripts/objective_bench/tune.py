"""Tuning in the open: settings are tried on a seed of their own, and are written down."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import job, store
from .job import Setting
from .methods import Method
from .recipes import KNOBS

SEED = store.TUNING


def task(recipe: Method, settings: Sequence[str], setting: Setting) -> tuple[Method, int, Setting, Method]:
    """The job that tries ``settings`` in place of those that were chosen for ``recipe``."""
    tried = replace(recipe, name=f"{recipe.name}-{store.digest(list(settings))[:8]}")
    tried = replace(tried, overrides=(*recipe.overrides[: recipe.common], *settings))
    return tried, SEED, setting, recipe


def grid(recipe: Method, setting: Setting) -> list[tuple[Method, int, Setting, Method]]:
    """A job for each setting of the recipe's grid: learning rate x beta x the method's own knob."""
    return [task(recipe, settings, setting) for settings in itertools.product(*KNOBS[recipe.preset])]


def attempt(tried: Method, setting: Setting, recipe: Method) -> dict[str, Any]:
    """Run a job of `task` and add its line to tried.jsonl, unless it is there."""
    content = store.key(tried, SEED, setting)
    for line in store.tried():
        if line["key"] == content:
            return line
    line = store.line_of(recipe, tried, job.measure(tried, SEED, setting))
    store.add(line)
    return line
