"""Votes as rows that `diffpo train` reads: prompt, pictures, label_0 or ranks, masks, and who voted when.

| column | what it holds |
| --- | --- |
| prompt, image_0, image_1, label_0 | a pair; label_0 is 1, 0, or 0.5 for a tie; a share with ``rows="share"`` |
| prompt, images, ranks | a ranked set (``ask="ranking"``); 1 is best |
| name_0, name_1 (names) | what made the pictures, where that is known |
| source | what the pictures are edits of, a list where some have several; only of edits |
| mask; mask_0, mask_1 | PNG, white where somebody marked; of both pictures together, and of each |
| votes, user_id | how many votes; the annotator, where the row is of one |
| time, seconds | of the last vote; how long the votes took on average |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageChops

from ..common.errors import DiffpoError
from ..common.files import whole_file, writing
from ..common.images import BadRow, decode
from ..common.text import plain
from ..data.transforms import centred, shown
from .store import Store, Vote
from .tally import Tally, summed, tallies
from .tasks import Tasks

Rows = Literal["majority", "share", "each"]
AT_ONCE = 64  # rows with their pictures in memory


@dataclass(frozen=True)
class Export:
    """How votes become rows.

    Attributes:
        rows: majority: one row a task, with the picture that more votes prefer, or a tie where as many prefer either.
            share: one row a task, with the share of votes, ties half. each: one row a vote.
        both_bad: leave such votes out, or count them as ties.
        files: pictures by the names of their files, not by their bytes, and without masks.
    """

    rows: Rows = "majority"
    both_bad: Literal["drop", "tie"] = "drop"
    files: bool = False


def run(folder: Path, out: Path, export: Export = Export()) -> Counter[str]:
    """Write the votes of a folder, and return counts: rows, votes, ties, both_bad, skipped, unclear, unmarked.

    A .parquet file holds the pictures. A .jsonl file names them as the source does, and is for pairs: so
    `objective.rollout.labels` reads it beside the labels.jsonl of `diffpo collect`.

    DiffpoError if there are no votes, or if a picture has changed or cannot be read.
    """
    if out.suffix not in (".parquet", ".jsonl"):
        raise DiffpoError(f"--out {plain(out, 200)}: name a file that ends in .parquet or .jsonl")
    tasks, store = Tasks.load(folder), Store(folder, readonly=True)
    lists = tasks.show == "sets" and tasks.ask == "ranking"
    export = replace(export, files=out.suffix == ".jsonl")
    if lists and export.files:
        raise DiffpoError(f"{folder} holds rankings, which do not fit into a .jsonl file of pairs: write .parquet")
    votes = store.votes()
    counts: Counter[str] = Counter(votes=sum(not vote.repeat for vote in votes))
    counts["skipped"] = sum(vote.ranks is None and not vote.repeat for vote in votes)
    with writing(out), whole_file(out) as file:
        found = _rows(tasks, store, votes, export, counts)
        if export.files:
            for row in found:
                kept = {key: value for key, value in row.items() if not key.startswith("mask")}
                file.write(json.dumps(kept, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        else:
            _parquet(file, found, _schema(lists, max((len(task.sources) for task in tasks.all), default=0)))
        if not counts["rows"]:
            why = f"{counts['votes']} votes, {counts['skipped']} skipped, {counts['both_bad']} that all is bad"
            raise DiffpoError(f"{folder} has no vote that makes a row: {why}")
    return counts


def _parquet(file: Any, rows: Iterator[dict], schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema) as writer:
        while batch := list(islice(rows, AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def _schema(lists: bool, sources: int) -> Any:
    """``sources``: the largest number of pictures that a task's are edits of."""
    import pyarrow as pa

    blob, text = pa.binary(), pa.string()
    pictures: dict[str, Any] = {"image_0": blob, "image_1": blob, "label_0": pa.float64()}
    pictures |= {"name_0": text, "name_1": text, "mask": blob, "mask_0": blob, "mask_1": blob}
    if lists:
        pictures = {"images": pa.list_(blob), "ranks": pa.list_(pa.float64()), "names": pa.list_(text)}
        pictures |= {"mask": blob, "masks": pa.list_(blob)}
    pictures |= {"source": blob if sources == 1 else pa.list_(blob)} if sources else {}
    about = {"votes": pa.int32(), "user_id": text, "time": pa.timestamp("ms", "UTC"), "seconds": pa.float64()}
    return pa.schema(list(({"prompt": text} | pictures | about | {"task": text}).items()))


def _rows(tasks: Tasks, store: Store, votes: list[Vote], export: Export, counts: Counter[str]) -> Iterator[dict]:
    for tally in tallies(tasks, votes):
        good = [vote for vote in tally.votes if not vote.bad or export.both_bad == "tie"]
        counts["both_bad"] += tally.bad
        groups = [[vote] for vote in good] if export.rows == "each" else [good] * bool(good)
        for group in groups:
            for row in _of(tasks, store, Tally(tally.task, tuple(group)), export, counts):
                counts["rows"] += 1
                if export.files and row["mask"] is not None:
                    counts["unmarked"] += 1
                yield row


