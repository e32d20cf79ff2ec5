"""What an evaluation looks like as a page: one self-contained HTML file."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..common.text import plain
from . import charts
from .manifest import open_image
from .picture import fit
from .table import AXES, SHOWN, columns, diversity_text, lines, section, title

if TYPE_CHECKING:
    from .compare import Evaluation

_GRID_LIMIT = 240  # cards in the HTML grid; of more, the best, the middle and the worst third of this number
_THUMB = 192  # pixels; larger pictures are shown reduced, so that the file stays small


def _plain(value: object, length: int = SHOWN) -> str:
    return plain(value, length)


def _data_uri(path: Path) -> str:
    image, buffer = open_image(path), BytesIO()
    if max(image.size) <= _THUMB:
        image.save(buffer, "PNG")
        kind = "png"
    else:
        fit(image, _THUMB).save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cards(evaluation: Evaluation, arm: str) -> list[dict[str, Any]]:
    """A card for every picture that has the primary score in the first arm and in ``arm``, best difference first."""
    first, values = evaluation.arms[0], evaluation.scores[evaluation.primary]
    cards = []
    for k, item in enumerate(evaluation.items):
        difference = float(values[arm][k] - values[first][k])
        if difference == difference:  # NaN: the prompt has no such score
            figures = [(each, path, float(values[each][k])) for each, path in item.pictures.items()]
            colour = charts.TUNED if difference > 0 else charts.WORSE if difference < 0 else "#555"
            cards.append({"figures": figures, "colour": colour, "difference": difference, "item": item})
    return sorted(cards, key=lambda card: (-card["difference"], card["item"].index, card["item"].seed))


def _grid(evaluation: Evaluation) -> list[tuple[str, list[dict[str, Any]]]]:
    """Sections of cards with their titles: all pictures, or of many the best, the middle and the worst."""
    cards = _cards(evaluation, evaluation.arms[1])
    if len(cards) <= _GRID_LIMIT:
        return [(f"All {len(cards)}, best difference first", cards)]
    third, middle = _GRID_LIMIT // 3, len(cards) // 2
    return [
        (f"The {third} best of {len(cards)}", cards[:third]),
        (f"The {third} in the middle", cards[middle - third // 2 : middle - third // 2 + third]),
        (f"The {third} worst", cards[-third:]),
    ]


def _rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The lines of the table: their texts, an axis's name, a bar of the win rate, and classes for the style."""
    found, previous = [], None
    for row, texts in lines(evaluation):
        new = previous is not None and section(row.scorer) != previous
        previous, rate = section(row.scorer), row.win_rate
        classes = ["new"] * new + ["primary"] * (row.scorer == evaluation.primary)
        found.append(
            {
                "cells": texts,
                "axis": AXES.get(row.scorer.partition(".")[2]),
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
    arms, (first, second, *_) = evaluation.scores[evaluation.primary], evaluation.arms
    return pages.get_template(
        "report.html"
    ).render(
        e=evaluation,
        title=title(evaluation),
        columns=columns(evaluation),
        rows=_rows(evaluation),
        diversity=diversity_text(evaluation),
        # charts.py escapes the names in its SVG
        histograms=Markup(charts.histograms(evaluation.primary, arms[first], arms[second])),  # noqa: S704
        curves=Markup(charts.curves(metrics)),  # noqa: S704
        grid=_grid(evaluation),
        bar_at=4 if len(evaluation.arms) == 2 else 5,
        best_and_worst=[
            (f"{which} five prompts, {arm}", entries)
            for arm, ranked in evaluation.by_prompt.items()
            for which, entries in (("Best", ranked[:5]), ("Worst", ranked[::-1][:5]))
        ],
        settings=_settings(manifest),
    )
