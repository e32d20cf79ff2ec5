"""What is compared: prompts and seeds, with the picture that each arm has for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.images import is_picture, named, passed_over
from ..common.text import plain, read_text, text_beside
from ..data.prompts import load_prompts
from .generation import ARMS
from .manifest import ARM, check_comparable, intact, read_manifest
from .sources import prompt_of


@dataclass(frozen=True)
class Item:
    """One prompt and seed, with the picture of every arm that has one.

    Attributes:
        index: number of the prompt. Items of one prompt are not independent.
        pictures: path by arm.
    """

    index: int
    seed: int
    prompt: str
    pictures: dict[str, Path]


@dataclass(frozen=True, order=True)
class Found:
    """A picture with its number and text."""

    index: int
    seed: int
    prompt: str
    path: Path


def in_folder(folder: Path) -> dict[str, Path]:
    """The arms in a folder of `diffpo generate`, or of images/ARM folders: base and tuned first, others by name."""
    if not folder.is_dir():
        raise DiffpoError(f"there is no folder {folder} with images to compare")
    if rows := _manifest(folder):
        names = {row["arm"] for row in rows}
    else:
        names = {each.name for each in folder.glob("images/*") if each.is_dir() and not each.name.startswith(".")}
    if wrong := sorted(name for name in names if not ARM.fullmatch(name)):
        raise DiffpoError(f"{folder}/images/{wrong[0]}: name the folder of an arm with letters, digits, '.', '_', '-'")
    if not names:
        raise DiffpoError(f"{folder} holds no images: put them into images/base and images/tuned")
    first = [name for name in ARMS if name in names]
    return {name: folder / "images" / name for name in [*first, *sorted(names - {*first})]}


def of_folder(folder: Path, texts: Sequence[str] | None, gaps: list[str]) -> list[Found]:
    """The pictures of one arm in a folder. A manifest.jsonl gives their texts, also that of the folder whose images/ARM
    this is; else a file's name gives the number of its text among ``texts``, ``<prompt index>_<seed>``, or a text file
    of the same name is beside it. What cannot be used is left out; sentences that count and name it go into ``gaps``.

    Raises DiffpoError that names the folder, if nothing is left, or two files that are the same prompt and seed.
    """
    if not folder.is_dir():
        raise DiffpoError(f"there is no folder {folder} with images to compare")
    for home in (folder, folder.parent.parent):
        if rows := _manifest(home):
            names = sorted({row["arm"] for row in rows})
            if home != folder:
                rows = [row for row in rows if row["arm"] == folder.name]
            elif len(names) > 1:
                raise DiffpoError(f"{folder} holds the arms {', '.join(names)}; name one: {folder}/images/{names[0]}")
            if rows:
                rows = [row | {"prompt": prompt_of(home, row)} for row in rows]
                wanted = {*texts} if texts is not None else {row["prompt"] for row in rows}
                if strange := [row["prompt"] for row in rows if row["prompt"] not in wanted]:
                    example = plain(strange[0], 60)
                    gaps.append(f"{folder}: {len(strange)} pictures of other prompts are left out, such as {example!r}")
                rows = [row for row in rows if row["prompt"] in wanted]
                check_comparable(home, rows)
                return of_rows(home, _intact(home, rows, folder, gaps))
    return _unlisted(folder, texts, gaps)


def _manifest(home: Path) -> list[dict]:
    """The rows of a folder's manifest.jsonl, read once for all its arms; none if there is no such file."""
    try:
        about = (home / "manifest.jsonl").stat()
    except OSError:
        return []
    return _rows_of(home, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=2)
def _rows_of(home: Path, *_state: int) -> list[dict]:
    return read_manifest(home)


def _intact(home: Path, rows: list[dict], folder: Path, gaps: list[str]) -> list[dict]:
    """The rows whose pictures are there, and as the manifest says; DiffpoError if there are none."""
    good: list[dict] = []
    bad: list[dict] = []
    for row in rows:
        there = intact(home, row) if "sha256" in row else (home / row["file"]).is_file()
        (good if there else bad).append(row)
    if bad:
        names = named([row["file"] for row in bad])
        gaps.append(
            f"{folder}: {len(bad)} pictures are missing, or are not those that manifest.jsonl describes: {names}. They "
            "are left out; the same `diffpo generate` makes them again"
        )
    if bad and not good:
        raise DiffpoError(gaps[-1])
    return good


def of_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> list[Found]:
    return [Found(row["index"], row["seed"], prompt_of(folder, row), folder / row["file"]) for row in rows]


def settings_rows(folder: Path, arm: str) -> list[dict[str, Any]]:
    """What is known of how the pictures in ``folder`` were made, as rows of a manifest in which the arm has the name
    ``arm``; without a manifest one row that names the folder."""
    found: list[dict[str, Any]] = []
    for home in (folder, folder.parent.parent):
        rows = _manifest(home)
        found = found or [row for row in rows if home == folder or row["arm"] == folder.name]
    return [row | {"arm": arm, "folder": str(folder)} for row in found or [{}]]


