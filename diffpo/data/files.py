"""Sources that are more than one table: folders of pictures with equal names, webdataset shards, and rows that are one
image of a ranked list each."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from ..common.errors import DiffpoError
from ..common.images import BadRow, ShardMember, is_picture, locate, open_file, read_file
from ..common.text import decoded, plain
from .tables import Table

TEXTS = ("txt", "text", "cls")
TEXT_LIMIT = 2**24  # bytes of a text or json file in a shard, of a caption
RANKED = ("prompt", "image_path", "rank")  # of ImageRewardDB's rows


def siblings(folder: Path, roots: Sequence[Path]) -> tuple[Table, list[str]]:
    """The pairs of ``folder``: chosen/NAME.png and rejected/NAME.png, whatever their suffixes, with the caption in
    chosen/NAME.txt; and what else lies there. Rows are in the order of the names; one for every name, so that what
    lacks its counterpart or its caption is a bad row. DiffpoError: nothing to pair, or a name that is there twice."""
    found, texts, others = {}, {}, []
    for side in ("chosen", "rejected"):
        found[side], captions, rest = _pictures(folder / side)
        texts |= captions if side == "chosen" else {}
        others += [f"{side}/{name}" for name in rest]
        others += [f"{side}/{name}" for key, name in captions.items() if side == "rejected" or key not in found[side]]

    def rows() -> Iterator[dict[str, Any] | BadRow]:
        for name in sorted({*found["chosen"], *found["rejected"]}):
            there = next(pictures[name] for pictures in found.values() if name in pictures)
            row = {side: f"{side}/{pictures.get(name, there)}" for side, pictures in found.items()}
            # where the chosen picture is missing, that is what should be reported, whatever its caption is
            caption = _caption(f"chosen/{texts.get(name, f'{name}.txt')}", roots) if name in found["chosen"] else name
            yield caption if isinstance(caption, BadRow) else {"prompt": caption, **row}

    return Table(Table.of(rows()).rows, ["prompt", "chosen", "rejected"]), others


def _caption(name: str, roots: Sequence[Path]) -> str | BadRow:
    try:
        text = decoded(read_file(locate(name, roots), TEXT_LIMIT)).strip()
    except BadRow as problem:
        missing = problem.reason == "unreadable image"  # there is no such file
        return BadRow("missing caption" if missing else problem.reason, problem.detail, name)
    except (OSError, ValueError) as error:
        return BadRow("cannot read the caption", getattr(error, "strerror", None) or error, name)
    return text or BadRow("empty caption", "", name)


def _pictures(folder: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Relative paths of the pictures in ``folder`` and below, and of the texts, by the same without suffix; and of
    everything else. Links to folders are not followed, and hidden files not read."""
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
                    f"{folder} holds {plain(known[key])} and {plain(relative.as_posix())}: which of them is it?"
                )
            else:
                known[key] = relative.as_posix()
    if not found:
        raise DiffpoError(
            f"{folder} holds no pictures; pairs are chosen/NAME.png and rejected/NAME.png with a caption in "
            "chosen/NAME.txt"
        )
    return found, texts, others


class Shards(Table):
    """Samples of shards: each row is [values, {field: [shard, offset, size, name]}], so that no value of a json file
    can be taken for a place."""

    def __init__(self, rows: Sequence[bytes | BadRow], column_names: Sequence[str], paths: Sequence[Path]) -> None:
        super().__init__(rows, column_names)
        self.paths = paths

    def parse(self, row: bytes) -> dict[str, Any]:
        values, places = json.loads(row)
        return values | {name: ShardMember(self.paths[place[0]], *place[1:]) for name, place in places.items()}

    def _with(self, rows: Sequence[bytes | BadRow], names: Sequence[str]) -> Shards:
        return Shards(rows, names, self.paths)


def shards(paths: Sequence[Path], quiet: bool = True) -> tuple[Shards, list[str]]:
    """The samples of webdataset shards (uncompressed tar files): KEY.FIELD.SUFFIX is a field of sample KEY; and the
    names of members that are no such field.

    An image becomes its place in the file; KEY.FIELD.txt is text, KEY.json has a field for each key (that has no member
    of its own), KEY.png is the field `image` and KEY.txt `caption`. Nothing is unpacked to the disk, and other members
    (pickles among them) are not even read. DiffpoError: compressed or torn files, broken json.
    """
    from tqdm.auto import tqdm

    rows: list[bytes | BadRow] = []
    names: dict[str, None] = {}
    others: list[str] = []
    for number, path in enumerate(tqdm(paths, desc="indexing shards", unit="shard", delay=1, disable=quiet)):
        try:
            for values, places in _samples(path, others):
                names |= dict.fromkeys([*values, *places])
                rows.append(json.dumps([values, {name: [number, *place] for name, place in places.items()}]).encode())
        except tarfile.TarError as error:
            raise DiffpoError(f"{path} is not a whole, uncompressed tar file: {plain(error, 200)}") from None
    if not rows:
        raise DiffpoError(f"{paths[0]} has no samples")
    return Shards(rows, list(names), paths), others


