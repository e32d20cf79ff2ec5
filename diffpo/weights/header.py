"""What a trained file records of how it was made. Anybody may have written it, so only known values are read."""

from __future__ import annotations

import math
import re
from typing import Any

from .. import methods
from ..common.text import plain

HASH = re.compile("[0-9A-Za-z-]{1,200}")
BASE_NORMS = "norms_of_base"  # of a DoRA by ComfyUI's formula, see export/comfyui.py
SAMPLE = 4096  # values of the base's weights, of which diffpo writes up to 512


def known(about: dict[str, Any]) -> dict[str, Any]:
    """The values of ``about`` that diffpo may have written, and nothing else: what has another form is left out.

    ``objective``: a method's name, or what `methods.label` may have made of one from outside; it is shown, and never
    loaded. ``beta``: a finite number. ``step``, ``pairs_per_update``: whole numbers from 0.
    ``data_hash``: letters, digits and "-". ``base``: the parts of `identity.base_identity` that have their form
    (``name``: one line of text). ValueError if ``base`` is no JSON object, because nothing could be compared with it.
    """
    found: dict[str, Any] = {}
    if isinstance(about.get("objective"), str) and methods.is_label(about["objective"]):
        found["objective"] = about["objective"]
    if number(about.get("beta")):
        found["beta"] = about["beta"]
    for key in ("step", "pairs_per_update"):
        if type(about.get(key)) is int and 0 <= about[key] < 10**12:
            found[key] = about[key]
    if _is_hash(about.get("data_hash")):
        found["data_hash"] = about["data_hash"]
    if about.get(BASE_NORMS) is True:
        found[BASE_NORMS] = True
    if "base" in about:
        found["base"] = _base(about["base"])
    return found


def number(value: Any) -> bool:
    """Is it a finite number, and no truth value?"""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _base(base: Any) -> dict[str, Any]:
    if not isinstance(base, dict):
        raise ValueError("its record of the base model is no JSON object")
    found: dict[str, Any] = {key: base[key] for key in ("hash", "structure") if _is_hash(base.get(key))}
    sample = base.get("sample")
    if isinstance(sample, list) and len(sample) <= SAMPLE and all(map(number, sample)):
        found["sample"] = sample
    if isinstance(base.get("name"), str) and (name := plain(base["name"], 200).strip()):
        found["name"] = name
    return found


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(HASH.fullmatch(value))
