"""A folder of images that says how it was made and can be continued.

OUT/images/base/00000_0.png     <prompt index>_<seed>.png
OUT/images/tuned/00000_0.png
OUT/manifest.jsonl              one line per image: prompt, settings, hashes of model, LoRA and image, versions
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePath

from .checkpoint import write_atomic
from .errors import DiffpoError

ARMS = ("base", "tuned")
# what makes two images comparable; a folder never mixes values of these
SETTINGS = ("model_hash", "lora_hash", "user_hash", "steps", "solver", "guidance", "negative_prompt")
SETTINGS += ("height", "width", "dtype")


def image_path(out: Path, arm: str, index: int, seed: int) -> Path:
    return Path(out) / "images" / arm / f"{index:05d}_{seed}.png"


@contextmanager
def writing(path: Path):
    """Turns a full or forbidden disk into one message."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DiffpoError(
            f"cannot write {path}: {error.strerror}; make room or choose another folder and run the same command again "
            "(what is finished is kept)"
        ) from None


def save(path: Path, data: bytes) -> None:
    """All of ``data`` or nothing."""
    with writing(path):
        try:
            write_atomic(path, data)
        finally:
            path.with_name(f".{path.name}.part").unlink(missing_ok=True)


def read_manifest(out: Path) -> list[dict]:
    """The rows of OUT/manifest.jsonl, the last one per image; a half-written last line is left out."""
    path = Path(out) / "manifest.jsonl"
    rows, lines = {}, _lines(path)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["arm"] not in ARMS or not type(row["index"]) is type(row["seed"]) is int:
                raise ValueError
            if (file := PurePath(str(row["file"]))).is_absolute() or ".." in file.parts:  # of another folder
                raise ValueError
            rows[row["arm"], row["index"], row["seed"]] = {
                **row,
                "prompt": str(row["prompt"]),
                "file": str(row["file"]),
            }
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise DiffpoError(
                    f"{path}:{number} is not a manifest line; move the folder away and start anew"
                ) from None
    return list(rows.values())


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        # not splitlines: a prompt may hold U+2028
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DiffpoError(f"cannot read {path}: {error}; move the folder away and start anew") from None


def intact(out: Path, row: dict) -> bool:
    try:
        return sha256((out / row["file"]).read_bytes()).hexdigest() == row.get("sha256")
    except OSError:
        return False


def check_same_run(out: Path, done: list[dict], wanted: dict[tuple, dict]) -> None:
    """Raise if ``out`` was made with other settings: mixing them would compare unlike with unlike."""
    if not done and any((out / "images").glob("*/*.png")):
        raise DiffpoError(f"{out} holds images but no manifest of this tool; choose another output folder")
    examples = {arm: next((r for r in wanted.values() if r["arm"] == arm), None) for arm in ARMS}
    for row in done:
        new = wanted.get((row["arm"], row["index"], row["seed"])) or examples[row["arm"]]
        if new is None:
            continue
        keys = SETTINGS if new["index"] != row["index"] else ("prompt", *SETTINGS)
        for key in keys:
            if row.get(key) != new[key]:
                raise DiffpoError(
                    f"{out}/manifest.jsonl was made with {key}={row.get(key)!r} ({row['arm']}, prompt {row['index']}), "
                    f"now it is {new[key]!r}; choose another output folder, or delete this one to start anew"
                )


def line(row: dict) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
