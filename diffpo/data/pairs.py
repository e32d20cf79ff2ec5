"""Rows -> pairs: which columns hold what, ties, and a look at every row before training starts."""

from __future__ import annotations

import errno
import io
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..config import Columns, Data
from ..errors import DiffpoError

# the first name that the source has is taken; Pick-a-Pic's, `datasets`' and TRL's
USUAL_NAMES = {
    "caption": ("caption", "prompt"),
    "chosen": ("chosen", "chosen_file_name"),
    "rejected": ("rejected", "rejected_file_name"),
    "image_0": ("jpg_0", "image_0"),
    "image_1": ("jpg_1", "image_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
}
THREADS = min(16, os.cpu_count() or 1)


class BadRow(Exception):
    """Why one row cannot be used: a short reason, the same words for the same fault so that faults can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Pair:
    row: int  # in the source
    caption: str
    size: tuple[int, int]  # width, height of both images as stored
    preference: float  # probability that `chosen` is the better one: 1 for hard labels, 0.5 for a tie
    swapped: bool  # the chosen image is the second one
    digest: str  # of caption, preference and the bytes of both images


@dataclass
class Pairs:
    """The usable pairs of one source, and the account of the others."""

    source: str
    dataset: Any
    columns: Columns
    root: Path
    pairs: list[Pair] = field(default_factory=list)
    rows: int = 0  # rows looked at
    total: int = 0  # rows there are
    ties: int = 0
    bad: list[tuple[int, BadRow]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def data_hash(self) -> str:
        digest = blake2b(digest_size=16)
        for pair in self.pairs:
            digest.update(pair.digest.encode())
        return digest.hexdigest()

    @property
    def bad_reasons(self) -> Counter:
        return Counter(problem.reason for _, problem in self.bad)

    def images(self, index: int) -> tuple[Image.Image, Image.Image]:
        """(chosen, rejected) of pair ``index``, RGB."""
        pair = self.pairs[index]
        row = self.dataset[pair.row]
        try:
            first, second = (_decode(_content(row[name], self.root)) for name in _image_columns(self.columns))
        except BadRow as problem:
            raise DiffpoError(
                f"{self.source}: row {pair.row} could be read at the start of the run and now it cannot: {problem}"
            ) from None
        return (second, first) if pair.swapped else (first, second)

    def describe_bad(self) -> str:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.bad_reasons.most_common())
        row, problem = self.bad[0]
        return f"{len(self.bad)} of {self.rows} rows cannot be used ({reasons}); the first is row {row}: {problem}"


def load_pairs(data: Data, source: str, split: str, quiet: bool = True) -> Pairs:
    """All usable pairs of a source. Raises DiffpoError: unreadable source, bad rows (unless skipped), nothing to
    learn."""
    pairs = scan(data, source, split, quiet=quiet)
    if pairs.bad and data.bad_rows == "error":
        raise DiffpoError(f"{source}: {pairs.describe_bad()}. Mend them, or leave them out with data.bad_rows=skip")
    if all(pair.preference == 0.5 for pair in pairs.pairs):
        if pairs.ties:
            raise DiffpoError(
                f"{source}: all {pairs.ties} usable pairs are ties (label_0 == 0.5), so there is nothing to learn from"
            )
        what = pairs.describe_bad() if pairs.bad else "it has no rows"
        raise DiffpoError(f"{source}: no usable pair: {what}")
    return pairs


def scan(data: Data, source: str, split: str, limit: int | None = None, quiet: bool = True) -> Pairs:
    """Look at every row (or at ``limit`` evenly spaced ones): decode both images, check caption, labels and sizes.

    Bad rows are collected in ``bad`` and never raise; DiffpoError is for a source or column that is not there.
    """
    from tqdm.auto import tqdm

    dataset, root = open_source(source, split)
    columns = find_columns(source, dataset.column_names, data.columns)
    dataset = _undecoded(dataset, columns)
    result = Pairs(source, dataset, columns, root, total=len(dataset))
    indices = range(len(dataset))
    if limit is not None and limit < len(dataset):
        indices = [i * len(dataset) // limit for i in range(limit)]
    bar = tqdm(total=len(indices), desc="reading pairs", unit="row", disable=quiet or len(indices) < 2000)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        for start in range(0, len(indices), 256):  # in portions: images of a whole data set do not fit in memory
            part = list(indices[start : start + 256])
            for index, pair in zip(
                part, pool.map(lambda i: _inspect(dataset[i], i, result, data.ties), part), strict=True
            ):
                result.rows += 1
                if isinstance(pair, BadRow):
                    result.bad.append((index, pair))
                    continue
                tie = pair.preference == 0.5
                result.ties += tie
                if not tie or data.ties == "soft":
                    result.pairs.append(pair)
            bar.update(len(part))
    return result


def open_source(source: str, split: str) -> tuple[Any, Path]:
    """The source as a `datasets.Dataset`, and the folder that relative image paths start from."""
    import datasets
    import pyarrow.parquet

    path = Path(source).expanduser()
    metadata = path / "metadata.jsonl"
    parquet = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    try:
        if path.is_file() and path.suffix != ".parquet":
            raise DiffpoError(
                f"{source} is not a parquet file; data sources are parquet, a folder with metadata.jsonl or a hub id"
            )
        if metadata.is_file():
            if not metadata.stat().st_size:
                raise DiffpoError(f"{metadata} has no rows")
            return _load_local("json", [metadata]), path
        if parquet:
            # `datasets` stumbles over a file without rows
            full = [p for p in parquet if pyarrow.parquet.read_metadata(p).num_rows]
            if not full:
                raise DiffpoError(f"{source} has no rows")
            return _load_local("parquet", full), path.parent
        if path.exists():
            raise DiffpoError(f"{source} holds neither metadata.jsonl nor parquet files")
        if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix:
            raise DiffpoError(
                f"{source} does not exist: no such file or folder (relative paths start from {Path.cwd()})"
            )
        return datasets.load_dataset(source, split=split), Path.cwd()
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
        raise DiffpoError(f"cannot read the pairs of {source}{where}: {reason}") from error


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


def find_columns(source: str, names: list[str], given: Columns) -> Columns:
    """Fill in the columns that the config leaves open; DiffpoError names what is missing and what there is."""
    found: dict[str, str | None] = {}
    for role, usual in USUAL_NAMES.items():
        wanted = getattr(given, role)
        if wanted is not None and wanted not in names:
            raise DiffpoError(f"{source} has no column {wanted!r} (data.columns.{role}); it has: {', '.join(names)}")
        found[role] = wanted or next((name for name in usual if name in names), None)
    labelled = found["image_0"] and found["image_1"] and found["label_0"]
    if not labelled or (given.chosen and given.rejected):
        labelled = False
        found.update(image_0=None, image_1=None, label_0=None, label_1=None)
    needed = ["caption", *(() if labelled else ("chosen", "rejected"))]
    missing = [role for role in needed if found[role] is None]
    if missing:
        raise DiffpoError(
            f"{source} lacks the column for {', '.join(missing)}; it has: {', '.join(names)}. Expected are caption, "
            f"jpg_0, jpg_1, label_0 or prompt, chosen, rejected; other names go into the config, e.g. "
            f"data.columns.{missing[0]}=NAME"
        )
    if labelled:
        found.update(chosen=None, rejected=None)
    return Columns(**found)


def _image_columns(columns: Columns) -> tuple[str, str]:
    return (columns.image_0, columns.image_1) if columns.label_0 else (columns.chosen, columns.rejected)


def _undecoded(dataset: Any, columns: Columns) -> Any:
    import datasets

    for name in _image_columns(columns):
        # bytes are wanted: for their hash, and to meet bad ones here
        if isinstance(dataset.features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset.select_columns([name for name in columns.model_dump().values() if name])


def _inspect(row: dict, index: int, pairs: Pairs, ties: str) -> Pair | BadRow:
    try:
        return _read_pair(row, index, pairs.columns, pairs.root, ties)
    except BadRow as problem:
        return problem


def _read_pair(row: dict, index: int, columns: Columns, root: Path, ties: str) -> Pair:
    caption = row[columns.caption]
    if caption is not None and not isinstance(caption, str):  # also what `datasets` takes for a date
        raise BadRow("caption is not text", repr(caption))
    if not caption or not caption.strip():
        raise BadRow("empty caption")
    probability = _preference(row, columns)
    contents = [_content(row[name], root) for name in _image_columns(columns)]
    sizes = [_decode(content).size for content in contents]
    if sizes[0] != sizes[1]:
        (w0, h0), (w1, h1) = sizes
        raise BadRow("chosen and rejected differ in size", f"{w0}x{h0} and {w1}x{h1}")
    swapped = probability < 0.5
    preference = max(probability, 1 - probability)
    if ties == "drop" and preference != 0.5:
        preference = 1.0
    digest = blake2b(f"{caption}\0{preference}\0{len(contents[0])}\0".encode(), digest_size=16)
    for content in reversed(contents) if swapped else contents:
        digest.update(content)
    return Pair(index, caption, sizes[0], preference, swapped, digest.hexdigest())


def _preference(row: dict, columns: Columns) -> float:
    """Probability that the first image is the better one."""
    if columns.label_0 is None:
        return 1.0
    labels = [row[name] for name in (columns.label_0, columns.label_1) if name]
    try:
        labels = [float(label) for label in labels]
    except (TypeError, ValueError):
        raise BadRow("no label") from None
    if any(math.isnan(label) for label in labels):
        raise BadRow("no label")
    if not 0 <= labels[0] <= 1 or (len(labels) == 2 and abs(sum(labels) - 1) > 1e-6):
        raise BadRow("labels are not a preference", f"{labels}; label_0 and label_1 must lie in 0..1 and add up to 1")
    return labels[0]


def _content(value: Any, root: Path) -> bytes:
    """The encoded bytes of an image cell: bytes, `datasets`' {bytes, path}, or a path relative to the source."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        try:
            return (root / value).read_bytes()
        except OSError as error:
            raise BadRow("unreadable image", f"{value[:200]}: {error.strerror}") from None
        except ValueError as error:  # a NUL in the name
            raise BadRow("unreadable image", f"{value[:200]!r}: {error}") from None
    if not isinstance(value, bytes) or not value:
        raise BadRow("missing image")
    return value


def _decode(content: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image)  # decodes in full, so a truncated file shows here
            if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them to 8
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # as Pillow asks for with a warning
            return image.convert("RGB")
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        text = str(error) if "BytesIO" not in str(error) else "not an image"
        raise BadRow("unreadable image", text) from None
