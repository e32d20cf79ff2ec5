"""A plan as one safetensors file: float64 arrays, with the names in the header. Reading runs no code."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ._files import write_whole
from ._table import ARRAYS, Table
from .origin import Origin

MOST_BYTES = 64 * 2**20  # of a file
MOST_CHARACTERS = 10_000  # of its header


def write(plan: Table, path) -> None:
    """Write `plan` to `path`; a file that is there is replaced once the new one is complete."""
    arrays = {name: np.ascontiguousarray(getattr(plan, name)) for name in ARRAYS}
    content = save(arrays, metadata={"samplers_plan": header_of(plan)})
    if len(content) > MOST_BYTES:
        raise ValueError(f"plan {plan.name!r} takes {len(content)} bytes; at most {MOST_BYTES} can be saved")
    write_whole(path, content)


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


def read(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The header, with name, prediction and origin, and the arrays of a saved plan.

    Raises:
        ValueError: the file is missing or is something else.
    """
    try:
        status = os.stat(path)  # before it is opened: a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"not a sampling plan (a file of {status.st_size} bytes)")
        with safe_open(path, framework="numpy") as f:
            about = read_header((f.metadata() or {}).get("samplers_plan"))
            kinds = {name: f.get_slice(name).get_dtype() for name in f.keys()}
            for name in set(kinds) ^ set(ARRAYS):
                raise ValueError(f"a plan has {'no' if name in kinds else 'an'} array {name[:100]!r}")
            for name, kind in kinds.items():
                if kind != "F64":
                    raise ValueError(f"{name} is {kind}, but a plan's numbers are float64")
            return about, {name: f.get_tensor(name) for name in ARRAYS}
    except OSError as error:
        raise ValueError(error.strerror or "not a sampling plan") from None
    except SafetensorError:
        raise ValueError("not a sampling plan (no safetensors file)") from None


def read_header(text: str | None) -> dict:
    """The inverse of `header_of`: name, prediction and origin. `Plan` checks the first two."""
    if text is None:
        raise ValueError("not a sampling plan (no 'samplers_plan' in its header)")
    try:
        about = json.loads(text) if len(text) < MOST_CHARACTERS else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise ValueError("not a sampling plan (its header has no version)")
    version = about["version"]
    if version not in (1, 2):
        raise ValueError(f"a plan of version {version}; this release reads versions 1 and 2")
    if set(about) != {"version", "name", "prediction", *(["origin"] if version == 2 else [])}:
        names = "version, name, prediction and origin" if version == 2 else "version, name and prediction"
        raise ValueError(f"the header of a plan of version {version} must have {names}, nothing else")
    return {**about, "origin": Origin.of(about["origin"]) if version == 2 else None}
