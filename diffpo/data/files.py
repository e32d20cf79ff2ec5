"""Sources that must first become a table of rows: folders of images with equal names, webdataset shards, and tables
with one row per image of a ranked list."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..common.errors import DiffpoError
from ..common.images import BadRow, ShardMember, is_picture, locate, open_file, read_file
from ..common.text import decoded, plain
from .tables import Rows, RowSource
from .text_tables import TextTable

TEXTS = ("txt", "text", "cls")
TEXT_LIMIT = 2**24  # bytes of a caption, or of a text or JSON file in a shard
RANKED = ("prompt", "image_path", "rank")  # columns of ImageRewardDB


def siblings(folder: Path, roots: Sequence[Path]) -> tuple[TextTable, list[str]]:
    """The pairs of ``folder``: chosen/NAME.png and rejected/NAME.png, with any image suffix, and the caption in
    chosen/NAME.txt. Also returns the names of all other files.

    Rows are sorted by name, one for every name, so an image without its counterpart or caption is a bad row.
    DiffpoError if there are no images, or if one name occurs twice.
    """
    found: dict[str, dict[str, str]] = {}
    texts: dict[str, str] = {}
    others: list[str] = []
    for side in ("chosen", "rejected"):
        found[side], captions, rest = _images(folder / side)
        texts |= captions if side == "chosen" else {}
        others += [f"{side}/{name}" for name in rest]
        others += [f"{side}/{name}" for key, name in captions.items() if side == "rejected" or key not in found[side]]

    def rows() -> Iterator[dict[str, Any] | BadRow]:
        for name in sorted({*found["chosen"], *found["rejected"]}):
            there = next(images[name] for images in found.values() if name in images)
            row = {side: f"{side}/{images.get(name, there)}" for side, images in found.items()}
            # a missing chosen image is reported when the row is read, whether or not it has a caption
            caption: str | BadRow = name
            if name in found["chosen"]:
                caption = _caption(f"chosen/{texts.get(name, f'{name}.txt')}", roots)
            yield caption if isinstance(caption, BadRow) else {"prompt": caption, **row}

    return TextTable(TextTable.of(rows()).rows, ["prompt", "chosen", "rejected"]), others


def _caption(name: str, roots: Sequence[Path]) -> str | BadRow:
    try:
        text = decoded(read_file(locate(name, roots), TEXT_LIMIT)).strip()
    except BadRow as problem:
        missing = problem.reason == "unreadable image"  # the file does not exist
        return BadRow("missing caption" if missing else problem.reason, problem.detail, name)
    except (OSError, ValueError) as error:
        return BadRow("cannot read the caption", getattr(error, "strerror", None) or error, name)
    return text or BadRow("empty caption", "", name)


def _images(folder: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The images in ``folder`` and below, and the text files, as {relative path without suffix: relative path}; and the
    relative paths of all other files. Links to folders are not followed, and hidden files are not read."""
    found: dict[str, str] = {}
    texts: dict[str, str] = {}
    others: list[str] = []
    for base, folders, names in os.walk(folder):
        linked = [name for name in folders if name.startswith(".") or os.path.islink(os.path.join(base, name))]
        folders[:] = sorted(set(folders) - set(linked))
        for name in sorted([*names, *linked]):
            relative = (Path(base) / name).relative_to(folder)
            key, text = relative.with_suffix("").as_posix(), relative.suffix.lower() == ".txt"
            if name in linked or name.startswith(".") or not (text or is_picture(name)):
                others.append(relative.as_posix() + "/" * (name in linked))
            elif key in (known := texts if text else found):
                raise DiffpoError(
                    f"{folder} has both {plain(known[key])} and {plain(relative.as_posix())}: remove one of them"
                )
            else:
                known[key] = relative.as_posix()
    if not found:
        raise DiffpoError(
            f"{folder} has no images; a pair is chosen/NAME.png and rejected/NAME.png, with its caption in "
            "chosen/NAME.txt"
        )
    return found, texts, others


