"""The one error of a scorer whose weights are not at hand."""

from __future__ import annotations

from ..common.errors import DiffpoError


def missing(what: str, error: Exception, advice: str) -> DiffpoError:
    """The one error of a scorer whose weights are not at hand."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DiffpoError(f"cannot load {what}: {reason}\n{advice}")
