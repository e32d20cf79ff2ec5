"""The charts of the report, as inline SVG: Okabe and Ito's colour-blind-safe palette on white."""

from __future__ import annotations

import json
import math
import re
from io import StringIO
from pathlib import Path

import numpy as np

from ..common.text import plain
from ..weights.header import number

BASE, TUNED, WORSE = "#8a8f98", "#0072B2", "#D55E00"
LARGEST = 1e100  # of a number in a chart
# one panel per entry: title and the series in it
CURVES = (
    ("loss", {"loss": TUNED}),
    ("reward margin", {"rewards/margins": TUNED}),
    ("training pairs ranked right", {"rewards/accuracies": TUNED}),
    ("error against the reference", {"error/chosen_delta": TUNED, "error/rejected_delta": WORSE}),
    ("held-out pairs ranked right", {"eval/accuracy": TUNED}),
)


def read_metrics(run_folder: Path | None) -> list[dict[str, float]]:
    """The finite numbers in the lines of RUN/metrics.jsonl that have a step; none without a folder or file. A
    half-written last line is left out."""
    path = Path(run_folder) / "metrics.jsonl" if run_folder else None
    rows = []
    for line in path.read_bytes().decode(errors="replace").split("\n") if path and path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append({key: value for key, value in row.items() if number(value) and abs(value) <= LARGEST})
    return [row for row in rows if 0 <= row.get("step", -1)]


def _figure(panels: int, columns: int):
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    rows = math.ceil(panels / columns)
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.5 * columns, 2.4 * rows), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[panels:]:
        axis.set_visible(False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure) -> str:
    """The bare <svg> element: no doctype and no metadata, whose addresses point outside the file."""
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)


def histograms(name: str, base: np.ndarray, tuned: np.ndarray) -> str:
    """Two panels: the scores of both arms, and the paired differences."""
    scored = ~(np.isnan(base) | np.isnan(tuned))
    base, tuned = base[scored], tuned[scored]
    figure, (left, right) = _figure(2, 2)
    low, high = min(base.min(), tuned.min()), max(base.max(), tuned.max())
    room = max(0.0, 1e-6 * max(abs(low), abs(high), 1e-6) - (high - low)) / 2  # equal scores need bins too
    bins = np.linspace(low - room, high + room, 25)
    left.hist(base, bins, color=BASE, alpha=0.55, label="base")
    left.hist(tuned, bins, histtype="step", color=TUNED, linewidth=1.8, label="tuned")
    left.set(title=plain(name, 60).replace("$", r"\$"), xlabel="score", ylabel="images")
    left.legend(frameon=False)
    difference = tuned - base
    reach = float(np.abs(difference).max()) or 1.0
    bins = np.linspace(-reach, reach, 31)
    right.hist(difference[difference < 0], bins, color=WORSE, label="tuned is worse")
    right.hist(difference[difference > 0], bins, color=TUNED, label="tuned is better")
    right.axvline(difference.mean(), color="black", linewidth=1, linestyle="--", label="mean")
    right.set(title="difference, tuned - base", xlabel="score", ylabel="images")
    right.legend(frameon=False)
    return _svg(figure)


def curves(metrics: list[dict]) -> str:
    """Small panels of what the training log holds; an empty text when it holds none of it."""
    panels = [
        (title, {key: colour for key, colour in series.items() if any(key in row for row in metrics)})
        for title, series in CURVES
    ]
    panels = [(title, series) for title, series in panels if series]
    if not panels:
        return ""
    figure, axes = _figure(len(panels), min(3, len(panels)))
    for axis, (title, series) in zip(axes, panels, strict=False):
        for key, colour in series.items():
            points = [(row["step"], row[key]) for row in metrics if key in row]
            steps, values = np.array(points, float).T
            if len(values) > 40:  # noisy per-step values: their running mean is what can be read
                axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
                width = len(values) // 20
                smooth = np.convolve(values, np.ones(width) / width, "valid")
                axis.plot(steps[width - 1 :], smooth, color=colour, linewidth=1.8, label=key)
            else:
                axis.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=key)
        axis.set(title=title, xlabel="step")
        if len(series) > 1:
            axis.legend(frameon=False)
        if "accura" in " ".join(series):
            axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    return _svg(figure)


def interval_bar(rate: float, low: float, high: float) -> str:
    """A win rate and its interval as a small bar, 0 to 100 % with a line at 50 %."""
    colour = TUNED if low > 0.5 else WORSE if high < 0.5 else "#555"
    return (
        '<svg width="120" height="14" viewBox="0 0 120 14" role="img" aria-label="win rate">'
        '<rect x="0" y="6" width="120" height="2" fill="#e6e6e6"/>'
        '<rect x="59.5" y="0" width="1" height="14" fill="#555"/>'
        f'<rect x="{120 * low:.1f}" y="5" width="{120 * (high - low):.1f}" height="4" fill="{colour}" opacity="0.45"/>'
        f'<circle cx="{120 * rate:.1f}" cy="7" r="3.5" fill="{colour}"/></svg>'
    )
