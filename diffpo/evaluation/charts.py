"""The charts of the report, as inline SVG: Okabe and Ito's colour-blind-safe palette on white."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from ..common.text import plain
from ..weights.header import number

BASE, TUNED, WORSE, QUIET = "#6b7078", "#0072B2", "#D55E00", "#555"
PALETTE = (TUNED, WORSE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("", "6 3", "2 2", "8 3 2 3")  # colour is never the only difference
LARGEST = 1e100  # of a number in a chart
WIDTH = 340  # of a panel, in its own units
# one panel per entry: title and the series in it
CURVES = (
    ("loss", {"loss": TUNED}),
    ("reward margin", {"rewards/margins": TUNED}),
    ("training pairs ranked right", {"rewards/accuracies": TUNED}),
    ("error against the reference", {"error/chosen_delta": TUNED, "error/rejected_delta": WORSE}),
    ("held-out pairs ranked right", {"eval/accuracy": TUNED}),
)


@dataclass(frozen=True)
class Line:
    """A line of a panel. ``points``: (x, y) or (x, y, low, high), by x."""

    name: str
    points: Sequence[tuple[float, ...]]
    colour: str = TUNED
    dash: str = ""
    markers: bool = True
    faint: bool = False


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


def interval_bar(rate: float, low: float, high: float) -> str:
    """A win rate and its interval as a small bar, 0 to 100 % with a line at 50 %."""
    return _bar("win rate", rate, low, high)


def difference_bar(value: float, low: float, high: float, reach: float) -> str:
    """A difference and its interval as a small bar, from -``reach`` to ``reach`` with a line at 0."""
    reach = reach or 1.0
    value, low, high = (0.5 + 0.5 * min(1.0, max(-1.0, each / reach)) for each in (value, low, high))
    return _bar("difference", value, low, high)


def _bar(label: str, value: float, low: float, high: float) -> str:
    """Of numbers in 0..1, whose middle is no difference."""
    colour = TUNED if low > 0.5 else WORSE if high < 0.5 else QUIET
    return (
        f'<svg class="bar" width="120" height="14" viewBox="-4 0 128 14" role="img" aria-label="{label}">'
        '<rect x="0" y="6" width="120" height="2" fill="#e6e6e6"/>'
        f'<rect x="59.5" y="0" width="1" height="14" fill="{QUIET}"/>'
        f'<rect x="{120 * low:.1f}" y="5" width="{120 * (high - low):.1f}" height="4" fill="{colour}" opacity="0.45"/>'
        f'<circle cx="{120 * value:.1f}" cy="7" r="3.5" fill="{colour}"/></svg>'
    )


def histograms(name: str, by_arm: Mapping[str, np.ndarray]) -> str:
    """Two panels: the scores of every arm, and the differences to the first arm, a strip for each arm.

    ``by_arm``: (n,) each, NaN where there is no score; strips with none at all are left out.
    """
    first, *others = by_arm
    values = {arm: each[~np.isnan(each)] for arm, each in by_arm.items()}
    differences = {arm: by_arm[arm] - by_arm[first] for arm in others}
    differences = {arm: each[~np.isnan(each)] for arm, each in differences.items()}
    reach = max((float(np.abs(each).max()) for each in differences.values() if len(each)), default=0.0) or 1.0
    shown = {arm: each for arm, each in values.items() if len(each)}
    low, high = min(each.min() for each in shown.values()), max(each.max() for each in shown.values())
    panels = [_strips("scores", plain(name, 60), shown, (float(low), float(high)), first)]
    if any(len(each) for each in differences.values()):
        left = {arm: each for arm, each in differences.items() if len(each)}
        panels.append(_strips(f"difference to {first}", plain(name, 60), left, (-reach, reach), None))
    return "".join(panels)


def _strips(
    title: str, score: str, values: Mapping[str, np.ndarray], limits: tuple[float, float], first: str | None
) -> str:
    """A histogram for each arm under the other, with its mean as a line. ``first``: the arm whose outline is drawn in
    all of them; None: the values are differences, and their sign gives the colour."""
    low, high = limits
    room = max(0.0, 1e-6 * max(abs(low), abs(high), 1e-6) - (high - low)) / 2  # equal scores need bins too
    low, high = low - room, high + room
    bins, strip, left = 30, 46, 92
    counts = {arm: np.histogram(each, np.linspace(low, high, bins + 1))[0] for arm, each in values.items()}
    most = max(each.max() for each in counts.values())
    frame = _Frame(title, f"{title} of {score}: a histogram for each arm", left, 26, strip * len(values), (low, high))
    for k, (arm, own) in enumerate(counts.items()):
        foot = frame.top + strip * (k + 1) - 4
        edges = np.linspace(low, high, bins + 1)
        heights = own / most * (strip - 10)
        for b in np.flatnonzero(own):
            x = frame.x(edges[b])
            middle = (edges[b] + edges[b + 1]) / 2
            hue = BASE if arm == first else WORSE if first is None and middle < 0 else TUNED
            frame.add(
                f'<rect x="{x:.1f}" y="{foot - heights[b]:.1f}" width="{frame.x(edges[b + 1]) - x:.1f}" '
                f'height="{heights[b]:.1f}" fill="{hue}" opacity="0.75"/>'
            )
        if first in counts and arm != first:
            reference = counts[first] / most * (strip - 10)
            path = "".join(
                f"L{frame.x(edge):.1f} {foot - reference[b]:.1f}" for b in range(bins) for edge in edges[b : b + 2]
            )
            frame.add(f'<path d="M{path[1:]}" fill="none" stroke="#222" stroke-width="0.8"/>')
        mean = frame.x(float(values[arm].mean()))
        frame.add(f'<path d="M{left} {foot}H{WIDTH - 8}" stroke="#bbb" stroke-width="0.7"/>')
        frame.add(f'<path d="M{mean:.1f} {foot - strip + 10}V{foot}" stroke="#222" stroke-dasharray="3 2"/>')
        frame.text(left - 6, foot - 6, plain(arm, 14), "end")
    if first is None:
        zero = frame.x(0.0)
        frame.add(f'<path d="M{zero:.1f} {frame.top}V{frame.bottom}" stroke="{QUIET}"/>')
    note = "dashed: mean; outline: " + plain(first, 20) if first in counts and len(counts) > 1 else "dashed: mean"
    frame.x_axis(f"score ({note})")
    return frame.svg()


def curves(metrics: list[dict]) -> str:
    """Small panels of what the training log holds; an empty text when it holds none of it."""
    panels = []
    for title, series in CURVES:
        lines: list[Line] = []
        for k, (key, colour) in enumerate(series.items()):
            points = [(float(row["step"]), float(row[key])) for row in metrics if key in row]
            if len(points) > 40:  # noisy per-step values: their running mean is what can be read
                width = len(points) // 20
                smooth = np.convolve([y for _, y in points], np.ones(width) / width, "valid")
                lines.append(Line("", points, colour, markers=False, faint=True))
                running = [(x, float(y)) for (x, _), y in zip(points[width - 1 :], smooth, strict=True)]
                lines.append(Line(key, running, colour, DASHES[k % len(DASHES)], markers=False))
            elif points:
                lines.append(Line(key, points, colour, DASHES[k % len(DASHES)]))
        if lines:
            panels.append(panel(title, lines, "step", 0.5 if "accura" in " ".join(series) else None))
    return "".join(panels)


def panel(title: str, lines: Sequence[Line], xlabel: str, level: float | None = None) -> str:
    """Lines over x, with their intervals where there are any. ``level``: of a dotted horizontal line."""
    xs = [point[0] for line in lines for point in line.points]
    ys = [y for line in lines for point in line.points for y in point[1:]] + ([] if level is None else [level])
    named = [line for line in lines if line.name]
    rows = len(named) if len(named) > 1 else 0
    frame = _Frame(title, f"{title} by {xlabel}", 58, 26 + 14 * rows, 150, _widened(min(xs), max(xs), 0.03))
    frame.limits_y = _widened(min(ys), max(ys), 0.06)
    for k, line in enumerate(named if rows else []):
        frame.add(_stroke(line, f"M64 {26 + 14 * k}h24"))
        frame.text(94, 30 + 14 * k, plain(line.name, 40), "start")
    frame.y_axis()
    if level is not None:
        frame.add(f'<path d="M58 {frame.y(level):.1f}H{WIDTH - 8}" stroke="#222" stroke-dasharray="1 3"/>')
    for line in lines:
        for x, _, *interval in line.points:
            if interval:
                low, high = (frame.y(each) for each in interval)
                path = f"M{frame.x(x):.1f} {low:.1f}V{high:.1f}"
                frame.add(f'<path d="{path}" stroke="{line.colour}" stroke-width="4" opacity="0.3"/>')
        points = [(frame.x(point[0]), frame.y(point[1])) for point in line.points]
        frame.add(_stroke(line, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)))
        for x, y in points if line.markers else []:
            frame.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>')
    frame.x_axis(xlabel)
    return frame.svg()


def _stroke(line: Line, path: str) -> str:
    style = 'stroke-width="0.8" opacity="0.4"' if line.faint else 'stroke-width="2"'
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return f'<path d="{path}" fill="none" stroke="{line.colour}" {style}{dash}/>'


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    room = share * (high - low) or 0.5 * abs(low) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """At most about ``most`` round numbers between two."""
    span = high - low
    if not 0 < span < math.inf:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most or span))
    step = power * next((each for each in (1, 2, 5) if power * each * most >= span * (1 - 1e-9)), 10)
    if not step or abs(low) / step > 1e12:  # a span below what float64 resolves there
        return [low]
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """A panel with axes: from data to its own coordinates, and the elements in it."""

    def __init__(self, title: str, label: str, left: int, top: int, height: int, limits_x: tuple[float, float]) -> None:
        self.label, self.left, self.top, self.bottom = label, left, top, top + height
        self.limits_x, self.limits_y = limits_x, (0.0, 1.0)
        self.parts: list[str] = []
        self.text(left, 14, title, "start", bold=True)

    def x(self, value: float) -> float:
        low, high = self.limits_x
        return self.left + (value - low) / (high - low) * (WIDTH - 8 - self.left)

    def y(self, value: float) -> float:
        low, high = self.limits_y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def add(self, element: str) -> None:
        self.parts.append(element)

    def text(self, x: float, y: float, text: str, anchor: str, bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(plain(text, 60))}</text>')

    def x_axis(self, label: str) -> None:
        self.add(f'<path d="M{self.left} {self.bottom}H{WIDTH - 8}" stroke="{QUIET}"/>')
        for value in ticks(*self.limits_x):
            self.add(f'<path d="M{self.x(value):.1f} {self.bottom}v4" stroke="{QUIET}"/>')
            self.text(self.x(value), self.bottom + 15, f"{value:.4g}", "middle")
        self.text((self.left + WIDTH - 8) / 2, self.bottom + 30, label, "middle")

    def y_axis(self) -> None:
        for value in ticks(*self.limits_y):
            self.add(f'<path d="M{self.left} {self.y(value):.1f}H{WIDTH - 8}" stroke="#e2e2e2"/>')
            self.text(self.left - 5, self.y(value) + 4, f"{value:.4g}", "end")

    def svg(self) -> str:
        height = self.bottom + 38
        return (
            f'<svg class="panel" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
            f'aria-label="{escape(self.label)}" font-size="11" fill="#222">{"".join(self.parts)}</svg>'
        )
