"""A PNG of a few groups as training uses them: resized, cropped, perhaps flipped; the best image is on the left."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..common.files import whole_file, writing
from ..common.text import plain
from ..config import Data
from ..data.groups import Groups
from ..data.rows import Group, spread
from ..data.transforms import View, centred, shown, views

GROUPS = 6
CELL = 256  # px, the largest side of an image
LINES = 3  # lines of a caption


def draw(groups: Groups, data: Data, path: Path) -> None:
    """Write a PNG of up to `GROUPS` evenly spaced groups, each a row of images with the captions below. DiffpoError if
    it cannot be written."""
    indices = spread(len(groups), GROUPS) if len(groups) > GROUPS else range(len(groups))
    longest = max(max(groups.groups[index].target) for index in indices)
    # small images are enlarged by an integer factor without smoothing, large ones are reduced with smoothing
    scale = CELL // longest if longest <= CELL else CELL / longest
    how = Image.Resampling.NEAREST if longest <= CELL else Image.Resampling.LANCZOS
    side, gap, line = round(longest * scale), 8, 16
    width, height = max(320, groups.members * (side + gap) + gap), side + line * (LINES + 1) + gap
    canvas = Image.new("RGB", (width, gap + height * len(indices)), "white")
    ink, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for row, index in enumerate(indices):
        group, top = groups.groups[index], gap + row * height
        seen = _seen(group, data, index)
        small = round(group.target[0] * scale), round(group.target[1] * scale)
        for place, (image, view) in enumerate(zip(groups.images(index), seen, strict=True)):
            canvas.paste(shown(image, view).resize(small, how), (gap + place * (side + gap), top))
        captions = " | ".join(plain(caption) for caption in group.captions)
        text = [_verdict(groups, index), *textwrap.wrap(captions, width // 7)]
        if len(text) > LINES + 1:
            text[LINES] += " ..."
        for number, words in enumerate(text[: LINES + 1]):
            ink.text((gap, top + side + 2 + line * number), words, fill="#222222", font=font)
    with writing(f"the picture {path}", "--picture=FILE", kept=""), whole_file(path) as file:
        canvas.save(file, "PNG")


def _seen(group: Group, data: Data, index: int) -> list[View]:
    if data.crop == "center" and not data.flip:
        return centred(group.sizes, group.target)
    from ..common.rng import generator  # brings torch

    return views(group.sizes, group.target, data.crop, data.flip, generator(0, "picture", index))


def _verdict(groups: Groups, index: int) -> str:
    group = groups.groups[index]
    row = f"row {group.row}: "
    if groups.kind == "single":
        return f"{row}liked with probability {group.preference:g}"
    if groups.kind == "list":
        return f"{row}best to worst"
    return f"{row}chosen, rejected" + (f"; chosen with probability {group.preference:g}" if groups.soft else "")
