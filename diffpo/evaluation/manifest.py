"""A folder of images that says how it was made and can be continued.

OUT/images/base/00000_0.png     <prompt index>_<seed>.png
OUT/images/tuned/00000_0.png
OUT/manifest.jsonl              one line per image: prompt, settings, hashes of model, LoRA and image, versions
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..common.errors import DiffpoError
from ..common.files import write_atomic, writing
from ..common.images import ENCODED, BadRow, decode, read_file
from ..common.instruction import key_of
from ..common.processes import Processes
from ..common.text import plain, read_text
from .generation import ARMS, COMPARED, OF_ARM, Generation

ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # the name of an arm, which is a folder's too

# what the values of a row are; those not named here may be null or missing
REQUIRED = {"prompt", "file", "index", "seed"}
MADE_HERE = {"model", "model_hash", "steps", "guidance", "dtype"}  # what `diffpo generate` always says
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "file", "solver", "dtype", "model", "model_hash", "lora", "lora_hash"), str),
    **dict.fromkeys(("negative_lora", "negative_lora_hash", "source_hash"), str),
    "source": (str, list),
    **dict.fromkeys(
        ("user_pairs", "user_features", "steer", "user_hash", "plan", "plan_hash", "negative_prompt", "sha256"), str
    ),
    **dict.fromkeys(("index", "seed", "steps", "base_calls", "height", "width"), int),
    **dict.fromkeys(("guidance", "lora_weight", "negative_lora_weight"), (int, float)),
    "versions": dict,
}


def check_arm(name: str) -> None:
    """DiffpoError if an arm cannot have this name."""
    if not ARM.fullmatch(name):
        raise DiffpoError(f"{plain(name, 60)!r} cannot be the name of an arm. Use letters, digits, '.', '_' and '-'")


def image_path(out: Path, arm: str, index: int, seed: int) -> Path:
    return Path(out) / "images" / arm / f"{index:05d}_{seed}.png"


def manifest_file(out: Path, ours: Processes) -> Path:
    """Where a process adds its rows: with several, each has a part of its own."""
    return out / ("manifest.jsonl" if ours.count == 1 else f"manifest-{ours.rank}.jsonl")


def write_manifest(out: Path, rows: Iterable[dict]) -> None:
    """All rows as one file; parts of several processes are deleted."""
    save(out / "manifest.jsonl", b"".join(line(row) for row in rows))
    for part in _parts(out):
        part.unlink()


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("manifest-[0-9]*.jsonl"))


def save(path: Path, data: bytes) -> None:
    """All of ``data`` or nothing."""
    with writing(path):
        write_atomic(path, data)


def read_manifest(out: Path) -> list[dict]:
    """The rows of OUT/manifest.jsonl and of parts that several processes left, the last one per image; a half-written
    last line is left out.

    DiffpoError that names the line, if a value is missing or of another type, or names a file outside of ``out``.
    """
    out, rows = Path(out), {}
    for path in [out / "manifest.jsonl", *_parts(out)]:
        for row in _rows(path):
            rows[row["arm"], row["index"], row["seed"]] = row
    return list(rows.values())


def _rows(path: Path) -> Iterator[dict]:
    *lines, last = _text(path).split("\n")  # not splitlines: a prompt may hold U+2028
    if last and _is_json(last):
        lines.append(last)  # otherwise a write was interrupted
    for number, each in enumerate(lines, 1):
        try:
            row = json.loads(each)
            if problem := _problem(row):
                raise ValueError(problem)
        except (ValueError, TypeError, RecursionError) as error:
            raise DiffpoError(
                f"{path}:{number} is not a manifest line ({plain(error, 200)}); move the folder away and start again"
            ) from None
        yield row


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get("arm"), str) or not ARM.fullmatch(row["arm"]):
        return "expected an object with the name of an arm, such as base"
    own = "model_hash" in row  # made by `diffpo generate`
    for key, kinds in KINDS.items():
        value = row.get(key)
        if value is None and key not in (REQUIRED | MADE_HERE if own else REQUIRED):
            continue
        huge = isinstance(value, int) and abs(value) >= 2**63
        if not isinstance(value, kinds) or isinstance(value, bool) or huge:
            return f"{key} is {plain(repr(value), 80)}"
    if row["index"] < 0:
        return f"index is {row['index']}"
    before = row.get("source")
    sources = before if isinstance(before, list) else [before] if before else []
    if before == [] or not all(isinstance(each, str) for each in sources):
        return f"source is {plain(repr(before), 80)}"
    if sources and row.get("source_hash") and len(row["source_hash"].split("+")) != len(sources):
        return f"source_hash is {plain(repr(row['source_hash']), 80)}, for {len(sources)} sources"
    for key, name in (("file", row["file"]), *(("source", each) for each in sources)):
        file = PurePosixPath(name)
        if file.is_absolute() or ".." in file.parts or "\0" in str(file):
            return f"{key} is {plain(repr(name), 80)}, which is not in this folder"
    wanted = image_path(Path(), row["arm"], row["index"], row["seed"]).as_posix()
    if own and row["file"] != wanted:
        return f"file is {plain(repr(row['file']), 80)}, not {wanted!r}"
    if own:
        try:
            Generation.of(row)
        except DiffpoError as error:
            return str(error)
    return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _text(path: Path) -> str:
    try:
        return read_text(path) if path.exists() else ""
    except (OSError, ValueError) as error:
        raise DiffpoError(f"cannot read {path}: {error}; move the folder away and start again") from None


def intact(out: Path, row: dict) -> bool:
    """Is the picture there, and the one that the row describes?"""
    path = out / row["file"]
    try:
        if not path.is_file():  # a pipe or a device has no end
            return False
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest() == row.get("sha256")
    except OSError:
        return False


def check_same_run(out: Path, done: list[dict], arms: Mapping[str, Generation], prompts: Sequence[str]) -> None:
    """Raise if ``out`` was made with other settings or prompts: mixing them would compare unlike with unlike.

    A folder of another solver is not continued with that solver: the result of a command never depends on files that
    exist.
    """
    if not done and any((out / "images").glob("*/*.png")):
        raise DiffpoError(f"{out} holds images but no manifest.jsonl that describes them; choose another output folder")
    for row in done:
        if row["arm"] not in arms:
            continue
        now: dict[str, Any] = {}
        if row["index"] < len(prompts):
            now = {"prompt": str(prompts[row["index"]]), "source_hash": key_of(prompts[row["index"]])}
        now |= {key: getattr(arms[row["arm"]], key) for key in COMPARED}
        for key, value in now.items():
            before = row.get(key)
            if before != value:
                raise DiffpoError(
                    f"{out}/manifest.jsonl was made with {key}={before!r} ({row['arm']}, prompt {row['index']}), "
                    f"now it is {value!r}; {_advice(key, before)}choose another output folder, or delete this one"
                )


def _advice(key: str, before: Any) -> str:
    """The option that continues the folder, for the one whose default has changed since the first manifests."""
    return f"continue it with --solver {before} (generate and eval), " if key == "solver" and before is not None else ""


def check_comparable(out: Path, rows: list[dict]) -> None:
    """Raise if ``rows`` are of several runs."""
    first: dict[tuple, dict] = {}
    for row in rows:
        groups: list[tuple[tuple, Collection[str]]] = [
            ((row["arm"],), COMPARED),
            ((row["index"],), ("prompt", "source_hash")),
        ]
        if row["arm"] in ARMS:  # these two differ in the LoRA and in the user; arms of other names may in anything
            groups.append(((), set(COMPARED) - OF_ARM))
        for group, keys in groups:
            example = first.setdefault(group, row)
            for key in sorted(keys):
                if row.get(key) != example.get(key):
                    one, other = (f"{plain(repr(r.get(key)), 80)} for {r['file']}" for r in (example, row))
                    raise DiffpoError(
                        f"{out}/manifest.jsonl describes pictures that cannot be compared: {key} is {one} and {other}; "
                        f"generate them again in another folder"
                    )


def line(row: dict) -> bytes:
    return json_bytes(row) + b"\n"


def json_bytes(value: object, indent: int | None = None) -> bytes:
    """``value`` as JSON in UTF-8; half characters, which UTF-8 does not have, as JSON's own escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def open_image(path: Path) -> Image.Image:
    """An RGB picture, as `data.images.decode` gives it: transparency lies on white. Raises DiffpoError that names the
    file when it is missing, truncated or no picture."""
    try:
        return decode(read_file(path, ENCODED))
    except (OSError, ValueError, BadRow) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "detail", None) or error
        raise DiffpoError(
            f"cannot read the image {path}: {reason}; repair or delete it, and run the same command again"
        ) from None
