"""Distances as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...common import tables
from ...common.text import plain

if TYPE_CHECKING:
    from . import Distances

BETTER = {"fid": "lower", "kid": "lower", "cmmd": "lower"}
COLUMNS = ("features", "distance", "value [95 %]", "better", "pictures", "reference")


def rows(found: Sequence[Distances]) -> list[Sequence[object]]:
    """One row of texts for each number, in the order of COLUMNS."""
    return [
        (
            plain(each.features, 60),
            name,
            f"{number.value:.4g} [{number.low:.4g}, {number.high:.4g}]",
            BETTER.get(name, "higher"),
            str(each.pictures),
            "statistics" if each.reference is None else str(each.reference),
        )
        for each in found
        for name, number in each.numbers.items()
    ]


def show(found: Sequence[Distances]) -> None:
    console = tables.console()
    console.print(tables.Table(COLUMNS, rows(found)).terminal(left=(0, 1, 3)))
    for each in found:
        for note in each.notes:
            console.print(f"{plain(each.features, 60)}: {note}")
