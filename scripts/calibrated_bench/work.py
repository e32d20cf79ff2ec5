"""How many model calls are left, so that one knows before what a run costs."""

from __future__ import annotations

from .cells import SCAN, SHORTLIST, Cell
from .methods import Candidate, uncalibrated
from .references import References


def remaining(cells: list[Cell], references: References, fits: bool, families: list[str] | None) -> str:
    """A sentence with the calls times samples of references and of the uncalibrated methods that are not cached.

    The second is an upper bound: which settings go on from the scan is not known before. Fits are not in it, since
    every method spends as it likes.
    """
    sizes = cells[0].sizes
    splits = {"select": sizes.select, "heldout": sizes.heldout, "fit": sizes.fit if fits else 0}
    long = sum(
        n * references.calls(split) for split, count in splits.items() for _, n in references.missing(split, count)
    )
    short = sum(_uncalibrated(cell, families) for cell in cells)
    text = f"{long} calls x samples for references, at most {short} to measure uncalibrated methods"
    return f"{text}, and what the fits take" if fits else text


def _uncalibrated(cell: Cell, families: list[str] | None) -> int:
    groups: dict[str, list[Candidate]] = {}
    for candidate in uncalibrated(cell.world, cell.calls, families):
        groups.setdefault(candidate.family, []).append(candidate)
    samples, known = 0, cell.summary.get("uncalibrated", {})
    for family, candidates in groups.items():
        chosen = [c for c in candidates if c.key == known.get(family, {}).get("key")]
        if chosen:
            samples += max(0, cell.sizes.heldout - cell.cached(chosen[0], "heldout"))
            continue
        scanned = min(SCAN, cell.sizes.select) if len(candidates) > SHORTLIST else 0
        samples += sum(max(0, scanned - cell.cached(candidate, "select")) for candidate in candidates)
        if cell.sizes.rivals is None:
            samples += min(SHORTLIST, len(candidates)) * (cell.sizes.select - scanned) + cell.sizes.heldout
    if cell.sizes.rivals is not None:
        kept = 2 * cell.sizes.rivals * SHORTLIST * cell.sizes.select
        samples += kept + (cell.sizes.rivals + 1) * cell.sizes.heldout
    return samples * cell.calls
