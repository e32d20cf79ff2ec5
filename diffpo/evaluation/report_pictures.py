"""The pictures of the report: reduced, within a budget, as data in the page."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from ..common.errors import DiffpoError
from ..common.text import plain
from . import charts, paths
from .manifest import open_image
from .picture import fit
from .table import SHOWN

if TYPE_CHECKING:
    from .compare import Evaluation
    from .items import Item

SMALL = 192  # pixels of the longest side; up to here a picture keeps its pixels
SIDES = (1024, 768, 512, 384, 256, SMALL)  # to which larger ones are reduced
BUDGET = 18_000_000  # bytes of all reduced pictures: 24 MB as text
PER_PIXEL = 0.3  # bytes of a JPEG of photographic detail, about
STATIC_LIMIT = 24  # cards of a page without scripts: the best, the middle and the worst third
PATHS, CALLS = 6, 30  # prompts whose denoising path is shown, and calls of each


@dataclass
class Pictures:
    """Turns files into data URIs. ``count``: how many there will be, which share the budget."""

    count: int
    _made: dict[tuple[Path, int], str | None] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """The longest side of a reduced picture."""
        return next((each for each in SIDES if PER_PIXEL * each * each * self.count <= BUDGET), SMALL)

    def uri(self, path: Path | None, side: int | None = None) -> str | None:
        """None if there is no picture, or one that cannot be read; the scorers counted it."""
        if path is None:
            return None
        key = path, side or self.side
        if key not in self._made:
            try:
                self._made[key] = data_uri(*key, BUDGET // max(1, self.count))
            except DiffpoError:
                self._made[key] = None
        return self._made[key]


def data_uri(path: Path, side: int = SMALL, most: int = BUDGET) -> str:
    """The picture as it is in PNG, if it is at most `SMALL`; else a JPEG of at most ``side``, and of ``most`` bytes
    unless that takes a quality below 50. DiffpoError if it cannot be read."""
    image, buffer = open_image(path), BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
        return _as_uri("png", buffer)
    image = fit(image, side) if max(image.size) > side else image
    for quality in (88, 80, 70, 60, 50):
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= most:
            break
    return _as_uri("jpeg", buffer)


def _as_uri(kind: str, buffer: BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def data(evaluation: Evaluation, pictures: Pictures) -> Markup:
    """Everything that the page's script shows, as JSON that can stand in a <script> element."""
    names = list(dict.fromkeys(row.scorer for row in evaluation.rows))
    found = {
        "arms": list(evaluation.arms),
        "scores": [plain(name, 100) for name in names],
        "primary": names.index(evaluation.primary),
        "items": [
            {
                "index": item.index,
                "seed": item.seed,
                "prompt": plain(item.prompt, SHOWN),
                "pictures": [pictures.uri(item.pictures.get(arm)) for arm in evaluation.arms],
                "values": [[_number(evaluation.scores[name], arm, k) for arm in evaluation.arms] for name in names],
            }
            for k, item in enumerate(evaluation.items)
        ],
    }
    return Markup(script_safe(found))  # noqa: S704, escaped there


def script_safe(value: Any) -> str:
    """JSON in ASCII without <, > and &: nothing in it can end the element, or begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _number(by_arm: dict[str, np.ndarray], arm: str, k: int) -> float | None:
    value = float(by_arm[arm][k]) if arm in by_arm else float("nan")
    return float(f"{value:.6g}") if np.isfinite(value) else None


def static_cards(evaluation: Evaluation, pictures: Pictures) -> list[tuple[str, list[dict[str, Any]]]]:
    """Sections of cards with their titles, for a page without scripts: all pictures, or of many the best, the middle
    and the worst by the primary score of the second arm."""
    first, second, *_ = evaluation.arms
    values, cards = evaluation.scores[evaluation.primary], []
    for k, item in enumerate(evaluation.items):
        difference = float(values[second][k] - values[first][k])
        if np.isfinite(difference):
            cards.append((difference, k, item))
    cards.sort(key=lambda card: (-card[0], card[2].index, card[2].seed))
    third, middle = STATIC_LIMIT // 3, len(cards) // 2
    sections = [
        (f"The {third} best of {len(cards)}", cards[:third]),
        (f"The {third} in the middle", cards[middle - third // 2 : middle - third // 2 + third]),
        (f"The {third} worst", cards[-third:]),
    ]
    if len(cards) <= STATIC_LIMIT:
        sections = [(f"All {len(cards)}, best difference first", cards)]
    return [(title, [_card(evaluation, pictures, *card) for card in own]) for title, own in sections]


def _card(evaluation: Evaluation, pictures: Pictures, difference: float, k: int, item: Item) -> dict[str, Any]:
    values = evaluation.scores[evaluation.primary]
    figures = [(arm, pictures.uri(path), float(values[arm][k])) for arm, path in item.pictures.items()]
    colour = charts.TUNED if difference > 0 else charts.WORSE if difference < 0 else charts.QUIET
    return {"figures": figures, "colour": colour, "difference": difference, "item": item}


def denoising(evaluation: Evaluation, pictures: Pictures) -> list[dict[str, Any]]:
    """Of the first prompts that have one: for each arm its calls, and x_0 at each as a data URI."""
    found = []
    for item in evaluation.items:
        rows = []
        for arm in evaluation.arms:
            files = paths.beside(item.pictures[arm]) if arm in item.pictures else []
            chosen = np.linspace(0, len(files) - 1, min(CALLS, len(files))).round().astype(int).tolist()
            calls = [(k + 1, pictures.uri(files[k], SMALL)) for k in chosen]
            if calls:
                rows.append((arm, len(files), calls))
        if rows:
            longest = max(len(calls) for _, _, calls in rows)
            found.append({"item": item, "rows": rows, "longest": longest})
        if len(found) == PATHS:
            break
    return found