class _Careful:
    """A tar file whose headers cannot ask for more than a name or a path takes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= TEXT_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset < 0:
            raise tarfile.ReadError("a header that leads before the start of the file")
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _samples(path: Path, others: list[str]) -> Iterator[tuple[dict[str, Any], dict[str, tuple[int, int, str]]]]:
    """Of each sample: its values, and the places (offset, size, name) of its images."""
    with open_file(path) as file, tarfile.open(fileobj=_Careful(file), mode="r:") as archive:
        size = os.fstat(file.fileno()).st_size
        members = _members(archive, others)
        for _, group in groupby(members, lambda item: item[0]):
            values: dict[str, Any] = {}
            about: dict[str, Any] = {}
            places: dict[str, tuple[int, int, str]] = {}
            for _, field, member in group:
                if member.offset_data + member.size > size:
                    raise DiffpoError(f"{path} is truncated: {plain(member.name, 200)} reaches over its end")
                found = _fields(path, archive, field, member)
                if found is None:
                    others.append(member.name)
                    continue
                for name, value in found:
                    if name in (about if field == "json" else {**values, **places}):
                        raise DiffpoError(
                            f"{path}: the sample of {plain(member.name, 200)} has two fields {plain(repr(name), 200)}"
                        )
                    (places if isinstance(value, tuple) else about if field == "json" else values)[name] = value
            if values or about or places:
                yield about | values, places


def _members(archive: tarfile.TarFile, others: list[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, field, member) of regular files; links, devices and sparse files are others."""
    for member in archive:
        archive.members = []  # it keeps all of them otherwise
        if member.size < 0:
            raise tarfile.ReadError(f"{plain(member.name, 200)} has a size below 0")
        if member.isreg() and not member.issparse():
            yield (*_split(member.name), member)
        elif not member.isdir():
            others.append(member.name)


def _fields(path: Path, archive: tarfile.TarFile, field: str, member: tarfile.TarInfo) -> list[tuple[str, Any]] | None:
    """What a member adds to its sample, an image as (offset, size, name); None of a member that is no field."""
    suffix = field.rpartition(".")[2].lower()
    if is_picture(f"x.{suffix}"):
        return [(column(field), (member.offset_data, member.size, member.name))]
    if suffix not in (*TEXTS, "json"):
        return None
    if member.size > TEXT_LIMIT:
        raise DiffpoError(f"{path}: {plain(member.name, 200)} of {member.size} bytes is too long for a text")
    try:
        text = decoded(archive.extractfile(member).read())
        if suffix != "json":
            return [(column(field), text.strip())]
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # of utf-8 or of json
        reason = "nested too deep" if isinstance(error, RecursionError) else plain(error, 200)
        raise DiffpoError(f"{path}: cannot read {plain(member.name, 200)}: {reason}") from None
    return list(values.items()) if isinstance(values, dict) and field == suffix else [(column(field), values)]


def _split(name: str) -> tuple[str, str]:
    """key and field of a member's name: "a/0001.jpg_0.jpg" -> ("a/0001", "jpg_0.jpg")."""
    match = re.match(r"^((?:.*/)?[^/.]+)\.([^/]+)$", name)
    return match.groups() if match else (name, "")


def column(field: str) -> str:
    """The column that a webdataset field becomes: jpg_0.jpg -> jpg_0, png -> image, txt -> caption, json.a -> a."""
    if field.startswith("json."):
        return field[5:]
    name, _, suffix = field.rpartition(".")
    if name and (suffix.lower() in (*TEXTS, "json") or is_picture(field)):
        return name
    if is_picture(f"x.{field}"):
        return "image"
    return {"txt": "caption", "text": "caption", "cls": "label"}.get(field.lower(), field)


def unpacked(dataset: Any) -> Any:
    """A data set of the hub; the fields of webdataset shards, which `datasets` reads itself, named as by `shards`."""
    if "__key__" not in dataset.column_names:
        return dataset
    dataset = dataset.flatten()
    names = {name: column(name) for name in dataset.column_names}
    own = {new for name, new in names.items() if not name.startswith("json.")}
    spare = [name for name, new in names.items() if name.startswith("json.") and new in own]
    return dataset.remove_columns(spare).rename_columns({old: new for old, new in names.items() if old not in spare})


class Ranked(Table):
    """Rows that are one image of a list each, as one row for each list: [numbers of its rows]."""

    def __init__(self, rows: Sequence[bytes | BadRow], column_names: Sequence[str], dataset: Any) -> None:
        super().__init__(rows, column_names)
        self.dataset = dataset

    def parse(self, row: bytes) -> dict[str, Any]:
        prompt, image, rank = RANKED
        found = [self.dataset[index] for index in json.loads(row)]
        return {prompt: found[0][prompt], "images": [each[image] for each in found], "ranks": [r[rank] for r in found]}

    def _with(self, rows: Sequence[bytes | BadRow], names: Sequence[str]) -> Ranked:
        return Ranked(rows, names, self.dataset)


def ranked_by_prompt(dataset: Any) -> Ranked:
    """ImageRewardDB's rows, one for each image of a ranked list, as one row for each list."""
    dataset = dataset.select_columns(["prompt_id", *RANKED])
    lists: dict[str, list[int]] = {}
    for index, row in enumerate(dataset):
        lists.setdefault(repr((row["prompt_id"], row[RANKED[0]])), []).append(index)
    rows = [json.dumps(indices).encode() for indices in lists.values()]
    return Ranked(rows, ["prompt", "images", "ranks"], dataset)


def undecoded(dataset: Any, image_columns: Sequence[str]) -> Any:
    """The data set with its images as bytes: they are wanted for their hash, and bad ones are to be met by `decode`."""
    import datasets

    for name in image_columns:
        feature, raw = dataset.features[name], datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of images
            dataset = dataset.cast_column(name, type(feature)(raw))
    return dataset
