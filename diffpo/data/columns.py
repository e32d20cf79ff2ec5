"""The roles of a source's columns, and so whether it has pairs, ranked lists or single images."""

from __future__ import annotations

from typing import Any, Literal

from ..common.errors import DiffpoError
from ..common.images import BadRow, ShardMember
from ..common.text import plain
from ..config import Columns

Kind = Literal["pair", "list", "single"]
NOUN = {"pair": "pairs", "list": "ranked lists", "single": "single images"}

# the first name that the source has is used: those of Pick-a-Pic, `datasets`, TRL and public data sets
USUAL_NAMES = {
    "caption": ("caption", "prompt"),
    "caption_chosen": ("caption_chosen",),
    "caption_rejected": ("caption_rejected",),
    "caption_0": ("caption_0",),
    "caption_1": ("caption_1",),
    "chosen": ("chosen", "chosen_file_name", "path1"),  # path1, path2: HPDv3
    "rejected": ("rejected", "rejected_file_name", "path2"),
    "image_0": ("jpg_0", "image_0"),
    "image_1": ("jpg_1", "image_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "has_label": ("has_label",),
    "score_0": ("score_0", "ps_score_0"),  # ps_: SmPO's Pick-a-Pic with PickScores
    "score_1": ("score_1", "ps_score_1"),
    "images": ("images", "image_path", "file_path", "generations"),  # HPDv2's test and train files, ImageReward
    "scores": ("scores", "human_preference"),
    "ranks": ("ranks", "rank", "ranking"),
    "image": ("image", "file_name"),
    "liked": ("liked", "label"),
    # only if the config names them: many sources have a user column, few objectives use it
    "mask": (),
    "source": (),
    "t_low": (),
    "t_high": (),
    "user": (),
}
LABELLED = ("image_0", "image_1", "label_0", "label_1", "has_label")
ORDERED = ("chosen", "rejected")
DUAL = ("caption_chosen", "caption_rejected")
OWN = ("caption_0", "caption_1")
SCORES = ("score_0", "score_1")
FURTHER = ("mask", "source", "t_low", "t_high", "user")
ROLES: dict[Kind, tuple[str, ...]] = {
    "pair": ("caption", *DUAL, *OWN, *LABELLED, *ORDERED, *SCORES, *FURTHER),
    "list": ("caption", "images", "scores", "ranks", *FURTHER),
    "single": ("caption", "image", "liked", *FURTHER),
}


def find_columns(source: str, names: list[str], given: Columns) -> tuple[Kind, Columns]:
    """The kind of the source's rows, and its columns: those of the config, the others by their usual names.

    Where columns say the same thing twice, one is dropped: columns named in the config win, then labels over
    chosen/rejected, one caption over one per image, scores over ranks. DiffpoError names the missing columns and those
    that exist.
    """
    there = plain(", ".join(names), 2000)
    found: dict[str, str | None] = {}
    for role, usual in USUAL_NAMES.items():
        wanted = getattr(given, role)
        if wanted is not None and wanted not in names:
            raise DiffpoError(f"{source} has no column {wanted!r} (data.columns.{role}); it has: {there}")
        found[role] = wanted or next((name for name in usual if name in names), None)
    named = {role for role in USUAL_NAMES if getattr(given, role)}
    kind = _kind(found, named)
    if foreign := sorted(named - set(ROLES[kind])):
        raise DiffpoError(f"{source} has {NOUN[kind]}, which do not use data.columns.{foreign[0]}: remove that setting")
    columns = {role: found[role] for role in ROLES[kind]}
    needed = _pair_columns(columns, named) if kind == "pair" else _other_columns(kind, columns, named)
    missing = [role for role in needed if columns[role] is None]
    if missing:
        raise DiffpoError(
            f"{source} has no column for {', '.join(missing)}; it has: {there}. Pairs need caption, jpg_0, jpg_1, "
            "label_0 or prompt, chosen, rejected. Ranked lists need prompt, images and scores or ranks. Single images "
            f"need prompt, image, liked. Set other names in the config, e.g. data.columns.{missing[0]}=NAME"
        )
    for column in (f"{name}_{i}" for name in given.rewards for i in "01"):
        if kind != "pair" or column not in names:
            what = f"has no column {column!r}" if kind == "pair" else f"has {NOUN[kind]}, which have no rewards"
            raise DiffpoError(f"{source} {what} (data.columns.rewards); it has: {there}")
    return kind, Columns(**columns, rewards=given.rewards)


def read_columns(columns: Columns) -> list[str]:
    """The names of all columns that are read."""
    single = [name for name in columns.model_dump(exclude={"rewards"}).values() if name]
    return [*single, *(f"{name}_{i}" for name in columns.rewards for i in "01")]


def serves(source: str, holds: Kind, want: Kind, ties: str) -> Kind:
    """The kind of the groups to make. DiffpoError if rows of the kind ``holds`` cannot become the kind ``want``."""
    if holds == "pair":
        if want == "list" and ties == "soft":
            raise DiffpoError(
                f"{source} has pairs, which a list objective uses as ordered lists of two, without probabilities. Set "
                "data.ties=drop"
            )
        return "pair"
    if holds == "list" and want in ("list", "pair"):
        return want
    if holds == "list":
        raise DiffpoError(
            f"{source} has ranked lists, but the objective needs single images with a like or dislike, and a rank only "
            "compares images. Use pairs, or images with a column of likes (data.columns.liked=NAME)"
        )
    if want != "single":
        raise DiffpoError(
            f"{source} has single images with likes, but the objective needs {NOUN[want]}. Use an objective for single "
            "images, such as kto, or data with pairs"
        )
    return "single"


def image_columns(kind: Kind, columns: Columns) -> list[str]:
    """The columns of a row's images, in the order of its labels; one column for a list."""
    pair = (columns.image_0, columns.image_1) if columns.label_0 else (columns.chosen, columns.rejected)
    names = {"list": (columns.images,), "single": (columns.image,), "pair": pair}[kind]
    return [name for name in names if name is not None]  # `find_columns` has found them


def image_cells(row: dict[str, Any], kind: Kind, columns: Columns) -> list[Any]:
    """The images of a row as they are stored, in the order of `image_columns` or of the list."""
    cells = [row[name] for name in image_columns(kind, columns)]
    if kind != "list":
        return cells
    if cells[0] is not None and not isinstance(cells[0], list):
        raise BadRow("the images are not a list", repr(cells[0])[:100])
    return cells[0] or []


def source_cells(cell: Any, column: str) -> list[Any]:
    """The pictures that a row's images are edits of, as they are stored: one, or a list. BadRow if there are none."""
    cells = cell if isinstance(cell, list) else [cell]
    if not cells or None in cells:
        raise BadRow("no picture that the images are edits of", "", column)
    return cells


def image_names(row: dict[str, Any], kind: Kind, columns: Columns) -> list[str]:
    """The names of a row's images in messages: their files, or else their columns."""
    names = image_columns(kind, columns)
    cells = image_cells(row, kind, columns)
    own = [f"{names[0]}[{number}]" for number in range(len(cells))] if kind == "list" else names
    return [_file(cell) or name for cell, name in zip(cells, own, strict=True)]


def first_file(row: dict[str, Any], kind: Kind, columns: Columns) -> str:
    """The file of the row's first image; empty if images are not in files."""
    cells = [row[name] for name in image_columns(kind, columns)]
    return _file(cells[0][0] if kind == "list" and isinstance(cells[0], list) and cells[0] else cells[0])


def _file(cell: Any) -> str:
    if isinstance(cell, dict) and not cell.get("bytes"):
        cell = cell.get("path")
    return str(cell) if isinstance(cell, (str, ShardMember)) else ""


def _kind(found: dict[str, str | None], named: set[str]) -> Kind:
    def has(*roles: str) -> bool:
        return all(found[role] for role in roles)

    if named & {"images", "scores", "ranks"}:
        return "list"
    if named & {"image", "liked"}:
        return "single"
    if named & {*LABELLED, *ORDERED, *DUAL, *OWN, *SCORES} or has(*LABELLED[:3]) or has(*ORDERED):
        return "pair"
    if has("images") and (has("scores") or has("ranks")):
        return "list"
    return "single" if has("image", "liked") else "pair"


def _pair_columns(columns: dict[str, str | None], named: set[str]) -> list[str]:
    """Drop the columns that are not used; return the roles that a pair needs."""
    labelled = all(columns[role] for role in LABELLED[:3]) and not named & set(ORDERED)
    for role in ORDERED if labelled else LABELLED:
        columns[role] = None
    texts = _captions(columns, named)
    for role in {"caption", *DUAL, *OWN} - {*texts}:
        columns[role] = None
    if not named & set(SCORES) and None in (columns["score_0"], columns["score_1"]):
        columns.update(score_0=None, score_1=None)
    scored = SCORES if columns["score_0"] or columns["score_1"] else ()
    return [*texts, *(LABELLED[:3] if labelled else ORDERED), *scored]


def _captions(columns: dict[str, str | None], named: set[str]) -> tuple[str, ...]:
    """The roles of a pair's captions: one for both images or one for each. Named columns win, then one for both."""
    for roles in (DUAL, OWN):
        if named & {*roles} or (columns["caption"] is None and any(columns[role] for role in roles)):
            return roles
    return ("caption",)


def _other_columns(kind: Kind, columns: dict[str, str | None], named: set[str]) -> list[str]:
    """The same for single images and for lists."""
    if kind == "single":
        return ["caption", "image", "liked"]
    if {"scores", "ranks"} <= named:
        raise DiffpoError("data.columns.scores and data.columns.ranks both order a list: set only one of them")
    unused = "scores" if "ranks" in named else "ranks"
    if columns["scores" if unused == "ranks" else "ranks"]:
        columns[unused] = None
    return ["caption", "images", "ranks" if columns["ranks"] else "scores"]
