"""Checkpoints that are whole or not there.

A checkpoint is a folder checkpoint-000100/ with what is trained (in diffusers' own format), state.pt (optimiser,
schedule, scaler: tensors and numbers, read back without unpickling code) and checkpoint.json, which lists the others'
sizes and hashes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..common import files
from ..common.errors import DiffpoError
from ..common.run_folder import CHECKPOINT
from ..common.text import plain, read_text

STATE_NAME = "state.pt"
MANIFEST_NAME = "checkpoint.json"
MANIFEST_KEYS = ("step", "base", "data_hash", "pairs_per_update", "files")  # what resuming relies on
# what must be as it was when the run started: key of the manifest, what is wrong otherwise, and how to mend it
UNCHANGED = (
    ("data_hash", "the training pairs are not those", "Point data.train or data.prompts at the same data"),
    ("validation_hash", "the validation pairs are not those", "Point data.validation at the same data"),
    ("start_hash", "lora.start is not the LoRA", "Set lora.start to that one"),
    (
        "pairs_per_update",
        "batch_size x accumulation x processes is not the product",
        "Set train.batch_size and train.accumulation accordingly",
    ),
)


def save(output: Path, step: int, write: Callable[[Path], Any], state: dict, about: dict, keep: int) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    ``write(folder)`` writes what is trained; ``about`` (JSON) goes into the manifest. If the disk is full, what is half
    written is removed, the checkpoints that exist stay, and a DiffpoError says so.
    """
    final = output / f"{CHECKPOINT}{step:06d}"
    with disk_errors(output), files.whole_folder(final, replace=True) as part:
        write(part)
        _write_state(part / STATE_NAME, state)
        paths = sorted(path for path in part.rglob("*") if path.is_file())
        manifest = {"step": step, **about, "files": {p.relative_to(part).as_posix(): _fingerprint(p) for p in paths}}
        manifest["hash"] = _digest(manifest)
        (part / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for old in folders(output)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(output: Path, say: Callable[[str], None] = print) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, and its manifest; damaged ones are named and passed over.

    Raises DiffpoError if there are checkpoints and not one of them is whole.
    """
    found = folders(output)
    for folder in found:
        problem, manifest = _inspect(folder)
        if not problem:
            return folder, manifest
        say(f"{folder} is damaged ({problem}); going back to the checkpoint before it")
    if found:
        raise DiffpoError(
            f"every checkpoint in {output} is damaged: {', '.join(folder.name for folder in found)}. Choose another "
            f"folder with output=FOLDER, or delete this one to start again from the beginning"
        )
    return None


def check_unchanged(folder: Path, manifest: dict, about: dict) -> None:
    """DiffpoError if base, data or batch are not what they were when the run of this checkpoint started."""
    for key, what, mend in UNCHANGED:
        if key in manifest and manifest[key] != about.get(key):  # older checkpoints have only some of them
            raise DiffpoError(
                f"cannot resume {folder}: {what} that the run started with ({manifest[key]} there, {about.get(key)} "
                f"now). {mend}, or start a new run with output=FOLDER"
            )
    from ..models import identity  # brings torch, and `diffpo check` asks for folders alone

    if not identity.same_base(manifest["base"], about["base"]):
        raise DiffpoError(
            f"cannot resume {folder}: the base model is not the one that the run started with. Set model.path to that "
            f"one, or start a new run with output=FOLDER"
        )


def read_state(folder: Path) -> dict:
    """state.pt of a checkpoint: tensors and numbers, never code."""
    import torch

    try:
        return torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
    except Exception as error:  # refused pickles, and whatever damaged bytes lead torch to
        raise DiffpoError(
            f"cannot read {folder / STATE_NAME}: {plain(error, 300)}. Delete {folder} to resume from the checkpoint "
            f"before it"
        ) from error


def folders(output: Path) -> list[Path]:
    """The checkpoints in ``output``, newest first."""
    found = {
        path: int(path.name.removeprefix(CHECKPOINT))
        for path in output.glob(f"{CHECKPOINT}*")
        if path.is_dir() and path.name.removeprefix(CHECKPOINT).isdecimal()
    }
    return sorted(found, key=found.__getitem__, reverse=True)  # not by name: a millionth step has a digit more


def read_manifest(folder: Path) -> dict:
    """checkpoint.json, which is as it was written; ValueError and others if it is not."""
    manifest = json.loads(read_text(folder / MANIFEST_NAME))
    if manifest.pop("hash") != _digest(manifest):
        raise ValueError("a value in it has changed")
    for key in MANIFEST_KEYS:
        manifest[key]
    return manifest


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turns a full or forbidden disk into one message; what is whole on it stays."""
    try:
        yield
    except Exception as error:
        if (found := files.system_error(error)) is None:
            raise
        whole = [folder.name for folder in folders(output) if not _inspect(folder)[0]] if output.is_dir() else []
        kept = "There is no checkpoint yet."
        if whole:
            kept = f"The last whole checkpoint is {whole[0]}; in the same folder the run resumes from there."
        raise files.cannot_write(f"into {output}", found, "output=FOLDER", kept) from error


def _write_state(path: Path, state: dict) -> None:
    """`torch.save`, tensor by tensor: the optimiser of a whole network is larger than the network."""
    import torch

    failed: list[OSError] = []  # torch reports a full disk in words that name neither

    with open(path, "wb") as file:

        def write(data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        try:
            torch.save(state, SimpleNamespace(write=write, flush=file.flush))
        except (OSError, RuntimeError) as error:
            raise failed[0] if failed else error from None


def _inspect(folder: Path) -> tuple[str, dict]:
    """What is wrong with a checkpoint, if anything, and its manifest."""
    try:
        manifest = read_manifest(folder)
        for name in sorted({STATE_NAME, *manifest["files"]}):
            if _fingerprint(folder / name) != manifest["files"][name]:
                return f"{name} has changed since it was written", {}
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}", {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_NAME} is not whole: {type(error).__name__} {error}", {}
    return "", manifest


def _digest(manifest: dict) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> list:
    with open(path, "rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]