class Shards(TextTable):
    """Samples of webdataset shards, each kept as [values, {field: [shard, offset, size, name]}]. Images are thus kept
    apart from values, and no value in a JSON file is mistaken for the position of an image."""

    def __init__(self, rows: Sequence[bytes | BadRow], column_names: Sequence[str], paths: Sequence[Path]) -> None:
        super().__init__(rows, column_names)
        self.paths = paths

    def parse(self, row: bytes) -> dict[str, Any]:
        values, places = json.loads(row)
        return values | {name: ShardMember(self.paths[place[0]], *place[1:]) for name, place in places.items()}

    def _with(self, rows: Sequence[bytes | BadRow], names: Sequence[str]) -> Shards:
        return Shards(rows, names, self.paths)


def shards(paths: Sequence[Path], quiet: bool = True) -> tuple[Shards, list[str]]:
    """The samples of webdataset shards (uncompressed tar files), in which KEY.FIELD.SUFFIX is a field of the sample
    KEY. Also returns the names of members that are not fields.

    An image is kept as its position in the file. KEY.FIELD.txt is text; KEY.json has a field for each of its keys,
    unless a member has that field; KEY.png is the field `image` and KEY.txt the field `caption`. Nothing is unpacked to
    disk, and other members, such as pickles, are not read. A sample whose JSON or text cannot be read is a bad row.
    DiffpoError if a file is compressed or damaged, or if no sample can be read.
    """
    from tqdm.auto import tqdm

    rows: list[bytes | BadRow] = []
    names: dict[str, None] = {}
    others: list[str] = []
    for number, path in enumerate(tqdm(paths, desc="indexing shards", unit="shard", delay=1, disable=quiet)):
        try:
            for sample in _samples(path, others):
                if isinstance(sample, BadRow):
                    rows.append(sample)
                    continue
                values, places = sample
                names |= dict.fromkeys([*values, *places])
                rows.append(json.dumps([values, {name: [number, *place] for name, place in places.items()}]).encode())
        except tarfile.TarError as error:
            raise DiffpoError(
                f"{path} is damaged, or not an uncompressed tar file: {plain(error, 200)}. Decompress it, or download "
                f"it again"
            ) from None
    if not rows:
        raise DiffpoError(f"{paths[0]} has no samples: name its members KEY.jpg_0.jpg and so on (docs/data.md)")
    bad = next((row for row in rows if isinstance(row, BadRow)), None)
    if bad is not None and not names:
        raise DiffpoError(f"{paths[0]}: none of the {len(rows)} samples can be read; the first: {bad}")
    return Shards(rows, list(names), paths), others


class _Limited:
    """A file for `tarfile` that refuses the huge reads and negative offsets of damaged headers."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= TEXT_LIMIT:
            raise tarfile.ReadError(f"a header has {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset < 0:
            raise tarfile.ReadError("a header points before the start of the file")
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


_Sample = tuple[dict[str, Any], dict[str, tuple[int, int, str]]]


def _samples(path: Path, others: list[str]) -> Iterator[_Sample | BadRow]:
    """The values of each sample, and the positions (offset, size, name) of its images; a BadRow if one of its texts
    cannot be read. Names of members that are not fields are added to ``others``."""
    with open_file(path) as file, tarfile.open(fileobj=cast(BinaryIO, _Limited(file)), mode="r:") as archive:
        size = os.fstat(file.fileno()).st_size
        members = _members(archive, others)
        for _, group in groupby(members, lambda item: item[0]):
            values: dict[str, Any] = {}
            about: dict[str, Any] = {}
            places: dict[str, tuple[int, int, str]] = {}
            bad: BadRow | None = None
            for _, field, member in group:
                if member.offset_data + member.size > size:
                    raise DiffpoError(
                        f"{path} is truncated: {plain(member.name, 200)} extends beyond its end. Download it again"
                    )
                try:
                    found = _fields(archive, field, member)
                except BadRow as problem:
                    bad = bad or problem
                    continue
                if found is None:
                    others.append(member.name)
                    continue
                for name, value in found:
                    if name in (about if field == "json" else {**values, **places}):
                        raise DiffpoError(
                            f"{path}: the sample of {plain(member.name, 200)} has two fields named "
                            f"{plain(repr(name), 200)}; remove one"
                        )
                    (places if isinstance(value, tuple) else about if field == "json" else values)[name] = value
            if bad is not None:
                yield bad
            elif values or about or places:
                yield about | values, places


def _members(archive: tarfile.TarFile, others: list[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, field, member) of regular files. Links, devices and sparse files are added to ``others``."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # a list of all members, which would fill the memory
        if member.size < 0:
            raise tarfile.ReadError(f"{plain(member.name, 200)} has a negative size")
        if member.isreg() and not member.issparse():
            yield (*_split(member.name), member)
        elif not member.isdir():
            others.append(member.name)


def _fields(archive: tarfile.TarFile, field: str, member: tarfile.TarInfo) -> list[tuple[str, Any]] | None:
    """The fields that a member adds to its sample, an image as (offset, size, name); None if it is not a field. BadRow
    if its text cannot be read."""
    suffix = field.rpartition(".")[2].lower()
    if is_picture(f"x.{suffix}"):
        return [(column(field), (member.offset_data, member.size, member.name))]
    if suffix not in (*TEXTS, "json"):
        return None
    if member.size > TEXT_LIMIT:
        raise BadRow("a text is too long", f"{member.size:,} bytes; {TEXT_LIMIT:,} are allowed", member.name)
    try:
        text = decoded(cast(BinaryIO, archive.extractfile(member)).read())
        if suffix != "json":
            return [(column(field), text.strip())]
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        cause = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadRow(f"unreadable {'JSON' if suffix == 'json' else 'text'}", cause, member.name) from None
    return list(values.items()) if isinstance(values, dict) and field == suffix else [(column(field), values)]


def _split(name: str) -> tuple[str, str]:
    """Key and field of a member's name: "a/0001.jpg_0.jpg" -> ("a/0001", "jpg_0.jpg")."""
    match = re.match(r"^((?:.*/)?[^/.]+)\.([^/]+)$", name)
    return (match[1], match[2]) if match else (name, "")


