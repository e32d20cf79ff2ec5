"""Sources of rows: files, folders, their splits, shards, and hub ids."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.images import URL, inside, named, passed_over, read_file
from ..common.text import plain
from ..config import Data
from . import files, tables, text_tables
from .stream import Stream

THREADS = min(16, os.cpu_count() or 1)
SUFFIXES = (".parquet", ".tar", *text_tables.TEXT)
METADATA = [f"metadata{suffix}" for suffix in (".jsonl", ".json", ".csv", ".tsv")]
SIDES = ("chosen", "rejected")
# words in the names of files and folders that say which split they are, as on the hub
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
DEPTH = 3  # levels of folders that are searched for splits: data/, train/
SAVED = ("dataset_info.json", "state.json")  # written by datasets.save_to_disk
SAVED_SPLITS = "dataset_dict.json"


@dataclass
class Source:
    """``rows``: a table, or a `datasets.Dataset`. ``roots``: resolved folders whose files rows may name. ``left``:
    lines of text that say what was not read."""

    rows: tables.RowSource
    roots: list[Path]
    left: list[str] = field(default_factory=list)


def open_source(source: str, split: str, data: Data, quiet: bool = True) -> Source:
    """The first ``data.limit`` rows of a source. DiffpoError if it cannot be read, or has no such split."""
    with reading(source):
        found = _open(source, split, data, quiet)
        rows: Any = found.rows
        if not isinstance(rows, Stream):  # which has no length, and applies the limit itself
            if {"prompt_id", *files.RANKED} <= set(rows.column_names):
                rows = files.ranked_by_prompt(rows)
            found.rows = rows if data.limit is None else rows.select(range(min(data.limit, len(rows))))
    return found


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns exceptions of libraries, from a missing split to a damaged file, into a DiffpoError about the source."""
    try:
        yield
    except DiffpoError:
        raise
    except Exception as caught:
        error: BaseException = caught
        while error.__cause__ is not None:
            error = error.__cause__
        where = ""
        if not Path(source).expanduser().exists():
            where = (
                f" (it was looked up on the hub, because there is no such folder in {Path.cwd()}. Check the name and "
                f"the network, or download it with `hf download --repo-type dataset {source}`)"
            )
        reason = plain(" ".join(str(error).split()), 300) or type(error).__name__
        if getattr(error, "errno", None) == errno.ENOSPC:  # `datasets` keeps a copy of each download
            reason = f"the disk of {_datasets_cache()} is full; choose another folder with HF_DATASETS_CACHE=FOLDER"
        elif (place := getattr(error, "filename", None)) and str(_datasets_cache()).startswith(str(place)):
            reason += "; `datasets` keeps its copies there: choose another folder with HF_DATASETS_CACHE=FOLDER"
        raise DiffpoError(f"cannot read the rows of {source}{where}: {reason}") from caught


def _datasets_cache() -> Path:
    """The cache of `datasets`, by the rule of its config: importing it for that would take half a second."""
    if "datasets" in sys.modules:
        return Path(sys.modules["datasets"].config.HF_DATASETS_CACHE)
    home = os.getenv("HF_HOME", os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.getenv("HF_DATASETS_CACHE", os.path.join(os.path.expanduser(home), "datasets")))


