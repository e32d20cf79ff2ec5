"""The pictures of docs/objectives.md: win rates of all methods, and of those that were run on several kinds of data."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffpo.common.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Win = tuple[float, float, float]  # mean of the seeds, lowest and highest end of their intervals
NAMED = ("diffusion_dpo", "d3po", "spo", "inpo")
BETTER, WORSE, OPEN = "#0072B2", "#D55E00", "#6b7078"  # the interval is above, below or across 50 %
KINDS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito
INK, GRID = "#22262b", "#d9dce0"


@dataclass(frozen=True)
class Line:
    """A method's win rates by score; ``current``: measured with this version."""

    name: str
    wins: Mapping[str, Win]
    current: bool = True


def methods(lines: Sequence[Line], path: Path) -> None:
    """A row for each method, the best in `total` first; a panel for each score, with the interval of each method."""
    from matplotlib.figure import Figure

    scores = list(lines[0].wins)
    figure = Figure(figsize=(9.5, 0.9 + 0.185 * len(lines)), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True)
    ordered = sorted(lines, key=lambda line: -line.wins["total"][0])
    for panel, score in zip(panels, scores, strict=True):
        for y, line in enumerate(ordered):
            mean, low, high = line.wins[score]
            colour = BETTER if low > 0.5 else WORSE if high < 0.5 else OPEN
            panel.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", alpha=0.55)
            panel.plot(100 * mean, y, "o", color=colour, markersize=5, markerfacecolor=colour if line.current else "w")
        panel.set_title(score, fontsize=11, color=INK)
        _plain(panel)
    panels[0].set_yticks(range(len(ordered)), [line.name for line in ordered], fontsize=8.5)
    panels[0].set_ylim(len(ordered) - 0.4, -0.6)
    for label in panels[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in NAMED else "normal")
    figure.supxlabel("win rate over the base model, per cent: mean of the seeds, and their intervals", fontsize=9.5)
    _write(figure, path)


def kinds(rows: Mapping[str, Mapping[str, Win]], path: Path) -> None:
    """``rows``: of each method, the win rate in `total` by the kind of data; a group of bars for each method."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for wins in rows.values() for name in wins))
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(rows)), layout="constrained")
    panel = figure.subplots()
    for place, (name, colour) in enumerate(zip(names, KINDS, strict=False)):
        shift = 0.24 * (place - (len(names) - 1) / 2)
        panel.plot([], [], "o", color=colour, markersize=6, label=name)  # for the legend
        for y, wins in enumerate(rows.values()):
            if name in wins:
                mean, low, high = (100 * value for value in wins[name])
                panel.plot([low, high], [y + shift] * 2, color=colour, linewidth=2, solid_capstyle="butt", alpha=0.5)
                panel.plot(mean, y + shift, "o", color=colour, markersize=6)
    for y in range(1, len(rows)):
        panel.axhline(y - 0.5, color=GRID, linewidth=0.6)
    _plain(panel)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=9.5)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlabel("win rate in total over the base model, per cent", fontsize=9.5)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=9.5)
    _write(figure, path)


def _plain(panel: Axes) -> None:
    panel.axvline(50, color=INK, linewidth=0.9)
    panel.set_xlim(0, 100)
    panel.set_xticks((25, 50, 75))
    panel.grid(axis="x", color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=8.5, colors=INK)
    for side in panel.spines.values():
        side.set_visible(False)


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
