"""The tables of the report: the arms by each score, the win matrix, and how the pictures were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from . import charts, statistics
from .table import AXES, section

if TYPE_CHECKING:
    from .compare import Comparison, Evaluation
    from .statistics import Estimate

UNKNOWN = "not known"  # of a folder without a manifest
_OF_A_PICTURE = ("arm", "index", "seed", "prompt", "file", "sha256")


def scores(evaluation: Evaluation, strengths: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    """For every score that is compared: its table, the win matrix and the histograms."""
    return [
        {
            "name": name,
            "axis": AXES.get(name.partition(".")[2]),
            "scorer": section(name)[0],
            "part": section(name)[1] == "parts" and "." in name and name != evaluation.primary,
            "primary": name == evaluation.primary,
            "trained": next(row.training_signal for row in evaluation.rows if row.scorer == name),
            "rows": _rows(evaluation, name, strengths.get(name, {})),
            "strengths": bool(strengths.get(name)),
            "matrix": _matrix(evaluation, name),
            "histograms": Markup(charts.histograms(name, evaluation.scores[name])),  # noqa: S704, escaped there
        }
        for name in dict.fromkeys(row.scorer for row in evaluation.rows)
    ]


def _rows(evaluation: Evaluation, name: str, strengths: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """The first arm, which has a mean alone, and the others with their differences and win rates."""
    first, by_arm = evaluation.arms[0], evaluation.scores[name]
    own = by_arm[first][~np.isnan(by_arm[first])]
    compared = [row for row in evaluation.rows if row.scorer == name]
    reach = max(max(abs(row.difference.low), abs(row.difference.high)) for row in compared)
    rows: list[dict[str, Any]] = [{"arm": first, "mean": f"{own.mean():.4f}", "n": len(own)}]
    rows += [_row(row, reach) for row in compared]
    for row in rows:
        row["strength"] = _signed(strengths[row["arm"]]) if row["arm"] in strengths else None
    return rows


def _row(row: Comparison, reach: float) -> dict[str, Any]:
    d, w = row.difference, row.win_rate
    return {
        "arm": row.arm,
        "mean": f"{row.tuned:.4f}",
        "n": row.n,
        "difference": _signed(d),
        "difference_bar": Markup(charts.difference_bar(d.value, d.low, d.high, reach)),  # noqa: S704, numbers only
        "rate": (f"{w.value:.1%}", f"[{w.low:.1%}, {w.high:.1%}]"),
        "rate_bar": Markup(charts.interval_bar(w.value, w.low, w.high)),  # noqa: S704, numbers only
    }


def _signed(each: Estimate) -> tuple[str, str]:
    return f"{each.value:+.4f}", f"[{each.low:+.4f}, {each.high:+.4f}]"


def _matrix(evaluation: Evaluation, name: str) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """How often the row's arm beats the column's, ties half, with the interval; None for itself, or without pairs."""
    by_arm, index = evaluation.scores[name], np.array([item.index for item in evaluation.items])
    table = []
    for one in (arm for arm in evaluation.arms if arm in by_arm):
        cells: list[dict[str, Any] | None] = []
        for other in (arm for arm in evaluation.arms if arm in by_arm):
            both = ~(np.isnan(by_arm[one]) | np.isnan(by_arm[other]))
            if one == other or not both.any():
                cells.append(None)
                continue
            rate = statistics.win_rate(by_arm[other][both], by_arm[one][both], index[both])
            interval = f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
            cells.append(
                {
                    "text": f"{rate.value:.0%}",
                    "colour": _shade(rate.value),
                    "sure": rate.low > 0.5 or rate.high < 0.5,
                    "about": f"{one} beats {other} in {interval} of {both.sum()} pairs",
                }
            )
        table.append((one, cells))
    return table


def _shade(rate: float) -> str:
    """From orange at 0 over white at 1/2 to blue at 1, always light enough for dark text."""
    end = (0x56, 0xB4, 0xE9) if rate > 0.5 else (0xF5, 0x9B, 0x4A)
    share = min(1.0, abs(rate - 0.5) * 2) * 0.85
    return "#" + "".join(f"{round(255 + (channel - 255) * share):02x}" for channel in end)


def settings(manifest: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """How the pictures were made, from the last row of every arm: the arms, and by setting one value for all of them,
    or one for each where they differ."""
    last = {row["arm"]: row for row in manifest}
    seeds = {arm: sorted({row["seed"] for row in manifest if row["arm"] == arm and "seed" in row}) for arm in last}
    found: list[tuple[str, list[Any]]] = []
    for key in dict.fromkeys(key for row in last.values() for key in row if key not in _OF_A_PICTURE):
        values = [_said(key, row.get(key), row) for row in last.values()]
        found.append((key, values[:1] if all(value == values[0] for value in values) else values))
    if last:
        texts = [", ".join(map(str, each)) or UNKNOWN for each in seeds.values()]
        found.append(("seeds", texts[:1] if len({*texts}) == 1 else texts))
    return list(last), found


def _said(key: str, value: Any, row: Mapping[str, Any]) -> Any:
    if key == "folder" and value is None:
        return "made for this comparison"
    if key != "folder" and row.keys() <= {"arm", "folder"}:
        return UNKNOWN
    if key == "solver" and value is None:
        return "that of the plan" if row.get("plan") else "the default for this number of calls and guidance"
    return value
