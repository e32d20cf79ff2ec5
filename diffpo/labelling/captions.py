"""A caption for each picture of a pair, for dual-caption training (DCPO, Saeidi et al. 2025, arXiv 2502.06023).

captioner  DCPO-c: a vision-language model describes both pictures.
perturbed  DCPO-p: the better picture has the prompt, the worse one the prompt with other words.
hybrid     DCPO-h: both are described, and the words of the worse one's caption are changed.

"Other words" are of two kinds. The paper's are paraphrases by a language model (DIPPER, in its code with lexical
diversity 40, 60 and 80 for weak, medium and strong): with a ``paraphraser`` a model behind chat completions is asked
for them. Without one, a word that a list of `words.py` has is replaced by another one of its class, so that the caption
is wrong in that word and grammatical. `LEVELS` is the share of the words that change, of all or of those of the lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

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
AT_ONCE = 16  # questions before their answers are kept
T = TypeVar("T")


@dataclass(frozen=True)
class Captions:
    """How captions are made. ``captioner``, ``paraphraser``: YAML files as of ``judge=FILE.yaml``; without the second
    words are changed by lists. ``seed``: of these."""

    mode: Mode
    captioner: str | None = None
    level: Level = "medium"
    seed: int = 0
    paraphraser: str | None = None

    def __post_init__(self) -> None:
        if (self.mode == "perturbed") != (self.captioner is None):
            need = "needs --captioner FILE.yaml" if self.captioner is None else "asks no model: leave out --captioner"
            raise DiffpoError(f"--captions {self.mode} {need} (docs/label.md)")
        if self.mode == "captioner" and self.paraphraser is not None:
            raise DiffpoError("--captions captioner changes no words: leave out --paraphraser, or use hybrid")


def add(rows: Sequence[Row], captions: Captions, out: Path) -> tuple[list[Row], list[str]]:
    """The pairs with captions, and sentences on what is left out or unchanged. What models answer is kept in ``out``,
    and all processes ask together."""
    said = {} if captions.captioner is None else _described(rows, captions.captioner, out)
    own = [{k: said.get(row.prompt.pictures[k].path, row.prompt.prompt) for k in row.members} for row in rows]
    gaps: list[str] = []
    described = [k for k, texts in enumerate(own) if all(texts.values())]
    if len(described) < len(rows):
        left = len(rows) - len(described)
        gaps.append(f"{left} of {len(rows)} pairs are left out: the captioner said nothing of one of their pictures")
    kept = described
    if captions.mode != "captioner":
        turned = {k: rows[k].best_first[1] for k in described if not rows[k].tie}  # the worse picture of each pair
        before = {k: own[k][worse] for k, worse in turned.items()}
        after = _other_words(rows, before, captions, [*said.values()], out)
        for k, worse in turned.items():
            own[k][worse] = after[k]
        kept = [k for k in described if k not in turned or after[k]]
        if len(kept) < len(described):
            left = len(described) - len(kept)
            gaps.append(f"{left} of {len(rows)} pairs are left out: the paraphraser said nothing of a caption")
        if unchanged := sum(after[k] == text for k, text in before.items()):
            why = "have no word that the lists know" if captions.paraphraser is None else "came back from the model"
            gaps.append(f"{unchanged} of {len(rows)} captions {why}, and stay as they are")
    if not kept:
        raise DiffpoError(f"no pair has captions: {'; '.join(gaps)}")
    found = []
    for k in kept:
        first, second = (own[k][member] for member in rows[k].members)
        found.append(replace(rows[k], captions=(first, second)))
    return found, gaps


def _other_words(
    rows: Sequence[Row], before: Mapping[int, str], captions: Captions, said: Sequence[str], out: Path
) -> dict[int, str]:
    """The captions ``before`` (by the number of their pair) in other words; empty where a model says nothing."""
    if captions.paraphraser is not None:
        texts = _paraphrased(list(dict.fromkeys(before.values())), captions.paraphraser, LEVELS[captions.level], out)
        return {k: texts[text] for k, text in before.items()}
    texts_here = {*said, *(row.prompt.prompt for row in rows)}
    vocabulary = frozenset(word.lower() for text in texts_here for word in WORD.findall(text))
    return {
        k: perturbed(text, captions.level, generator(captions.seed, "label captions", k), vocabulary)
        for k, text in before.items()
    }


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

    judge = VlmJudge.load(settings, "cpu")
    pictures = {row.prompt.pictures[k].path: row.prompt.prompt for row in rows for k in row.members}
    keys = {file_key(path, prompt): path for path, prompt in pictures.items()}

    def ask(part: list[Path]) -> list[str]:
        return judge.describe([open_image(path) for path in part], [pictures[path] for path in part])

    name = f"{judge.settings.url} {judge.settings.model} {judge.settings.caption}"
    found = _answered(name, keys, ask, out)
    return {path: found[key] for key, path in keys.items()}


def _paraphrased(texts: Sequence[str], settings: str, share: float, out: Path) -> dict[str, str]:
    """The paraphraser's other words for each of ``texts``."""
    from ..scorers.vlm import VlmJudge

    judge = VlmJudge.load(settings, "cpu")
    name = f"{judge.settings.url} {judge.settings.model} {judge.settings.paraphrase} {share}"
    return _answered(name, {text: text for text in texts}, lambda part: judge.paraphrase(part, share), out)


def _answered(name: str, items: Mapping[str, T], ask: Callable[[list[T]], list[str]], out: Path) -> dict[str, str]:
    """What a model answers to each of ``items``, by its key. Answers are kept in ``out`` under ``name``; each process
    asks for a share."""
    from tqdm.auto import tqdm

    ours = processes.here()
    kept = Parts(out / FOLDER, name, ours.rank)
    todo = [key for key in ours.share(list(items)) if key not in kept.rows]
    with tqdm(total=len(todo), desc="captions", unit="caption", delay=1, disable=not ours.main) as bar:
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            for key, text in zip(part, ask([items[key] for key in part]), strict=True):
                kept.add(key, plain(text, 2000).strip())
            bar.update(len(part))
    ours.wait()
    known = Parts(out / FOLDER, name, ours.rank).rows
    return {key: str(known[key]) for key in items}
