"""Where `objective.name` leads: a method of diffpo/methods, a YAML file, or a `Preset` in a module of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import methods
from ..common.errors import DiffpoError
from ..common.imports import load_attribute
from ..common.names import hint
from ..common.text import plain, read_text
from .reader import LIMIT, parsed

KEYS = [field.name for field in fields(methods.Preset)]


def find(name: str, check: Callable[[dict[str, Any]], list[str]]) -> methods.Preset:
    """The preset that ``name`` names: a method, `FILE.yaml` (from the working directory) or `package.module:attribute`.

    ``check``: what is wrong with the settings of a preset, a line each. DiffpoError that names the file and the key:
    no such method, file or attribute; a file that is no YAML, has other keys than `methods.Preset` or settings that
    are none of `objective:`.
    """
    if methods.is_file(name):
        preset = _read(name)
    elif ":" in name:
        kind = "a diffpo.methods.Preset"
        preset = load_attribute(name, "objective", kind, lambda value: isinstance(value, methods.Preset))
    else:
        return methods.load(name)
    if faults := check(dict(preset.settings)):
        raise DiffpoError("; ".join(f"the preset {plain(name, 200)}: settings: {fault}" for fault in faults))
    return preset


def _read(name: str) -> methods.Preset:
    path = plain(name, 200)
    try:
        found = parsed(read_text(Path(name).expanduser(), LIMIT))
    except RuntimeError as error:  # ~ of a user that there is not
        raise DiffpoError(f"cannot read the preset {path}: {plain(error, 200)}") from None
    except OSError as error:
        raise DiffpoError(f"cannot read the preset {path}: {error.strerror}") from None
    except ValueError as error:
        raise DiffpoError(f"the preset {path} is not valid YAML: {plain(error, 300)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise DiffpoError(f"the preset {path} needs the key settings: a section such as {{beta: 5000, link: ipo}}")
    for key, value in found.items():
        if key not in KEYS:
            raise DiffpoError(f"the preset {path} has the unknown key {plain(key, 100)!r}: {hint(str(key), KEYS)}")
        expected = dict if key in ("settings", "published") else str
        if not isinstance(value, expected):
            kind = "a section" if expected is dict else "text"
            raise DiffpoError(f"the preset {path}: {key} must be {kind}, not {plain(repr(value), 100)}")
    return methods.Preset(**found)
