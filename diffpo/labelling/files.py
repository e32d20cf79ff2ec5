"""What `diffpo label` writes: the parquet that training reads, and a picture of the best and the worst.

The columns have the usual names (docs/data.md), so that a config needs no map of columns. Further columns say where a
row comes from: prompt_id, arm, seed, gap, flipped, and the numbers of every scorer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.files import whole_file, writing
from ..common.images import ENCODED, read_file
from ..common.instruction import Instruction
from ..common.text import plain
from ..evaluation.sources import shown_at
from .rows import Form, Row

LABELS, SUMMARY, SHEET = "labels.parquet", "label.json", "label.png"
MADE_BY = b"diffpo.label"  # the key of the settings in the parquet's metadata
FURTHER = ("captions", "displacement")  # of pairs, if there are any
AT_ONCE = 64  # rows of a row group; pictures of so many rows are in memory


def write(path: Path, form: Form, rows: Sequence[Row], numbers: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write the rows; ``numbers``: the names of the scorers' numbers; ``about``: settings for the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    extra = [name for name in FURTHER if any(getattr(row, name) is not None for row in rows)]
    edited = [len(row.prompt.prompt.keys) for row in rows if isinstance(row.prompt.prompt, Instruction)]
    extra += ["source" if max(edited) == 1 else "sources"] if edited else []
    schema = _schema(pa, form, numbers, extra).with_metadata({MADE_BY: json.dumps(about, sort_keys=True).encode()})
    cells = (_cells(form, row, numbers, "sources" in extra) for row in rows)
    with writing(path), whole_file(path) as file, pq.ParquetWriter(file, schema) as writer:
        while part := list(islice(cells, AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, schema))


def check_target(path: Path) -> None:
    """DiffpoError if there is a file of that name which this verb did not write."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return
    try:
        ours = MADE_BY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        ours = False
    if not ours:
        raise DiffpoError(f"{path} was not written by `diffpo label` and would be overwritten: choose another --out")


def _schema(pa: Any, form: Form, numbers: Sequence[str], extra: Sequence[str]) -> Any:
    text, number, whole, truth, encoded = pa.string(), pa.float64(), pa.int64(), pa.bool_(), pa.binary()
    if form == "pairs":
        columns = {"caption": text, "jpg_0": encoded, "jpg_1": encoded, "label_0": number, "label_1": number}
        columns |= {"score_0": number, "score_1": number}
        columns |= {"caption_0": text, "caption_1": text} if "captions" in extra else {}
        for name, kind in {"arm": text, "seed": whole, **dict.fromkeys(numbers, number)}.items():
            columns |= {f"{name}_0": kind, f"{name}_1": kind}
        columns |= {"displacement": number} if "displacement" in extra else {}
    elif form == "rankings":
        columns = {"prompt": text, "images": pa.list_(encoded), "scores": pa.list_(number)}
        columns |= {name: pa.list_(kind) for name, kind in {"arm": text, "seed": whole}.items()}
        columns |= {name: pa.list_(number) for name in numbers}
    else:
        columns = {"prompt": text, "image": encoded, "liked": number, "score": number, "arm": text, "seed": whole}
        columns |= dict.fromkeys(numbers, number)
    columns |= {"source": encoded} if "source" in extra else {}
    columns |= {"source": pa.list_(encoded)} if "sources" in extra else {}
    return pa.schema({**columns, "gap": number, "flipped": truth, "prompt_id": whole})


def _cells(form: Form, row: Row, numbers: Sequence[str], several: bool) -> dict[str, Any]:
    """``several``: rows may have several pictures to edit, which are then a list."""
    pictures = [row.prompt.pictures[k] for k in row.members]
    values = {name: row.prompt.scores[list(row.members), column].tolist() for column, name in enumerate(numbers)}
    values |= {"arm": [each.arm for each in pictures], "seed": [each.seed for each in pictures]}
    encoded = [_bytes(each.path) for each in pictures]
    common: dict[str, Any] = {"gap": row.gap, "flipped": row.flipped, "prompt_id": row.prompt.index}
    if isinstance(prompt := row.prompt.prompt, Instruction):
        before = [_png(each) for each in shown_at(prompt, _size(row.files[0]))]
        common["source"] = before if several else before[0]
    if form == "rankings":
        return {"prompt": row.prompt.prompt, "images": encoded, "scores": list(row.worth), **values, **common}
    if form == "likes":
        single = {name: value[0] for name, value in values.items()}
        own = {"image": encoded[0], "liked": row.label, "score": row.worth[0]}
        return {"prompt": row.prompt.prompt, **own, **single, **common}
    both = {"jpg": encoded, "label": [row.label, 1 - row.label], "score": row.worth, **values}
    both |= {"caption": row.captions} if row.captions else {}
    sides = {f"{name}_{i}": value[i] for name, value in both.items() for i in (0, 1)}
    more = {} if row.displacement is None else {"displacement": row.displacement}
    return {"caption": row.prompt.prompt, **sides, **more, **common}


def _png(picture: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _size(path: Path) -> tuple[int, int]:
    from ..evaluation.manifest import open_image

    return open_image(path).size


def _bytes(path: Path) -> bytes:
    try:
        return read_file(path, ENCODED)
    except (OSError, ValueError) as error:
        raise DiffpoError(f"cannot read {path} again: {plain(error, 200)}. Run the same command again") from None


def sheet(rows: Sequence[Row], columns: int = 8, cell: int = 128) -> bytes:
    """A PNG of the clearest pairs to the least clear: the better picture above the worse, with gap and prompt.

    ``rows``: pairs with two pictures each.
    """
    from PIL import Image, ImageDraw, ImageFont

    from ..evaluation.manifest import open_image
    from ..evaluation.picture import fit, wrap

    ranked = sorted(rows, key=lambda row: -row.gap)
    count = min(columns, len(ranked))
    chosen = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]
    shown = [[fit(open_image(row.prompt.pictures[k].path), cell) for k in row.best_first] for row in chosen]
    width, height = (max(image.size[axis] for pair in shown for image in pair) for axis in (0, 1))
    font, gap, line = ImageFont.load_default(13), 8, 17
    titles = [[f"{row.gap:.3f}", *wrap(row.prompt.prompt, font, width)] for row in chosen]
    top, margin = gap + line * max(map(len, titles)), 56
    canvas = Image.new("RGB", (margin + count * (width + gap), top + 2 * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, name in enumerate(("better", "worse")):
        draw.text((8, top + r * (height + gap) + height // 2 - 8), name, fill="#222222", font=font)
    for column, (title, pair) in enumerate(zip(titles, shown, strict=True)):
        for number, text in enumerate(title):
            draw.text((margin + column * (width + gap), gap // 2 + number * line), text, fill="#222222", font=font)
        for r, image in enumerate(pair):
            canvas.paste(image, (margin + column * (width + gap), top + r * (height + gap)))
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def extremes(rows: Sequence[Row]) -> Iterator[Row]:
    """Of rows of any form, a pair for each prompt: its best picture and its worst, by their worth. Rows that were
    flipped on purpose are passed over."""
    prompts: dict[int, dict[int, tuple[float, Row]]] = {}
    for row in rows:
        for k, worth in zip(row.members, row.worth, strict=True):
            if not row.flipped:
                prompts.setdefault(row.prompt.index, {})[k] = (worth, row)
    for own in prompts.values():
        ranked = sorted(own, key=lambda k: own[k][0])
        worst, best = ranked[0], ranked[-1]
        if best != worst:
            (high, row), (low, _) = own[best], own[worst]
            yield replace(row, members=(best, worst), label=1.0, worth=(high, low), gap=high - low)