def _of(tasks: Tasks, store: Store, tally: Tally, export: Export, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of a task: one, or for a set with a best picture one for each of the others."""
    task, best_only = tally.task, tasks.show == "sets" and tasks.ask == "best"
    several = any(len(each.sources) > 1 for each in tasks.all)
    try:
        encoded = [tasks.content(picture) for picture in task.pictures]
        marks = _union([store.marks(vote.uid) for vote in tally.votes])
        sizes = [decode(each).size for each in encoded]
        cells = [tasks.file(picture) for picture in task.pictures] if export.files else encoded
        before: list[Any] = [tasks.file(each) if export.files else tasks.content(each) for each in task.sources]
    except BadRow as problem:
        raise DiffpoError(f"the pictures of {plain(task.prompt, 100)!r} cannot be exported: {problem}") from None
    users = {vote.annotator for vote in tally.votes}
    about = {
        "prompt": task.prompt,
        "votes": len(tally.votes),
        "user_id": next(iter(users)) if len(users) == 1 else None,
        "time": round(max(vote.time for vote in tally.votes) * 1000),
        "seconds": float(np.mean([vote.ms for vote in tally.votes]) / 1000),
        "task": task.id,
    }
    if before and several:
        about["source"] = before
    elif before:
        about["source"] = before[0] if export.files else _cut(before[0], sizes[0])
    names = [picture.name or None for picture in task.pictures]
    if tasks.show == "sets" and tasks.ask == "ranking":
        mean = np.mean([vote.ranks for vote in tally.votes if vote.ranks], 0)
        _, ranks = np.unique(mean.round(9), return_inverse=True)
        masks = [_png(marks.get(k)) for k in range(len(encoded))]
        pictures = {"images": cells, "ranks": (ranks + 1.0).tolist(), "names": names, "masks": masks}
        yield about | pictures | {"mask": _png(_joined(marks, range(len(encoded)), sizes[0]))}
        return
    won = summed(tally, best_only)
    for first, second in _pairs(tally, won, best_only, counts):
        label = won[first, second] / (won[first, second] + won[second, first])
        if export.rows == "majority":
            label = 0.5 + 0.5 * np.sign(round(label - 0.5, 9))
        counts["ties"] += int(label == 0.5)
        pair: dict[str, Any] = {"image_0": cells[first], "image_1": cells[second], "label_0": float(label)}
        pair |= {"name_0": names[first], "name_1": names[second]}
        pair |= {"mask_0": _png(marks.get(first)), "mask_1": _png(marks.get(second))}
        yield about | pair | {"mask": _png(_joined(marks, (first, second), sizes[first]))}


def _cut(encoded: bytes, size: tuple[int, int]) -> bytes:
    """A picture to edit at the ``size`` of the results, scaled and cut as the model saw it (evaluation/sources.py)."""
    picture = decode(encoded)
    if picture.size == size:
        return encoded
    buffer = BytesIO()
    cut = shown(picture, centred([picture.size], size)[0])
    cut.info = {}
    cut.save(buffer, "PNG")
    return buffer.getvalue()


def _pairs(tally: Tally, won: np.ndarray, best_only: bool, counts: Counter[str]) -> list[tuple[int, int]]:
    """Which pictures make a row: the two of a pair, or the best of a set with each other one."""
    if not best_only:
        return list(combinations(range(len(won)), 2))
    named = np.sum([np.array(vote.ranks) == 1 for vote in tally.votes if vote.ranks], 0)
    best = np.flatnonzero(named == named.max())
    if len(best) != 1:
        counts["unclear"] += 1
        return []
    first = int(best[0])
    return [(first, other) for other in range(len(won)) if won[first, other] + won[other, first] > 0]


def _union(marks: list[dict[int, bytes]]) -> dict[int, Image.Image]:
    found: dict[int, Image.Image] = {}
    for each in marks:
        for k, png in each.items():
            mask = Image.open(BytesIO(png)).convert("L")
            if mask.getbbox():
                found[k] = ImageChops.lighter(found[k], mask) if k in found else mask
    return found


def _joined(marks: dict[int, Image.Image], which: Iterable[int], size: tuple[int, int]) -> Image.Image | None:
    """The marks of several pictures as one mask of the ``size`` of the first, as `data.columns.mask` wants it."""
    found = None
    for k in which:
        if k in marks:
            mask = marks[k] if marks[k].size == size else marks[k].resize(size, Image.Resampling.NEAREST)
            found = mask if found is None else ImageChops.lighter(found, mask)
    return found


def _png(mask: Image.Image | None) -> bytes | None:
    if mask is None:
        return None
    buffer = BytesIO()
    mask.convert("1").save(buffer, "PNG")
    return buffer.getvalue()