def column(field: str) -> str:
    """The column of a webdataset field: jpg_0.jpg -> jpg_0, png -> image, txt -> caption, json.a -> a."""
    if field.startswith("json."):
        return field[5:]
    name, _, suffix = field.rpartition(".")
    if name and (suffix.lower() in (*TEXTS, "json") or is_picture(field)):
        return name
    if is_picture(f"x.{field}"):
        return "image"
    return {"txt": "caption", "text": "caption", "cls": "label"}.get(field.lower(), field)


def unpacked(dataset: Any) -> Any:
    """A data set of the hub. Fields of webdataset shards that `datasets` reads get the names that `shards` gives."""
    if "__key__" not in dataset.column_names:
        return dataset
    dataset = dataset.flatten()
    names = {name: column(name) for name in dataset.column_names}
    own = {new for name, new in names.items() if not name.startswith("json.")}
    spare = [name for name, new in names.items() if name.startswith("json.") and new in own]
    return dataset.remove_columns(spare).rename_columns({old: new for old, new in names.items() if old not in spare})


class Ranked(TextTable):
    """One row per ranked list, kept as the numbers of its images' rows in ``dataset``."""

    def __init__(self, rows: Sequence[bytes | BadRow], column_names: Sequence[str], dataset: Rows) -> None:
        super().__init__(rows, column_names)
        self.dataset = dataset

    def parse(self, row: bytes) -> dict[str, Any]:
        prompt, image, rank = RANKED
        found = [self.dataset[index] for index in json.loads(row)]
        return {prompt: found[0][prompt], "images": [each[image] for each in found], "ranks": [r[rank] for r in found]}

    def _with(self, rows: Sequence[bytes | BadRow], names: Sequence[str]) -> Ranked:
        return Ranked(rows, names, self.dataset)


def ranked_by_prompt(source: RowSource) -> Ranked:
    """One row per ranked list, from ImageRewardDB's rows, which are one image of a list each."""
    dataset = source.select_columns(["prompt_id", *RANKED])
    lists: dict[str, list[int]] = {}
    for index, row in enumerate(dataset):
        lists.setdefault(repr((row["prompt_id"], row[RANKED[0]])), []).append(index)
    rows = [json.dumps(indices).encode() for indices in lists.values()]
    return Ranked(rows, ["prompt", "images", "ranks"], dataset)


def undecoded(dataset: Any) -> Any:
    """A `datasets` data set whose images are read as bytes: their hash is needed, and `decode` reports damaged ones."""
    import datasets

    for name in dataset.column_names:
        feature, raw = dataset.features[name], datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of images
            dataset = dataset.cast_column(name, type(feature)(raw))
    return dataset
