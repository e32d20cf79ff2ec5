"""Names of test cases that are equal in every process, as pytest-xdist requires."""

import re


def named(value) -> str:
    """``str(value)`` without addresses; functions and classes by their names."""
    return getattr(value, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", str(value))
