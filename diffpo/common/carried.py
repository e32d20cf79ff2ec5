"""Recipes and small models that come with diffpo: `configs/` and `assets/` of a clone, or copies in a wheel."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any, TypeVar

PACKAGE = Path(__file__).resolve().parents[1]
COPIES = PACKAGE / "carried"  # only in a wheel: pyproject.toml puts them there
HOME = COPIES if COPIES.is_dir() else PACKAGE.parent
FOLDERS = ("assets", "configs")

P = TypeVar("P", str, Path)


def found(path: P) -> P:
    """``path`` as it is, or that of diffpo's own copy: of a relative path into `FOLDERS` that does not exist here."""
    parts = PurePath(path).parts
    if len(parts) < 2 or parts[0] not in FOLDERS or ".." in parts or Path(path).exists():
        return path
    own = HOME.joinpath(*parts)
    return type(path)(own) if own.exists() else path


def resolved(settings: Any) -> Any:
    """``settings`` (of lists and sections) with every path as `found` gives it."""
    if isinstance(settings, dict):
        return {name: resolved(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [resolved(value) for value in settings]
    return found(settings) if isinstance(settings, str) and len(settings) < 300 and "\0" not in settings else settings