def _unlisted(folder: Path, texts: Sequence[str] | None, gaps: list[str]) -> list[Found]:
    found: dict[tuple[int, int], Found] = {}
    beside: list[Found] = []
    others: list[str] = []
    unused: dict[str, list[str]] = {}  # pictures by the reason
    captions: dict[str, int] = {}
    files = sorted(each for each in folder.iterdir() if not each.is_dir())
    stems = {each.stem for each in files if is_picture(each.name)}
    for path in files:
        text, digits = text_beside(path), re.fullmatch(r"([0-9]{1,9})(?:_([0-9]{1,18}))?", path.stem)
        if path.name.startswith(".") or not is_picture(path.name):
            if path.suffix.lower() != ".txt" or path.stem not in stems:
                others.append(path.name)
        elif text.is_file():
            try:
                prompt = " ".join(read_text(text).split())
            except (OSError, ValueError) as error:
                unused.setdefault(f"their texts cannot be read ({plain(error, 100)})", []).append(path.name)
                continue
            captions[prompt] = captions.get(prompt, -1) + 1
            beside.append(Found(len(beside), captions[prompt], prompt, path))
        elif not digits:
            why = "they have no text: name them <prompt index>_<seed>.png, or write NAME.txt beside NAME.png"
            unused.setdefault(why, []).append(path.name)
        elif texts is None:
            why = "there is no manifest.jsonl with their texts: give these with --prompts"
            unused.setdefault(why, []).append(path.name)
        elif int(digits[1]) >= len(texts):
            why = f"there are only {len(texts)} prompts, counted from 0: give all of them with --prompts"
            unused.setdefault(why, []).append(path.name)
        else:
            index, seed = int(digits[1]), int(digits[2] or 0)
            twin = found.setdefault((index, seed), Found(index, seed, texts[index], path)).path
            if twin != path:
                raise DiffpoError(f"{twin} and {path} are the same prompt and seed; delete one of them")
    if others:
        gaps.append(f"{folder}: passed over {passed_over(others)}")
    sentences = [
        f"{folder}: {len(names)} pictures are left out ({named(names)}), {why}" for why, names in unused.items()
    ]
    if not found and not beside:
        raise DiffpoError(sentences[0] if sentences else f"{folder} holds no images")
    gaps += sentences
    return [*found.values(), *beside]


def joined(
    arms: Mapping[str, Sequence[Found]], texts: Sequence[str] | None, n: int | None, gaps: list[str]
) -> list[Item]:
    """The items of which at least two arms have a picture, of the first ``n`` prompts. Arms are matched by the text and
    the seed; sentences on how many pictures an arm lacks go into ``gaps``.

    ``texts``: give the prompts' numbers; None: the arms do, the first one's before all. An arm that has nothing in
    common with the first is left out; DiffpoError if no other one has.
    """
    numbers: dict[tuple[str, int], int] = {}  # of a text, and which of several equal ones it is
    counts: dict[str, int] = {}
    for index, text in enumerate(texts or ()):
        numbers[text, counts.get(text, 0)] = index
        counts[text] = counts.get(text, 0) + 1
    tables = {name: _by_text(found) for name, found in arms.items()}
    items: dict[tuple[int, int], Item] = {}
    used, after = {*numbers.values()}, max((each.index for found in arms.values() for each in found), default=0) + 1
    for name, table in tables.items():
        for (text, which, seed), each in table.items():
            if (text, which) not in numbers:
                if each.index in used:
                    after += 1
                numbers[text, which] = after if each.index in used else each.index
                used.add(numbers[text, which])
            index = numbers[text, which]
            items.setdefault((index, seed), Item(index, seed, text, {})).pictures[name] = each.path
    kept = [items[key] for key in sorted(items) if n is None or key[0] < n]
    first, *others = arms
    apart = [name for name in others if not any({first, name} <= item.pictures.keys() for item in kept)]
    for name in apart:
        example = next((f", such as {plain(each.prompt, 100)!r} with seed {each.seed}" for each in arms[name]), "")
        gaps.append(
            f"the arms {first} and {name} have no prompt and seed in common: those of {name}{example} cannot be "
            f"compared. Make both from the same prompts and seeds"
        )
    if len(apart) == len(others):
        raise DiffpoError(gaps[-len(apart)])
    for item in kept:
        for name in apart:
            item.pictures.pop(name, None)
    kept = [item for item in kept if item.pictures]
    for name in arms:
        lacking = [item for item in kept if name not in item.pictures]
        if lacking and name not in apart:
            example = f"prompt {lacking[0].index}, seed {lacking[0].seed}, {plain(lacking[0].prompt, 60)!r}"
            gaps.append(
                f"the arm {name} lacks {len(lacking)} of {len(kept)} prompts and seeds ({example}); they are left out"
            )
    return [item for item in kept if len(item.pictures) > 1]


def _by_text(found: Sequence[Found]) -> dict[tuple[str, int, int], Found]:
    """By text, which of several equal texts, and seed."""
    which: dict[str, dict[int, int]] = {}
    for each in sorted(found):
        own = which.setdefault(each.prompt, {})
        own.setdefault(each.index, len(own))
    return {(each.prompt, which[each.prompt][each.index], each.seed): each for each in sorted(found)}


def prompts_of(prompts: Any) -> list[str] | None:
    return None if prompts is None else load_prompts(prompts)