def _open(source: str, split: str, data: Data, quiet: bool) -> Source:
    if URL.match(source):
        raise DiffpoError(f"{source} is a URL; a data source is a file, a folder or a hub id. Download it first")
    path = Path(source).expanduser()
    further = [_folder(each) for each in data.roots]
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DiffpoError(
                f"{source} is not a .parquet, .json, .jsonl, .csv, .tsv or .tar file. Also possible are a folder of "
                ".parquet or .tar files, a folder with metadata.jsonl or with chosen/ and rejected/, a folder of "
                "datasets.save_to_disk, and a hub id"
            )
        found = FolderLayout(path.parent, files=[path.absolute()])
    elif path.is_dir():
        found = _in_folder(path, split, source, [path.resolve(), *_blobs(path), *further])
    elif path.exists():
        raise DiffpoError(f"{source} is neither a file nor a folder")
    elif source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in (*SUFFIXES, ".gz"):
        raise DiffpoError(f"{source} does not exist (relative paths start from {Path.cwd()})")
    else:
        return _hub(source, split, data, further, quiet)
    top = (path if path.is_dir() else path.parent).resolve()
    near = [found.folder.resolve(), top, *_blobs(path)]
    if found.files and not path.is_dir():
        near.insert(1, path.with_suffix("").resolve())  # HPDv2 has the images of train.json in train/
    allowed = [top, *_blobs(path), *further]
    roots = list(dict.fromkeys([*(each for each in near if inside(each, allowed)), *further]))
    rows, others = _rows(found, roots, data, quiet)
    if not len(rows):
        raise DiffpoError(f"{found.files[0] if len(found.files) == 1 else source} has no rows")
    left = [f"split       {found.split}; not read: {named(found.splits, 20)}"] if found.splits else []
    passed = [*found.passed, *others]
    return Source(rows, roots, left + [f"ignored     {passed_over(passed)}"] * bool(passed))


def _in_folder(path: Path, split: str, source: str, roots: Sequence[Path]) -> FolderLayout:
    """The layout of a folder that is a source. DiffpoError if nothing in it can be read."""
    links = sorted(each.name for each in os.scandir(path) if each.is_symlink() and not inside(path / each, roots))
    found = layout(path.resolve(), split, source, roots)
    if found is None:
        folders = sorted(each.name for each in os.scandir(path) if each.is_dir() and each.name not in links)
        raise DiffpoError(
            f"{source} has no metadata.jsonl, .parquet or .tar files, or folders chosen/ and rejected/. A folder data/ "
            "or folders named like splits do not have them either"
            + (f"; its folders are {named(folders)}" if folders else "")
            + (f"; links point outside it (allow them with data.roots=[FOLDER]): {named(links)}" if links else "")
        )
    found.passed += [f"{name} (points outside the folder)" for name in links]
    return found


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise DiffpoError(f"data.roots: {name} is not a folder; relative paths start from {Path.cwd()}")
    return path.resolve()


def _blobs(path: Path) -> list[Path]:
    """The folder that links in the hub's cache point to."""
    for folder in path.absolute().parents:
        if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
            return [(folder.parent / "blobs").resolve()]
    return []


# ---- layouts of folders


