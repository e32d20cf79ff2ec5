"""What an evaluation looks like: the table in the terminal, the before/after picture, one self-contained HTML."""

from __future__ import annotations

import base64
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from ..common import tables
from ..common.text import plain
from . import charts
from .manifest import open_image

if TYPE_CHECKING:
    from .compare import Comparison, Evaluation, Pair

COLUMNS = ("scorer", "base", "tuned", "difference [95 %]", "win rate [95 %]", "n", "trained on?")
_AXES = {"following": "prompt following", "appearance": "appearance"}
SHOWN = 1000  # characters of a text
_GRID_LIMIT = 240  # pairs in the HTML grid; of more, the best, the middle and the worst third of this number
_THUMB = 192  # pixels; larger pictures are shown reduced, so that the file stays small


def section(scorer: str) -> tuple[str, str]:
    """Rows of one section stand together: a total, the two axes that must not be mixed up, their parts."""
    name, _, key = scorer.partition(".")
    return name, "axes" if key in _AXES else "total" if key == "total" else "parts"


def cells(row: Comparison) -> tuple[str, ...]:
    """The row as texts, in the order of COLUMNS."""
    d, w = row.difference, row.win_rate
    return (
        plain(row.scorer, 100),
        f"{row.base:.4f}",
        f"{row.tuned:.4f}",
        f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]",
        f"{w.value:.1%} [{w.low:.1%}, {w.high:.1%}]",
        str(row.n),
        row.training_signal,
    )


def diversity_text(evaluation: Evaluation) -> str:
    base, tuned = evaluation.diversity["base"], evaluation.diversity["tuned"]
    change = f" ({tuned / base - 1:+.1%})" if base > 0 else ""
    several = len(evaluation.pairs) > len(evaluation.by_prompt)
    between = "seeds of one prompt" if several else "pictures of different prompts"
    return f"diversity (mean pixel distance between {between}): base {base:.4f}, tuned {tuned:.4f}{change}"


