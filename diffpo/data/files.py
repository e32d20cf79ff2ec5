"""Sources that are more than one table: folders of pictures with equal names, webdataset shards, and rows that are one
image of a ranked list each."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import DiffpoError

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "avif", "tif", "tiff", "gif")
TEXTS = ("txt", "text", "cls")
TEXT_LIMIT = 2**24  # bytes of a text or json file in a shard
RANKED = ("prompt", "image_path", "rank")  # of ImageRewardDB's rows


def siblings(folder: Path) -> Any:
    """The pairs of ``folder``: chosen/NAME.png and rejected/NAME.png, whatever their suffixes, with the caption in
    chosen/NAME.txt. Rows are in the order of the names; one for every name, so that what lacks its counterpart or its
    caption is met as a bad row. DiffpoError: nothing to pair, or a name that is there twice."""
    import datasets

    found = {side: _pictures(folder / side) for side in ("chosen", "rejected")}
    rows: dict[str, list] = {"prompt": [], "chosen": [], "rejected": []}
    for name in sorted(set(found["chosen"]) | set(found["rejected"])):
        there = next(pictures[name] for pictures in found.values() if name in pictures)
        for side, pictures in found.items():
            rows[side].append(f"{side}/{pictures.get(name, there)}")
        caption = folder / "chosen" / f"{name}.txt"
        try:
            rows["prompt"].append(caption.read_text(encoding="utf-8-sig").strip())
        except FileNotFoundError:
            # where the chosen picture is missing too, that is what should be reported
            rows["prompt"].append(None if name in found["chosen"] else name)
        except (OSError, UnicodeDecodeError) as error:
            raise DiffpoError(f"cannot read the caption {caption}: {error}") from None
    return datasets.Dataset.from_dict(rows)


def _pictures(folder: Path) -> dict[str, str]:
    """Relative paths of the pictures in ``folder`` and below, by the same without suffix."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix[1:].lower() not in IMAGES or path.name.startswith("."):
            continue
        relative = path.relative_to(folder)
        name = relative.with_suffix("").as_posix()
        if name in found:
            raise DiffpoError(f"{folder} holds {found[name]} and {relative.as_posix()}: which of them is it?")
        found[name] = relative.as_posix()
    if not found:
        raise DiffpoError(
            f"{folder} holds no pictures; pairs are chosen/NAME.png and rejected/NAME.png with a caption in "
            "chosen/NAME.txt"
        )
    return found


def shards(paths: list[Path]) -> Any:
    """The samples of webdataset shards (uncompressed tar files): KEY.FIELD.SUFFIX is a field of sample KEY.

    An image becomes its place in the file, {path, offset, size}, which `member` reads; KEY.FIELD.txt is text, KEY.json
    has a field for each key (that has no member of its own), KEY.png is the field `image` and KEY.txt `caption`.
    Nothing is unpacked to the disk, and other members (pickles among them) are not even read. DiffpoError: compressed
    or torn files, broken json.
    """
    import datasets
    import pyarrow as pa
    from tqdm.auto import tqdm

    tables = []
    for path in tqdm(paths, desc="indexing shards", unit="shard", disable=len(paths) < 8):
        try:
            samples = list(_samples(path))
            names = list(dict.fromkeys(name for sample in samples for name in sample))
            tables.append(pa.table({name: pa.array([sample.get(name) for sample in samples]) for name in names}))
        except tarfile.TarError as error:
            raise DiffpoError(f"{path} is not a whole, uncompressed tar file: {error}") from None
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DiffpoError(f"{path}: samples disagree on what kind of value a field holds: {error}") from None
    table = pa.concat_tables(tables, promote_options="permissive")
    if not table.num_rows:
        raise DiffpoError(f"{paths[0]} has no samples")
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    size = path.stat().st_size
    with tarfile.open(path, "r:") as archive:
        named = ((*_split(member.name), member) for member in archive if member.isreg() and not member.issparse())
        for _, members in groupby(named, lambda item: item[0]):
            sample: dict[str, Any] = {}
            about: dict[str, Any] = {}
            for _, field, member in members:
                if member.offset_data + member.size > size:
                    raise DiffpoError(f"{path} is truncated: {member.name} reaches over its end")
                for name, value in _fields(path, archive, field, member):
                    kept = about if field == "json" else sample
                    if name in kept:
                        raise DiffpoError(f"{path}: the sample of {member.name} has two fields {name!r}")
                    kept[name] = value
            if sample or about:
                yield about | sample


def _fields(path: Path, archive: tarfile.TarFile, field: str, member: tarfile.TarInfo) -> list[tuple[str, Any]]:
    """What a member adds to its sample."""
    suffix = field.rpartition(".")[2].lower()
    if suffix in IMAGES:
        return [(column(field), {"path": str(path), "offset": member.offset_data, "size": member.size})]
    if suffix not in (*TEXTS, "json"):
        return []
    if member.size > TEXT_LIMIT:
        raise DiffpoError(f"{path}: {member.name} of {member.size} bytes is too long for a text")
    try:
        text = archive.extractfile(member).read().decode("utf-8-sig")
        if suffix != "json":
            return [(column(field), text.strip())]
        values = json.loads(text)
    except ValueError as error:  # of utf-8 or of json
        raise DiffpoError(f"{path}: cannot read {member.name}: {error}") from None
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
    if name and suffix.lower() in (*IMAGES, *TEXTS, "json"):
        return name
    return (
        "image" if field.lower() in IMAGES else {"txt": "caption", "text": "caption", "cls": "label"}.get(field, field)
    )


def unpacked(dataset: Any) -> Any:
    """A data set of the hub; the fields of webdataset shards, which `datasets` reads itself, named as by `shards`."""
    if "__key__" not in dataset.column_names:
        return dataset
    dataset = dataset.flatten()
    names = {name: column(name) for name in dataset.column_names}
    own = {new for name, new in names.items() if not name.startswith("json.")}
    spare = [name for name, new in names.items() if name.startswith("json.") and new in own]
    return dataset.remove_columns(spare).rename_columns({old: new for old, new in names.items() if old not in spare})


def member(place: dict[str, Any]) -> bytes:
    """The bytes at {path, offset, size}; OSError, or what Python says of a place that is none."""
    with Path(place["path"]).open("rb") as file:  # a number would be another file of this process
        file.seek(place["offset"])
        return file.read(place["size"])


def ranked_by_prompt(dataset: Any) -> Any:
    """ImageRewardDB's rows, one for each image of a ranked list, as one row for each list."""
    import datasets

    table = dataset.select_columns(["prompt_id", *RANKED]).with_format("arrow")[:]
    grouped = table.group_by(["prompt_id", "prompt"], use_threads=False)
    lists = grouped.aggregate([("image_path", "list"), ("rank", "list")])
    lists = lists.select(["prompt", "image_path_list", "rank_list"]).rename_columns(["prompt", "images", "ranks"])
    return datasets.Dataset(datasets.table.InMemoryTable(lists))
