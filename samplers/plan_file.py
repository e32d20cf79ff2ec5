"""A plan as one safetensors file: float64 arrays, with the names in the header. Reading runs no code."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ._files import write_whole
from ._table import ARRAYS

if TYPE_CHECKING:
    from .plan import Plan

MOST_BYTES = 64 * 2**20  # of a file


def write(plan: Plan, path) -> None:
    """Write `plan` to `path`; a file that is there is replaced once the new one is complete."""
    arrays = {name: np.ascontiguousarray(getattr(plan, name)) for name in ARRAYS}
    header = {"samplers_plan": json.dumps({"version": 1, "name": plan.name, "prediction": plan.prediction})}
    content = save(arrays, metadata=header)
    if len(content) > MOST_BYTES:
        raise ValueError(f"plan {plan.name!r} takes {len(content)} bytes; at most {MOST_BYTES} can be saved")
    write_whole(path, content)


def read(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays of a saved plan.

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
            about = _header((f.metadata() or {}).get("samplers_plan"))
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


def _header(text: str | None) -> dict:
    if text is None:
        raise ValueError("not a sampling plan (no 'samplers_plan' in its header)")
    try:
        about = json.loads(text) if len(text) < 10_000 else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise ValueError("not a sampling plan (its header has no version)")
    if about["version"] != 1:
        raise ValueError(f"a plan of version {about['version']}; this release reads version 1")
    if set(about) != {"version", "name", "prediction"}:
        raise ValueError("a plan's header must have a version, a name and a prediction, nothing else")
    return about