def print_table(evaluation: Evaluation) -> None:
    """The table, diversity, the best and worst five prompts and the files, to the terminal."""
    console, rows = tables.console(), evaluation.rows
    title = f"base against tuned: {len(evaluation.pairs)} pairs of {len(evaluation.by_prompt)} prompts"
    table = tables.Table(COLUMNS, [cells(row) for row in rows], title)
    bold = [number for number, row in enumerate(rows) if row.scorer == evaluation.primary]
    ends = [
        number for number, (row, after) in enumerate(pairwise(rows)) if section(row.scorer) != section(after.scorer)
    ]
    console.print(table.terminal(left=(0, len(COLUMNS) - 1), bold=bold, rule_after=ends))
    console.print(diversity_text(evaluation))
    for title, entries in (("best", evaluation.by_prompt[:5]), ("worst", evaluation.by_prompt[::-1][:5])):
        console.print(f"{title} prompts by {plain(evaluation.primary, 100)}, tuned - base:")
        for entry in entries:
            console.print(f"  {entry['difference']:+.4f}  {plain(entry['prompt'], SHOWN)}")
    for name, path in evaluation.files.items():
        console.print(f"{name}: {plain(path, 5000)}", soft_wrap=True)


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Longest side near ``size``: small pictures by a whole factor, every pixel kept square; large ones smoothly."""
    longest = max(image.size)
    if longest <= size:
        factor = size // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = size / longest
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def _wrap(text: str, font, width: int, lines: int = 4) -> list[str]:
    """The beginning of ``text`` in lines of ``width`` pixels; words that are wider are cut."""
    wrapped = [""]
    for word in plain(text, 50 * lines).split():
        while font.getlength(word) > width and len(word) > 1:
            most = next(k for k in range(len(word) - 1, 0, -1) if k == 1 or font.getlength(word[:k]) <= width)
            wrapped += [word[:most]]
            word = word[most:]
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    wrapped = [line for line in wrapped if line] or [""]
    return wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], wrapped[lines - 1] + " ..."]


def grid_png(evaluation: Evaluation, columns: int = 8, cell: int = 160) -> bytes:
    """Before/after: a row of the base, a row of the tuned model, the prompt and its difference above each column.

    The ``columns`` prompts lie at even distances in the order of differences, from the best to the worst, so that the
    picture shows the whole range. Each is shown with its first seed.
    """
    ranked = evaluation.by_prompt
    count = min(columns, len(ranked))
    chosen = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]
    by_index = {pair.index: pair for pair in reversed(evaluation.pairs)}
    first = [by_index[entry["prompt_id"]] for entry in chosen]
    pictures = [[_fit(open_image(getattr(pair, arm)), cell) for pair in first] for arm in ("base", "tuned")]
    width, height = (max(image.size[k] for row in pictures for image in row) for k in (0, 1))
    font, gap, margin, line = ImageFont.load_default(13), 8, 52, 17
    titles = [[f"{entry['difference']:+.3f}", *_wrap(entry["prompt"], font, width)] for entry in chosen]
    top = gap + line * max(map(len, titles))
    canvas = Image.new("RGB", (margin + len(first) * (width + gap), top + 2 * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        for number, text in enumerate(title):
            draw.text((margin + column * (width + gap), gap // 2 + number * line), text, fill="#222222", font=font)
    for r, (name, row) in enumerate(zip(("base", "tuned"), pictures, strict=True)):
        draw.text((8, top + r * (height + gap) + height // 2 - 8), name, fill="#222222", font=font)
        for column, image in enumerate(row):
            canvas.paste(image, (margin + column * (width + gap), top + r * (height + gap)))
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _plain(value: object, length: int = SHOWN) -> str:
    return plain(value, length)


def _data_uri(path: Path) -> str:
    image, buffer = open_image(path), BytesIO()
    if max(image.size) <= _THUMB:
        image.save(buffer, "PNG")
        kind = "png"
    else:
        _fit(image, _THUMB).save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _card(pair: Pair, base: float, tuned: float) -> dict[str, Any]:
    return {
        "figures": (("base", pair.base, base), ("tuned", pair.tuned, tuned)),
        "colour": charts.TUNED if tuned > base else charts.WORSE if tuned < base else "#555",
        "difference": tuned - base,
        "prompt": pair.prompt,
        "index": pair.index,
        "seed": pair.seed,
    }


def _grid(evaluation: Evaluation) -> list[tuple[str, list[dict[str, Any]]]]:
    """Sections of cards with their titles: all pairs, or of many the best, the middle and the worst."""
    arms = evaluation.scores[evaluation.primary]
    scored = [
        (pair, float(base), float(tuned))
        for pair, base, tuned in zip(evaluation.pairs, arms["base"], arms["tuned"], strict=True)
        if base == base and tuned == tuned  # NaN: the prompt has no such score
    ]
    scored.sort(key=lambda item: (item[1] - item[2], item[0].index, item[0].seed))
    if len(scored) <= _GRID_LIMIT:
        parts = [(f"All {len(scored)} pairs, best difference first", scored)]
    else:
        third, middle = _GRID_LIMIT // 3, len(scored) // 2
        parts = [
            (f"The {third} best of {len(scored)} pairs", scored[:third]),
            (f"The {third} in the middle", scored[middle - third // 2 : middle - third // 2 + third]),
            (f"The {third} worst", scored[-third:]),
        ]
    return [(title, [_card(*item) for item in items]) for title, items in parts]


def _rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The lines of the table: their texts, an axis's name, a bar of the win rate, and classes for the style."""
    found, previous = [], None
    for row in evaluation.rows:
        new = previous is not None and section(row.scorer) != previous
        previous, rate = section(row.scorer), row.win_rate
        classes = ["new"] * new + ["primary"] * (row.scorer == evaluation.primary)
        found.append(
            {
                "cells": cells(row),
                "axis": _AXES.get(row.scorer.partition(".")[2]),
                "bar": Markup(charts.interval_bar(rate.value, rate.low, rate.high)),  # noqa: S704, numbers only
                "classes": " ".join(classes),
            }
        )
    return found


def _settings(manifest: list[dict]) -> list[tuple[str, Any]]:
    """How the images were made, from the last row of either arm (the manifest holds one set of settings only)."""
    if not manifest:
        return []
    settings = {k: v for k, v in manifest[-1].items() if k not in ("arm", "index", "seed", "prompt", "file", "sha256")}
    if "solver" in settings and settings["solver"] is None:
        rule = "the default for this number of calls and guidance"
        settings["solver"] = rule if settings.get("plan") is None else "that of the plan"
    settings["seeds"] = ", ".join(str(seed) for seed in sorted({row["seed"] for row in manifest}))
    return list(settings.items())


def html(evaluation: Evaluation, manifest: list[dict], metrics: list[dict]) -> str:
    """The whole report as one page that loads nothing from anywhere."""
    pages = Environment(loader=PackageLoader(__package__), autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    pages.filters |= {"plain": _plain, "data_uri": _data_uri}
    arms = evaluation.scores[evaluation.primary]
    return pages.get_template("report.html").render(
        e=evaluation,
        columns=COLUMNS,
        rows=_rows(evaluation),
        diversity=diversity_text(evaluation),
        # charts.py escapes the names in its SVG
        histograms=Markup(charts.histograms(evaluation.primary, arms["base"], arms["tuned"])),  # noqa: S704
        curves=Markup(charts.curves(metrics)),  # noqa: S704
        grid=_grid(evaluation),
        settings=_settings(manifest),
    )
