"""Pictures of `diffpo eval` for the model card: base and tuned beside each other, from the same prompt and noise."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..common.text import markdown, plain
from ..evaluation.manifest import intact, read_manifest

SHOWN = 4  # prompts
FOLDER = "images"


@dataclass(frozen=True)
class Pair:
    """A prompt with its picture by the base model and by the tuned one: files in the folder of results."""

    prompt: str
    base: Path
    tuned: Path


def pairs(results: Path) -> list[Pair]:
    """The first `SHOWN` prompts of the evaluation, not the best ones, as far as their pictures are there."""
    found: dict[tuple[int, int], dict[str, dict]] = {}
    for row in read_manifest(results):
        found.setdefault((row["index"], row["seed"]), {})[row["arm"]] = row
    chosen: dict[int, Pair] = {}
    for (index, _), arms in sorted(found.items()):
        both = [arms.get(arm) for arm in ("base", "tuned")]
        if index not in chosen and all(row is not None and intact(results, row) for row in both):
            base, tuned = (row for row in both if row is not None)
            chosen[index] = Pair(base["prompt"], results / base["file"], results / tuned["file"])
    return [chosen[index] for index in sorted(chosen)[:SHOWN]]


def copy(chosen: list[Pair], folder: Path) -> None:
    """Into ``folder``/images, under the names that `table` and `gallery` give."""
    for number, pair in enumerate(chosen):
        for arm in ("base", "tuned"):
            target = folder / _name(number, arm)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(getattr(pair, arm), target)


def table(chosen: list[Pair]) -> str:
    """The pictures as a Markdown table."""
    if not chosen:
        return ""
    rows = [f"| {markdown(p.prompt)} | {_image(k, 'base')} | {_image(k, 'tuned')} |" for k, p in enumerate(chosen)]
    said = f"The first {len(chosen)} prompts of the evaluation, each with the same noise:"
    return "\n".join([said, "", "| prompt | base | tuned |", "| --- | --- | --- |", *rows])


def gallery(chosen: list[Pair]) -> list[str]:
    """Lines of the hub's YAML header that show the tuned pictures."""
    lines = ["widget:"] if chosen else []
    for number, pair in enumerate(chosen):
        text = json.dumps(plain(pair.prompt), ensure_ascii=False)
        lines += [f"- text: {text}", "  output:", f"    url: {_name(number, 'tuned')}"]
    return lines


def _name(number: int, arm: str) -> str:
    return f"{FOLDER}/{number}_{arm}.png"


def _image(number: int, arm: str) -> str:
    return f"![]({_name(number, arm)})"
