"""The run folder: whose it is, and checkpoints that are whole or not there.

A checkpoint is a folder checkpoint-000100/ with what is trained (in diffusers' own format), state.pt (optimiser,
schedule, scaler: tensors and numbers, read back without unpickling code) and checkpoint.json, which lists the others'
sizes and hashes. It is written under another name, flushed, and renamed, so a crash leaves either the whole of it or
nothing under its name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .config import Config, load_config
from .errors import DiffpoError

CONFIG_NAME = "config.yaml"
STATE_NAME = "state.pt"
MANIFEST_NAME = "checkpoint.json"
MANIFEST_KEYS = ("step", "base", "data_hash", "pairs_per_update", "files")  # what resuming relies on
PREFIX = "checkpoint-"


def check_folder(config: Config) -> None:
    """May ``config.output`` be this run's folder? Nothing is written.

    Raises DiffpoError if the folder holds something else, or a run whose settings differ in what they compute. (A run
    that failed before its first checkpoint has nothing to lose: its settings may be mended.)
    """
    output, written = config.output, config.output / CONFIG_NAME
    try:
        written.exists()
    except OSError as error:  # too long a path, a folder that this user may not look into
        raise DiffpoError(f"cannot use {output}: {error.strerror}; choose another folder with output=FOLDER") from None
    if written.exists() and _folders(output):
        theirs, ours = load_config(written).identity(), config.identity()
        differing = [f"{key}: {a!r} there, {b!r} here" for key, a, b in _differences(theirs, ours)]
        if differing:
            raise DiffpoError(
                f"{output} holds another run ({'; '.join(differing)}). Choose another folder with output=FOLDER, or "
                f"delete this one"
            )
    elif not written.exists() and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DiffpoError(
            f"{output} is not empty and is not a training run's folder; choose another with output=FOLDER"
        )


def claim(config: Config) -> None:
    """Make ``config.output`` this run's folder and write the resolved config into it; DiffpoError as `check_folder`."""
    check_folder(config)
    with disk_errors(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
        write_atomic(config.output / CONFIG_NAME, config.to_yaml().encode())


def _differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), f"{prefix}{'.' if prefix else ''}{key}")
    elif one != other:
        yield prefix, one, other


def save(output: Path, step: int, write: Callable[[Path], Any], state: dict, about: dict, keep: int) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    ``write(folder)`` writes what is trained; ``about`` (JSON) goes into the manifest. If the disk is full, what is half
    written is removed, the checkpoints that exist stay, and a DiffpoError says so.
    """
    final = output / f"{PREFIX}{step:06d}"
    part = output / f".{final.name}.part"
    with disk_errors(output):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write(part)
            _write_state(part / STATE_NAME, state)
            paths = sorted(path for path in part.rglob("*") if path.is_file())
            files = {path.relative_to(part).as_posix(): _fingerprint(path) for path in paths}
            manifest = {"step": step, **about, "files": files}
            manifest["hash"] = _digest(manifest)
            (part / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
            for path in (*part.rglob("*"), part):
                sync(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            sync(output)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    for old in _folders(output)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(output: Path, say: Callable[[str], None] = print) -> tuple[Path, dict] | None:
    """The newest checkpoint that is whole, and its manifest; damaged ones are named and passed over.

    Raises DiffpoError if there are checkpoints and not one of them is whole.
    """
    folders = _folders(output)
    for folder in folders:
        problem, manifest = _inspect(folder)
        if not problem:
            return folder, manifest
        say(f"{folder} is damaged ({problem}); going back to the checkpoint before it")
    if folders:
        raise DiffpoError(
            f"every checkpoint in {output} is damaged: {', '.join(folder.name for folder in folders)}. Delete them to "
            f"start again from the beginning"
        )
    return None


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


def read_state(folder: Path) -> dict:
    """state.pt of a checkpoint: tensors and numbers, never code."""
    import torch

    try:
        return torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
    except Exception as error:  # refused pickles, and whatever damaged bytes lead torch to
        raise DiffpoError(f"cannot read {folder / STATE_NAME}: {' '.join(str(error).split())[:300]}") from error


def _folders(output: Path) -> list[Path]:
    """Newest first."""
    found = {
        path: int(path.name.removeprefix(PREFIX))
        for path in output.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()
    }
    return sorted(found, key=found.get, reverse=True)  # not by name: a millionth step has a digit more


def _inspect(folder: Path) -> tuple[str, dict]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        if manifest.pop("hash") != _digest(manifest):
            return f"{MANIFEST_NAME} is not what was written", {}
        for key in MANIFEST_KEYS:
            manifest[key]
        for name in sorted({STATE_NAME, *manifest["files"]}):
            if _fingerprint(folder / name) != manifest["files"][name]:
                return f"{name} is not what was written", {}
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


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk afterwards."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turns a full or forbidden disk into one message; what is whole on it stays."""
    try:
        yield
    except Exception as error:
        # other writers (tensorboard's) may wrap the system's error, with its words inside
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and not isinstance(error, OSError):
            raise
        reason = "the disk is full" if full else f"{getattr(error, 'strerror', None) or error}"
        advice = "Make room" if full else "Mend that, or choose another folder with output=FOLDER,"
        found = [folder.name for folder in _folders(output) if not _inspect(folder)[0]] if output.is_dir() else []
        kept = f"the last whole checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        raise DiffpoError(
            f"cannot write into {output}: {reason}; {kept}. {advice} and run the same command again"
            + (": it resumes from there" if found else "")
        ) from error
