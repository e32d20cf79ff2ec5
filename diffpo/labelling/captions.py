"""A caption for each picture of a pair, for dual-caption training (DCPO, Saeidi et al. 2025, arXiv 2502.06023).

captioner  DCPO-c: a vision-language model describes both pictures.
perturbed  DCPO-p: the better picture has the prompt, the worse one the prompt with other words.
hybrid     DCPO-h: both are described, and the words of the worse one's caption are changed.

The paper's perturbations are paraphrases by a language model (DIPPER, in its code with lexical diversity 40, 60 and 80
for weak, medium and strong). Here a word that a list of `words.py` has is replaced by another one of its class, so that
the caption is wrong in that word and grammatical; `LEVELS` is the share of the words of the lists that change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..common import processes
from ..common.errors import DiffpoError
from ..common.parts import Parts, file_key
from ..common.rng import generator
from ..common.text import plain
from ..evaluation.manifest import open_image
from . import words
from .rows import Row

Mode = Literal["captioner", "perturbed", "hybrid"]
Level = Literal["weak", "medium", "strong"]
LEVELS: dict[Level, float] = {"weak": 0.4, "medium": 0.6, "strong": 0.8}
FOLDER = ".captions"
WORD = re.compile(r"[A-Za-z]+")
AT_ONCE = 16  # pictures that are described before their captions are kept


@dataclass(frozen=True)
class Captions:
    """How captions are made. ``captioner``: a YAML file as of ``judge=FILE.yaml``; ``seed``: of the changed words."""

    mode: Mode
    captioner: str | None = None
    level: Level = "medium"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.mode == "perturbed") != (self.captioner is None):
            need = "needs --captioner FILE.yaml" if self.captioner is None else "asks no model: leave out --captioner"
            raise DiffpoError(f"--captions {self.mode} {need} (docs/label.md)")


def add(rows: Sequence[Row], captions: Captions, out: Path) -> tuple[list[Row], list[str]]:
    """The pairs with captions, and sentences on what is left out or unchanged. Descriptions are kept in ``out``, and
    made by all processes together."""
    gaps: list[str] = []
    said = {} if captions.captioner is None else _described(rows, captions.captioner, out)
    found: list[Row] = []
    silent = unchanged = 0
    texts = {*said.values(), *(row.prompt.prompt for row in rows)}
    vocabulary = frozenset(word.lower() for text in texts for word in WORD.findall(text))
    for number, row in enumerate(rows):
        own = {k: said.get(row.prompt.pictures[k].path, row.prompt.prompt) for k in row.members}
        if not all(own.values()):
            silent += 1
            continue
        if captions.mode != "captioner" and not row.tie:
            worse, draw = row.best_first[1], generator(captions.seed, "label captions", number)
            changed = perturbed(own[worse], captions.level, draw, vocabulary)
            unchanged += changed == own[worse]
            own[worse] = changed
        first, second = (own[k] for k in row.members)
        found.append(replace(row, captions=(first, second)))
    if silent:
        gaps.append(f"{silent} of {len(rows)} pairs are left out: the captioner said nothing of one of their pictures")
    if unchanged:
        gaps.append(f"{unchanged} of {len(rows)} captions have no word that the lists know, and stay as they are")
    if not found:
        raise DiffpoError(f"no pair has captions: {'; '.join(gaps)}")
    return found, gaps


def perturbed(caption: str, level: Level, draw: torch.Generator, vocabulary: Collection[str] = ()) -> str:
    """``caption`` with the share `LEVELS` of its known words, at least one, replaced by others of their class: by those
    of ``vocabulary`` (lower case) if there are any, so that a data set keeps to its own words."""
    places = [(found, _others(found[0], vocabulary)) for found in WORD.finditer(caption)]
    known = [(found, others) for found, others in places if others]
    order = torch.randperm(len(known), generator=draw).tolist()
    count = math.ceil(LEVELS[level] * len(known) - 1e-9)
    for place in sorted(order[:count], reverse=True):  # from the end, so that earlier places stay
        found, others = known[place]
        new = others[int(torch.randint(len(others), (), generator=draw))]
        new = new.capitalize() if found[0][0].isupper() else new
        caption = caption[: found.start()] + new + caption[found.end() :]
    return re.sub(r"\b([Aa])n? (?=([A-Za-z]))", lambda a: a[1] + ("n " if a[2] in "aeiouAEIOU" else " "), caption)


def _others(word: str, vocabulary: Collection[str]) -> tuple[str, ...]:
    """What may take the place of ``word``: of a plural, plurals."""
    lower = word.lower()
    found = words.of(lower)
    if not found and lower.endswith("s"):
        found = tuple(f"{other}s" for other in words.of(lower.removesuffix("s")))
    return tuple(other for other in found if other in vocabulary) or found


def _described(rows: Sequence[Row], settings: str, out: Path) -> dict[Path, str]:
    """What the captioner says of every picture, by its file; empty if it says nothing."""
    from ..scorers.vlm import VlmJudge

    ours, judge = processes.here(), VlmJudge.load(settings, "cpu")
    name = f"{judge.settings.url} {judge.settings.model} {judge.settings.caption}"
    pictures = {row.prompt.pictures[k].path: row.prompt.prompt for row in rows for k in row.members}
    keys = {path: file_key(path, prompt) for path, prompt in pictures.items()}
    kept = Parts(out / FOLDER, name, ours.rank)
    todo = [path for path in ours.share(list(pictures)) if keys[path] not in kept.rows]
    from tqdm.auto import tqdm

    with tqdm(total=len(todo), desc="describing", unit="image", delay=1, disable=not ours.main) as bar:
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            texts = judge.describe([open_image(path) for path in part], [pictures[path] for path in part])
            for path, text in zip(part, texts, strict=True):
                kept.add(keys[path], plain(text, 2000).strip())
            bar.update(len(part))
    ours.wait()
    known = Parts(out / FOLDER, name, ours.rank).rows
    return {path: str(known[key]) for path, key in keys.items()}
