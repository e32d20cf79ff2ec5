"""Preferences that people gave between sampled images: the labels.jsonl of `diffpo collect`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import DiffpoError
from ..common.text import read_text


@dataclass(frozen=True)
class Label:
    """One judged pair of `diffpo collect`: images ``chosen`` and ``rejected`` of trajectory file ``group``, and the
    probability that the chosen one is better (above 1/2)."""

    prompt: str
    group: str
    chosen: int
    rejected: int
    preference: float


def read_labels(path: Path) -> list[Label]:
    """The judged pairs of labels.jsonl that are no ties. One line for each pair: {"prompt", "image_0", "image_1",
    "label_0"}; label_0 is 1 (image_0 is better), 0, 0.5 (a tie), or null (not judged).

    Raises DiffpoError that names the line: unreadable, a missing key, a label outside 0..1; or that nothing is judged.
    """
    path = Path(path).expanduser()
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise DiffpoError(
            f"cannot read the labels {path} (objective.rollout.labels): {error}. `diffpo collect CONFIG` samples "
            f"pictures and writes this file, for people to fill in"
        ) from None
    labels, ties = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, label = row["prompt"], row["label_0"]
            (group, first), (other, second) = (_place(row[key]) for key in ("image_0", "image_1"))
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompt is {prompt!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DiffpoError(
                f'{path}:{number}: expected {{"prompt", "image_0", "image_1", "label_0"}} with the image names of '
                f"`diffpo collect` ({type(error).__name__}: {error})"
            ) from None
        if label is None:
            continue
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
            raise DiffpoError(f"{path}:{number}: label_0 is {label!r}; it must be 1, 0, 0.5 (a tie) or null")
        if group != other or first == second:
            raise DiffpoError(f"{path}:{number}: image_0 and image_1 must be two images of one prompt")
        if label == 0.5:
            ties += 1
        else:
            order = (first, second) if label > 0.5 else (second, first)
            labels.append(Label(prompt, group, *order, max(label, 1 - label)))
    if not labels:
        what = f"all {ties} judged pairs are ties" if ties else "no pair is judged"
        raise DiffpoError(f"{path}: {what}. Set label_0 to 1 where image_0 is better and to 0 where image_1 is")
    return labels


def image_name(group: int, sample: int) -> str:
    return f"images/{group:05d}-{sample}.png"


def _place(name: str) -> tuple[str, int]:
    """images/00003-1.png (or images\\00003-1.png) -> the group 00003 and the sample 1."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is not the name of an image")
    group, _, sample = Path(name.replace("\\", "/")).stem.rpartition("-")
    if not group.isdecimal():
        raise ValueError(f"{name!r} is not an image of `diffpo collect`")
    return group, int(sample)
