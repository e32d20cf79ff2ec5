"""The pictures of the report: reduced, within a budget, as data in the page."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from ..common.errors import DiffpoError
from ..common.instruction import Instruction
from ..common.text import plain
from . import charts, paths
from .manifest import open_image
from .picture import fit
from .sources import in_a_row, shown_at
from .table import SHOWN

if TYPE_CHECKING:
    from .compare import Evaluation
    from .items import Item

SMALL = 192  # pixels of the longest side; up to here a picture keeps its pixels
LEAST = 48  # to which pictures are reduced at most, to stay within the budget
SIDES = (1024, 768, 512, 384, 256, SMALL)  # to which larger ones are reduced
BUDGET = 18_000_000  # bytes of all reduced pictures: 24 MB as text
PER_PIXEL = 0.3  # bytes of a JPEG of photographic detail, about
STATIC_LIMIT = 24  # cards of a page without scripts: the best, the middle and the worst third
PATHS, CALLS = 6, 30  # prompts whose denoising path is shown, and calls of each


@dataclass
class Thumbnails:
    """Turns files into data URIs. ``count``: how many there will be, which share the budget."""

    count: int
    _made: dict[tuple[Path | str, Any], str | None] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """The longest side of a reduced picture."""
        return next((each for each in SIDES if PER_PIXEL * each * each * self.count <= BUDGET), SMALL)

    def uri(self, path: Path | None, side: int | None = None) -> str | None:
        """None if there is no picture, or one that cannot be read; the scorers counted it."""
        if path is None:
            return None
        side = side or self.side
        return self._kept((path, side), lambda: open_image(path), side)

    def source(self, item: Item) -> str | None:
        """The picture that the item's prompt is about, cut to the shape of the results, so that both can be laid over
        each other; several side by side. None if there is none, or one that cannot be read."""
        prompt = item.prompt
        if not isinstance(prompt, Instruction):
            return None

        def opened() -> Image.Image:
            size = next((size for path in item.pictures.values() if (size := _size(path))), None)
            return in_a_row(shown_at(prompt, size) if size else prompt.pictures())

        return self._kept((prompt.key, item.index), opened, self.side)  # the results of a prompt have one size

    def _kept(self, key: tuple[Path | str, Any], opened: Callable[[], Image.Image], side: int) -> str | None:
        if key not in self._made:
            try:
                self._made[key] = data_uri(opened(), side, BUDGET // max(1, self.count))
            except DiffpoError:
                self._made[key] = None
        return self._made[key]


def _size(path: Path) -> tuple[int, int] | None:
    try:
        return open_image(path).size
    except DiffpoError:
        return None


def data_uri(image: Image.Image, side: int = SMALL, most: int = BUDGET) -> str:
    """The picture as it is in PNG, if it is at most `SMALL` and takes at most ``most`` bytes; else a JPEG of at most
    ``side`` and ``most`` bytes. What does not fit with quality 50 is made smaller, down to `LEAST` pixels."""
    buffer = BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= most:
            return _as_uri("png", buffer)
    while True:
        image = fit(image, side) if max(image.size) > side else image
        for quality in (88, 80, 70, 60, 50):
            buffer = BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= most:
                return _as_uri("jpeg", buffer)
        side = int(min(side, max(image.size)) * 0.75)
        if side < LEAST:
            return _as_uri("jpeg", buffer)


def _as_uri(kind: str, buffer: BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def data(evaluation: Evaluation, thumbnails: Thumbnails) -> Markup:
    """Everything that the page's script shows, as JSON that can stand in a <script> element."""
    names = list(dict.fromkeys(row.scorer for row in evaluation.rows))
    sources = [thumbnails.source(item) for item in evaluation.items]
    once: dict[str, int] = {}  # many items share one
    for source in filter(None, sources):
        once.setdefault(source, len(once))
    found = {
        "arms": list(evaluation.arms),
        "scores": [plain(name, 100) for name in names],
        "primary": names.index(evaluation.primary),
        "edits": any(isinstance(item.prompt, Instruction) for item in evaluation.items),
        "sources": [*once],
        "items": [
            {
                "index": item.index,
                "seed": item.seed,
                "prompt": plain(item.prompt, SHOWN),
                "source": once.get(source or ""),
                "pictures": [thumbnails.uri(item.pictures.get(arm)) for arm in evaluation.arms],
                "values": [[_number(evaluation.scores[name], arm, k) for arm in evaluation.arms] for name in names],
            }
            for k, (item, source) in enumerate(zip(evaluation.items, sources, strict=True))
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


def static_cards(evaluation: Evaluation, thumbnails: Thumbnails) -> list[tuple[str, list[dict[str, Any]]]]:
    """Sections of cards with their titles, for a page without scripts: all pictures, or of many the best, the middle
    and the worst by the primary score of one arm (`Evaluation.shown`)."""
    first, second = evaluation.arms[0], evaluation.shown
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
    return [(title, [_card(evaluation, thumbnails, *card) for card in own]) for title, own in sections]


def _card(evaluation: Evaluation, thumbnails: Thumbnails, difference: float, k: int, item: Item) -> dict[str, Any]:
    values = evaluation.scores[evaluation.primary]
    figures = [
        (arm, thumbnails.uri(path), float(values[arm][k]) if arm in values else float("nan"))
        for arm, path in item.pictures.items()
    ]
    colour = charts.TUNED if difference > 0 else charts.WORSE if difference < 0 else charts.QUIET
    source = thumbnails.source(item)
    return {"figures": figures, "colour": colour, "difference": difference, "item": item, "source": source}


def denoising(evaluation: Evaluation, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Of the first prompts that have one: for each arm its calls, and x_0 at each as a data URI."""
    found = []
    for item in evaluation.items:
        rows = []
        for arm in evaluation.arms:
            files = paths.beside(item.pictures[arm]) if arm in item.pictures else []
            chosen = np.linspace(0, len(files) - 1, min(CALLS, len(files))).round().astype(int).tolist()
            calls = [(k + 1, thumbnails.uri(files[k], SMALL)) for k in chosen]
            if calls:
                rows.append((arm, len(files), calls))
        if rows:
            longest = max(len(calls) for _, _, calls in rows)
            found.append({"item": item, "rows": rows, "longest": longest})
        if len(found) == PATHS:
            break
    return found
