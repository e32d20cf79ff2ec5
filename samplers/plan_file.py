"""A plan as one safetensors file: float64 arrays, with the names in the header."""

from __future__ import annotations

import json

import numpy as np

from . import _arrays
from ._arrays import MOST_CHARACTERS
from ._table import ARRAYS, Table
from .origin import Origin

LAYOUT = _arrays.Layout("sampling plan", "samplers_plan", dict.fromkeys(ARRAYS, "F64"), most_bytes=64 * 2**20)


def write(plan: Table, path) -> None:
    """Write `plan` to `path`; a file that is there is replaced once the new one is complete."""
    _arrays.write(path, LAYOUT, {name: getattr(plan, name) for name in ARRAYS}, header_of(plan))


def header_of(plan: Table) -> str:
    """All of a plan but its arrays, as JSON. Plans without an origin are of version 1, which older releases read."""
    about: dict = {"version": 1, "name": plan.name, "prediction": plan.prediction}
    if plan.origin is not None:
        about |= {"version": 2, "origin": plan.origin.plain()}
    text = json.dumps(about)
    if len(text) >= MOST_CHARACTERS:
        raise ValueError(
            f"plan {plan.name!r}: its name and origin take {len(text)} characters; below {MOST_CHARACTERS} can be saved"
        )
    return text


def read(path) -> tuple[dict, dict[str, np.ndarray]]:
    """The header, with name, prediction and origin, and the arrays of a saved plan.

    Raises:
        ValueError: the file is missing or is something else. The message does not name it.
    """
    about, arrays = _arrays.read(path, LAYOUT)
    return checked(about), arrays


def read_header(text: str | None) -> dict:
    """The inverse of `header_of`: name, prediction and origin."""
    return checked(_arrays.parsed(text, LAYOUT))


def checked(about: dict) -> dict:
    """Name, prediction and origin, of a known version. `Plan` checks the first two."""
    version = about["version"]
    if version not in (1, 2):
        raise ValueError(f"a plan of version {version}; this release reads versions 1 and 2")
    if set(about) != {"version", "name", "prediction", *(["origin"] if version == 2 else [])}:
        names = "version, name, prediction and origin" if version == 2 else "version, name and prediction"
        raise ValueError(f"the header of a plan of version {version} must have {names}, nothing else")
    return {**about, "origin": Origin.of(about["origin"]) if version == 2 else None}
