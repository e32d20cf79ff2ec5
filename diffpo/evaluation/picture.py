"""The picture of an evaluation: some prompts, with a row for every arm."""

from __future__ import annotations

from bisect import bisect_right
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..common.errors import DiffpoError
from ..common.instruction import Instruction
from ..common.text import plain
from .manifest import open_image
from .sources import in_a_row

if TYPE_CHECKING:
    from .compare import Evaluation
    from .items import Item


def fit(image: Image.Image, size: int) -> Image.Image:
    """Longest side near ``size``: small pictures by a whole factor, every pixel kept square; large ones smoothly."""
    longest = max(image.size)
    if longest <= size:
        factor = size // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = size / longest
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def wrap(text: str, font, width: int, lines: int = 4) -> list[str]:
    """The beginning of ``text`` in lines of ``width`` pixels; words that are wider are cut."""
    wrapped = [""]
    for word in plain(text, 50 * lines).split():
        while font.getlength(word) > width and len(word) > 1 and len(wrapped) <= lines + 1:
            most = max(1, bisect_right(range(1, len(word)), width, key=lambda k: font.getlength(word[:k])))
            wrapped += [word[:most]]
            word = word[most:]
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
        if len(wrapped) > lines + 1:  # the first may be empty
            break
    wrapped = [line for line in wrapped if line] or [""]
    return wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], wrapped[lines - 1] + " ..."]


def grid_png(evaluation: Evaluation, columns: int = 8, cell: int = 160) -> bytes:
    """A row of pictures for every arm, with the prompt and the difference of one arm (`Evaluation.shown`) above each
    column. Of edits the first row has the pictures that they are of.

    The ``columns`` prompts lie at even distances in the order of differences, from the best to the worst, so that the
    picture shows the whole range. Each is shown with its first seed. An arm without a picture there leaves a gap.
    """
    arms: list[str] = list(evaluation.arms)
    ranked = evaluation.by_prompt[evaluation.shown]
    count = min(columns, len(ranked))
    chosen = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]
    both = {arms[0], evaluation.shown}
    by_index = {item.index: item for item in reversed(evaluation.items) if both <= item.pictures.keys()}
    first = [by_index[entry["prompt_id"]] for entry in chosen]
    pictures = [[_opened(item, arm, cell) for item in first] for arm in arms]
    if any(isinstance(item.prompt, Instruction) for item in first):
        arms.insert(0, "source")
        pictures.insert(0, [_source(item, cell) for item in first])
    width, height = (max(image.size[k] for row in pictures for image in row if image) for k in (0, 1))
    font, gap, line = ImageFont.load_default(13), 8, 17
    margin = max(52, min(160, 16 + round(max(font.getlength(arm) for arm in arms))))
    titles = [[f"{entry['difference']:+.3f}", *wrap(entry["prompt"], font, width)] for entry in chosen]
    top = gap + line * max(map(len, titles))
    canvas = Image.new("RGB", (margin + len(first) * (width + gap), top + len(arms) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        for number, text in enumerate(title):
            draw.text((margin + column * (width + gap), gap // 2 + number * line), text, fill="#222222", font=font)
    for r, (name, row) in enumerate(zip(arms, pictures, strict=True)):
        for number, text in enumerate(wrap(name, font, margin - 12)):
            at = (8, top + r * (height + gap) + height // 2 - 8 + number * line)
            draw.text(at, text, fill="#222222", font=font)
        for column, image in enumerate(row):
            if image:
                canvas.paste(image, (margin + column * (width + gap), top + r * (height + gap)))
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _source(item: Item, cell: int) -> Image.Image | None:
    try:
        return fit(in_a_row(item.prompt.pictures()), cell) if isinstance(item.prompt, Instruction) else None
    except DiffpoError:  # a gap, in the report too
        return None


def _opened(item: Item, arm: str, cell: int) -> Image.Image | None:
    try:
        return fit(open_image(item.pictures[arm]), cell) if arm in item.pictures else None
    except DiffpoError:  # the scorers counted it
        return None