@dataclass
class FolderLayout:
    """``folder``: paths in rows are relative to it. ``files``: all of one suffix; empty if the folder has chosen/ and
    rejected/, or was saved by `datasets`. ``splits``: other splits. ``passed``: names of files that are not read."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    split: str = ""
    splits: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


def layout(
    folder: Path, split: str | None, source: str, roots: Sequence[Path], depth: int = DEPTH
) -> FolderLayout | None:
    """The files of ``split`` in ``folder``, in its folder data/ or in a folder named like the split; of all splits if
    ``split`` is None. None if there are no files of rows; DiffpoError if there are splits, but not this one."""
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if SAVED_SPLITS in names and split is not None:
        known = _json(folder / SAVED_SPLITS, roots).get("splits")
        known = [each for each in known if each in names] if isinstance(known, list) else []
        return _chosen({each: folder / each for each in known}, split, source, roots, depth)
    if set(SAVED) <= set(names):
        return FolderLayout(folder)
    here = [folder / name for name in names]
    if metadata := [folder / name for name in METADATA if name in names]:
        rest = [each.name for each in here if each.suffix.lower() in SUFFIXES and each != metadata[0]]
        return FolderLayout(folder, _safe(metadata[:1], roots, source), passed=rest)
    for kind in (".parquet", ".tar"):
        # a broken link is an error when it is read
        if found := [each for each in here if each.suffix.lower() == kind and (each.is_file() or each.is_symlink())]:
            rest = [each.name for each in here if each.suffix.lower() in SUFFIXES and each not in found]
            return _by_names(found, split, source, roots, depth, rest)
    if any((folder / side).is_dir() for side in SIDES):
        for side in SIDES:
            _safe([folder / side], roots, source)
        return FolderLayout(folder)
    if found := [each for each in here if each.suffix.lower() in text_tables.TEXT and split_of(each.name)]:
        rest = [each.name for each in here if each.suffix.lower() in SUFFIXES and each not in found]
        return _by_names(found, split, source, roots, depth, rest)
    if split is not None and (folders := _split_folders(here, split, source, roots, depth)):
        return _chosen(folders, split, source, roots, depth)
    inner = [each for each in here if each.is_dir() and inside(each, roots)]
    inner = [each for each in inner if each.name == "data"] or (inner if len(inner) == 1 else [])
    return layout(inner[0], split, source, roots, depth - 1) if inner and depth else None


def split_of(name: str) -> str | None:
    """The split in the name of a file, e.g. train-00000-of-00002.parquet, my_val.tar, dev.jsonl; None without one."""
    if found := re.match(r"(.+?)-\d{5}-of-\d{5}", name):
        return canonical(found[1])
    words = re.split(r"[-._ 0-9]+", name.rpartition(".")[0])
    return next((_SPLIT_OF[word.lower()] for word in words if word.lower() in _SPLIT_OF), None)


def canonical(split: str) -> str:
    """train, validation or test for the words of `SPLITS`; other names as they are."""
    return _SPLIT_OF.get(split.lower(), split)


def _split_folders(here: Sequence[Path], split: str, source: str, roots: Sequence[Path], depth: int) -> dict[str, Path]:
    """The folders named like splits that have rows."""
    known = [each for each in here if each.name.lower() in _SPLIT_OF or each.name == split]
    known = [each for each in known if depth and each.is_dir() and inside(each, roots)]
    return {each.name: each for each in known if _holds(each, source, roots, depth - 1)}


def _holds(folder: Path, source: str, roots: Sequence[Path], depth: int) -> bool:
    try:
        return layout(folder, None, source, roots, depth) is not None
    except DiffpoError:  # raised again when this split is read
        return True


def _by_names(
    found: Sequence[Path], split: str | None, source: str, roots: Sequence[Path], depth: int, rest: Sequence[str]
) -> FolderLayout:
    """The files of one folder whose names say that they are of the split; all of them if names do not say that."""
    folder = found[0].parent
    splits: dict[str, list[Path]] = {}
    for path in found:
        splits.setdefault(split_of(path.name) or "", []).append(path)
    unknown = not any(name in SPLITS or name == split for name in splits)
    if split is None or (unknown and len(splits) == 1):  # e.g. part-00000-of-00004
        return FolderLayout(folder, _safe(found, roots, source), passed=list(rest))
    nameless = [path.name for path in splits.pop("", [])]
    choices: dict[str, Any] = {**_split_folders(sorted(folder.iterdir()), split, source, roots, depth), **splits}
    chosen = _chosen(choices, split, source, roots, depth)
    chosen.passed += [*nameless, *rest]
    return chosen


def _chosen(choices: dict[str, Any], split: str, source: str, roots: Sequence[Path], depth: int) -> FolderLayout:
    """The chosen one of several splits, each a folder or a list of files."""
    mine = [name for name in choices if name == split] or [
        name for name in choices if canonical(name) == canonical(split)
    ]
    if not mine:
        raise DiffpoError(
            f"{source} has no split {split!r}; it has {named(sorted(choices), 20)}. Choose one with "
            "data.train_split=NAME or data.validation_split=NAME"
        )
    part = choices[mine[0]]
    found = layout(part, None, source, roots, depth - 1) if isinstance(part, Path) else None
    if found is None:
        if isinstance(part, Path):
            raise DiffpoError(f"{source}: the split {mine[0]!r} in {part} has no rows")
        found = FolderLayout(part[0].parent, _safe(part, roots, source))
    found.split = plain(mine[0], 100)
    for name, part in sorted(choices.items()):
        if name != mine[0]:
            what = "a folder" if isinstance(part, Path) else f"{len(part)} file{'s' * (len(part) != 1)}"
            found.splits.append(f"{plain(name, 100)} ({what})")
    return found


def _safe(paths: Sequence[Path], roots: Sequence[Path], source: str) -> list[Path]:
    for path in paths:
        if not inside(path, roots):
            raise DiffpoError(
                f"{source}: {plain(path.name, 200)} points outside the folder, to {plain(path.resolve(), 500)}. Allow "
                "that with data.roots=[FOLDER]"
            )
    return list(paths)


# ---- rows


def _rows(found: FolderLayout, roots: Sequence[Path], data: Data, quiet: bool) -> tuple[Any, list[str]]:
    """The table, and the names of other files in its folders and shards."""
    suffix = found.files[0].suffix.lower() if found.files else ""
    if suffix == ".parquet":
        return _parquet(found.files, data, quiet), []
    if data.streaming:
        raise DiffpoError(f"data.streaming is only for parquet files and hub ids; set it to false for {found.folder}")
    if not found.files:
        saved = (found.folder / SAVED[1]).is_file()
        return (_saved(found.folder, roots), []) if saved else files.siblings(found.folder, roots)
    if suffix == ".tar":
        return files.shards(found.files, quiet)
    parts = [text_tables.read_rows(read_file(path, text_tables.LIMIT), suffix, path.name) for path in found.files]
    names = list(dict.fromkeys(name for part in parts for name in part.column_names))
    return text_tables.TextTable([row for part in parts for row in part.rows], names), []


def _parquet(paths: Sequence[Path], data: Data, quiet: bool) -> tables.Parquet:
    if data.streaming:
        return tables.Parquet(paths, Path(data.cache).expanduser(), "data.cache", quiet)
    return tables.Parquet(paths, _datasets_cache() / "diffpo", "HF_DATASETS_CACHE", quiet)


def _saved(folder: Path, roots: Sequence[Path]) -> tables.Arrow:
    """A folder of `datasets.save_to_disk`, read without a copy."""
    state = _json(folder / SAVED[1], roots)
    names = state.get("_data_files")
    names = [each.get("filename") for each in names if isinstance(each, dict)] if isinstance(names, list) else [None]
    if state.get("_indices_files") or not all(isinstance(each, str) and Path(each).name == each for each in names):
        raise DiffpoError(f"{folder / SAVED[1]} does not list its files as datasets.save_to_disk does: save them again")
    found = [(path, tables.read_arrow(path)) for path in _safe([folder / name for name in names], roots, str(folder))]
    columns = list(dict.fromkeys(name for _, table in found for name in table.column_names))
    return tables.Arrow([(path, table.num_rows) for path, table in found], columns)


def _json(path: Path, roots: Sequence[Path]) -> dict:
    try:
        value = json.loads(read_file(_safe([path], roots, str(path.parent))[0], files.TEXT_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise DiffpoError(f"cannot read {path}: {plain(error, 200)}") from None
    if not isinstance(value, dict):
        raise DiffpoError(f"{path} was not written by datasets.save_to_disk: expected a JSON object")
    return value


def _hub(source: str, split: str, data: Data, further: list[Path], quiet: bool) -> Source:
    """A data set of the hub. Its rows may only name local files that were downloaded for it."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    limit_waiting()
    rows: Any
    if data.streaming:
        rows = Stream(source, split, data, quiet)
    else:
        rows = files.undecoded(files.unpacked(datasets.load_dataset(source, split=split)))
    fetched = Path(HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}"
    return Source(rows, [fetched.resolve(), Path(datasets.config.EXTRACTED_DATASETS_PATH).resolve(), *further])
