"""Where rows come from, and how their images are read: files, folders, shards, or a hub id."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..config import Data
from ..errors import DiffpoError
from ..hub import limit_waiting
from . import files

THREADS = min(16, os.cpu_count() or 1)
SUFFIXES = (".parquet", ".json", ".jsonl", ".tar")


class BadRow(Exception):
    """Why one row cannot be used: a short reason, the same words for the same fault so that faults can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def open_source(source: str, split: str, data: Data, quiet: bool = True) -> tuple[Any, tuple[Path, ...]]:
    """The first ``data.limit`` rows of the source as a `datasets.Dataset`, and the folders in which relative paths of
    images are looked up."""
    import datasets

    path = Path(source).expanduser()
    try:
        if data.streaming:
            from .stream import copied

            dataset, roots = copied(source, path, split, data, quiet), (path.parent if path.is_file() else path,)
        else:
            dataset, roots = _open(source, path, split)
        if {"prompt_id", *files.RANKED} <= set(dataset.column_names):
            dataset = files.ranked_by_prompt(dataset)
        return dataset if data.limit is None else dataset.select(range(min(data.limit, len(dataset)))), roots
    except DiffpoError:
        raise
    except Exception as error:  # `datasets` wraps everything from a missing split to a torn file in its own kinds
        while error.__cause__ is not None:
            error = error.__cause__
        where = ""
        if not path.exists():
            where = (
                f" (there is no such folder in {Path.cwd()}, so it was looked up on the hub: is it spelt right, and is "
                f"there a network? `hf download --repo-type dataset {source}` fetches it once)"
            )
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if getattr(error, "errno", None) == errno.ENOSPC:  # `datasets` keeps a copy
            reason = (
                f"the disk of {datasets.config.HF_DATASETS_CACHE} is full (HF_DATASETS_CACHE=FOLDER chooses another)"
            )
        elif str(datasets.config.HF_DATASETS_CACHE).startswith(str(getattr(error, "filename", None) or "?")):
            reason += "; `datasets` keeps a copy there (HF_DATASETS_CACHE=FOLDER chooses another)"
        raise DiffpoError(f"cannot read the rows of {source}{where}: {reason}") from error


def _open(source: str, path: Path, split: str) -> tuple[Any, tuple[Path, ...]]:
    import datasets
    import pyarrow.parquet

    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DiffpoError(
                f"{source} is not a parquet file, nor .json, .jsonl or .tar; data sources are those, folders of "
                f"parquet or .tar files, a folder with metadata.jsonl or with chosen/ and rejected/, or a hub id"
            )
        found = {path.suffix: [path]}
    else:
        found = {suffix: sorted(path.glob(f"*{suffix}")) for suffix in (".parquet", ".tar")}
        if (path / "metadata.jsonl").is_file():
            found = {".jsonl": [path / "metadata.jsonl"]}
    root = path.parent if path.is_file() else path
    for suffix in (".json", ".jsonl"):
        for file in found.get(suffix, ()):
            if not file.stat().st_size:
                raise DiffpoError(f"{file} has no rows")
            # HPDv2 keeps the images of train.json in train/
            return _load_local("json", [file]), (root, file.with_suffix(""))
    if found.get(".parquet"):
        # `datasets` stumbles over a file without rows
        full = [p for p in found[".parquet"] if pyarrow.parquet.read_metadata(p).num_rows]
        if not full:
            raise DiffpoError(f"{source} has no rows")
        return _load_local("parquet", full), (root,)
    if found.get(".tar"):
        return files.shards(found[".tar"]), (root,)
    if (path / "chosen").is_dir() or (path / "rejected").is_dir():
        return files.siblings(path), (path,)
    if path.exists():
        raise DiffpoError(
            f"{source} holds neither metadata.jsonl nor parquet files, no .tar files and no folders chosen/ and "
            "rejected/"
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in (*SUFFIXES, ".csv", ".gz"):
        raise DiffpoError(f"{source} does not exist: no such file or folder (relative paths start from {Path.cwd()})")
    limit_waiting()
    return files.unpacked(datasets.load_dataset(source, split=split)), (Path.cwd(),)


def _load_local(kind: str, files: list[Path]) -> Any:
    """`datasets.load_dataset`, with its progress bar only where there is enough to wait for."""
    import datasets

    small = sum(file.stat().st_size for file in files) < 2**30 and not datasets.are_progress_bars_disabled()
    if small:
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
    finally:
        if small:
            datasets.enable_progress_bars()


def undecoded(dataset: Any, image_columns: list[str]) -> Any:
    """The data set with its images as bytes: they are wanted for their hash, and bad ones are to be met by `decode`."""
    import datasets

    for name in image_columns:
        feature, raw = dataset.features[name], datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of images
            dataset = dataset.cast_column(name, type(feature)(raw))
    return dataset


def content(value: Any, roots: tuple[Path, ...]) -> bytes:
    """The encoded bytes of an image cell: bytes, `datasets`' {bytes, path}, a path relative to one of ``roots``, or a
    place in a shard (files.shards)."""
    if isinstance(value, dict) and value.get("size") is not None:
        try:
            return files.member(value)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:  # also of a place that is none
            raise BadRow("unreadable image", f"{str(value.get('path'))[:200]}: {error}") from None
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        try:
            there = [root / value for root in roots if (root / value).is_file()]
            return (there or [roots[0] / value])[0].read_bytes()
        except OSError as error:
            raise BadRow("unreadable image", f"{value[:200]}: {error.strerror}") from None
        except ValueError as error:  # a NUL in the name
            raise BadRow("unreadable image", f"{value[:200]!r}: {error}") from None
    if not isinstance(value, bytes) or not value:
        raise BadRow("missing image")
    return value


def decode(encoded: bytes) -> Image.Image:
    """RGB, upright, 8 bits; BadRow if the bytes are no whole image."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image = ImageOps.exif_transpose(image)  # decodes in full, so a truncated file shows here
            if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them to 8
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # as Pillow asks for with a warning
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to: struct.error, KeyError, ...
        text = str(error) if "BytesIO" not in str(error) else "not an image"
        raise BadRow("unreadable image", text) from None
