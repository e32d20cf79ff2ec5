"""The error for an unknown name."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for an unknown `name`, with the nearest of the `known` ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name).replace("+", "p"), known, n=1, cutoff=0.3)  # 'dpm++' means 'dpmpp'
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {what} {name!r}: {hint}choose from {', '.join(known)}")
