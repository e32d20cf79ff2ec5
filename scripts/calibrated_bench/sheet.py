"""A contact sheet: rows are held-out prompts; columns the reference, the rule, and the best of both kinds."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from .cells import Cell, best
from .methods import RULE, Candidate, calibrated, uncalibrated
from .worlds import Embedded

SCALE, LEFT, TOP = 3, 250, 30  # pixels


def pictures(cell: Cell, prompts: int) -> tuple[list[str], list[list[Image.Image]]]:
    """Column titles and columns. SystemExit: the cell is not measured yet."""
    world, summary = cell.world, cell.summary
    assert isinstance(world, Embedded)
    plain, plan = best(summary, "uncalibrated"), best(summary, "calibrated")
    if plain is None or plan is None:
        raise SystemExit(f"{world.name} g={world.guidance:g}, {cell.calls} calls: measure it before you draw it")
    keys = {c.key: c for c in uncalibrated(world, cell.calls)}
    rule = next(c for c in keys.values() if c.family == RULE)
    chosen = keys.get(summary["uncalibrated"][plain]["key"])
    if chosen is None:
        raise SystemExit(f"{plain} of {world.name} has changed: measure the cell again before you draw it")
    fitted, _ = cell._fitted(plan, calibrated(world, cell.sizes.budget)[plan], None)
    if fitted is None:
        raise SystemExit(f"{plan} of {world.name} has changed: measure the cell again before you draw it")
    part = world.part("heldout", 0, prompts)
    columns = [world.pictures(cell.references.exact("heldout", 0, prompts)["zero"].to(part.z))]
    titles = [f"{cell.references.calls('heldout')} calls"]
    for title, candidate in (("default rule", rule), (chosen.name, chosen), (plan, Candidate.of(plan, plan, fitted))):
        x, _ = candidate.latents(part, cell.calls)
        titles.append(title)
        columns.append(world.pictures(torch.nan_to_num(x)))
    return titles, columns


def draw(cell: Cell, prompts: int = 12) -> Image.Image:
    titles, columns = pictures(cell, prompts)
    texts = cell.world.prompts("heldout", prompts)
    side = columns[0][0].width * SCALE + 4
    width = max(side, 170)
    sheet = Image.new("RGB", (LEFT + width * len(columns), TOP + side * prompts), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (title, column) in enumerate(zip(titles, columns, strict=True)):
        pen.text((LEFT + j * width, 8), title[:28], fill="black")
        for i, picture in enumerate(column):
            large = picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)
            sheet.paste(large, (LEFT + j * width, TOP + i * side))
    for i, text in enumerate(texts):
        words, lines = text.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 36:
                lines.append("")
            lines[-1] += f"{word} "
        pen.text((6, TOP + i * side + 8), "\n".join(lines), fill="black")
    return sheet
