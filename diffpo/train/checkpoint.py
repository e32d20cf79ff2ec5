"""The run folder: whose it is, and checkpoints that are whole or not there.

A checkpoint is a folder checkpoint-000100/ with what is trained (in diffusers' own format), state.pt (optimiser,
schedule, scaler: tensors and numbers, read back without unpickling code) and checkpoint.json, which lists the others'
sizes and hashes. It is written under another name, flushed, and renamed, so a crash leaves either the whole of it or
nothing under its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from pydantic import ValidationError

from ..common import lock
from ..common.errors import DiffpoError
from ..common.files import sync, write_atomic
from ..common.run_folder import CHECKPOINT, CONFIG_NAME, METRICS_NAME
from ..common.text import plain, read_text
from ..config import Config, load_config, stored_identity
from ..config.reader import parsed

STATE_NAME = "state.pt"
MANIFEST_NAME = "checkpoint.json"
MANIFEST_KEYS = ("step", "base", "data_hash", "pairs_per_update", "files")  # what resuming relies on


def check_folder(config: Config) -> None:
    """May ``config.output`` be this run's folder? Nothing is written.

    A folder with checkpoints belongs to the run whose settings stand in them (in those of older versions: in
    config.yaml). Without, a run that failed before its first checkpoint has nothing to lose, and its settings may be
    mended. Raises DiffpoError if the folder holds something else, or a run whose settings differ in what they compute.
    """
    output, ours = config.output, config.identity()
    try:
        saved = bool(_folders(output))
    except OSError:  # which the next says
        saved = False
    if not saved:
        check_unused(output)
        return
    for where, theirs in _settings(output):
        if theirs != ours:
            raise DiffpoError(
                f"{output} holds another run ({differences(theirs, ours)}, by {where}). Choose another folder with "
                f"output=FOLDER, or delete this one"
            )


def check_unused(output: Path) -> None:
    """DiffpoError if ``output`` holds anything but what a run leaves that ended before it saved something."""
    choose = "choose another folder with output=FOLDER"
    try:
        names = {path.name for path in output.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:  # a file, too long a path, a folder that this user may not look into
        raise DiffpoError(f"cannot use {output}: {error.strerror}; {choose}") from None
    left = {lock.NAME, CONFIG_NAME, METRICS_NAME, "tensorboard"} if CONFIG_NAME in names else {lock.NAME}
    if other := sorted(name for name in names - left if not (name.startswith(".") and name.endswith(".part"))):
        raise DiffpoError(
            f"{output} is not empty and is not a training run's folder: it holds {plain(other[0], 100)}, and nothing "
            f"to resume from; {choose}"
        )
    if CONFIG_NAME in names and not _written_by_a_run(output / CONFIG_NAME):
        raise DiffpoError(
            f"{output / CONFIG_NAME} was not written by a run, and would be overwritten; {choose}, or move it away"
        )


def _written_by_a_run(path: Path) -> bool:
    """Runs write plain YAML without comments; of what people wrote, nothing may be lost."""
    try:
        text = read_text(path)
        return yaml.safe_dump(parsed(text), sort_keys=False, allow_unicode=True) == text
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _settings(output: Path) -> Iterator[tuple[Path, dict]]:
    """What the checkpoints in ``output`` were computed with, by `Config.identity`, and where that stands."""
    found = False
    for folder in _folders(output):
        try:
            settings = _manifest(folder)["settings"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # damaged, which `latest` reports, or an older version's
        found = True
        where = folder / MANIFEST_NAME
        try:
            yield where, stored_identity(settings)
        except (ValidationError, RecursionError) as error:
            what = "they are nested too deep"
            if isinstance(error, ValidationError):
                fault = error.errors(include_url=False)[0]
                what = plain(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}", 200)
            raise DiffpoError(
                f"{where} holds settings that this version of diffpo does not know ({what}); go on with the version "
                f"that wrote them, or choose another folder with output=FOLDER"
            ) from None
    written = output / CONFIG_NAME
    if not found and not written.exists():
        raise DiffpoError(
            f"{output} does not say with what settings its checkpoints were trained; choose another folder with "
            f"output=FOLDER"
        )
    if not found:
        yield written, load_config(written, imports=False).identity()


@contextlib.contextmanager
def claim(config: Config) -> Iterator[None]:
    """``config.output`` is this run's alone within this; DiffpoError as `check_folder`, or if it is in use."""
    check_folder(config)
    with lock.held(config.output):
        check_folder(config)  # another run may have ended there just now
        yield


def write_config(config: Any) -> None:
    """The resolved settings go into the run's folder."""
    with disk_errors(config.output):
        write_atomic(config.output / CONFIG_NAME, config.to_yaml().encode())


def differences(theirs: dict, ours: dict) -> str:
    """The settings at which two `Config.identity` differ, in words."""
    found = [f"{key}: {_brief(a)} there, {_brief(b)} here" for key, a, b in _differences(theirs, ours)]
    return "; ".join(found[:10] + ([f"and {len(found) - 10} more"] if len(found) > 10 else []))


def _brief(value: Any) -> str:
    return plain(repr(value), 100)


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
    final = output / f"{CHECKPOINT}{step:06d}"
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
            f"every checkpoint in {output} is damaged: {', '.join(folder.name for folder in folders)}. Choose another "
            f"folder with output=FOLDER, or delete this one to start again from the beginning"
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
        path: int(path.name.removeprefix(CHECKPOINT))
        for path in output.glob(f"{CHECKPOINT}*")
        if path.is_dir() and path.name.removeprefix(CHECKPOINT).isdecimal()
    }
    return sorted(found, key=found.get, reverse=True)  # not by name: a millionth step has a digit more


def _manifest(folder: Path) -> dict:
    """checkpoint.json, which is as it was written; ValueError and others if it is not."""
    manifest = json.loads(read_text(folder / MANIFEST_NAME))
    if manifest.pop("hash") != _digest(manifest):
        raise ValueError("a value in it has changed")
    for key in MANIFEST_KEYS:
        manifest[key]
    return manifest


def _inspect(folder: Path) -> tuple[str, dict]:
    try:
        manifest = _manifest(folder)
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


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turns a full or forbidden disk into one message; what is whole on it stays."""
    try:
        yield
    except Exception as error:
        # other writers (tensorboard's) may wrap the system's error, with its words inside
        full = getattr(error, "errno", None) in lock.FULL or "No space left" in str(error)
        if not full and not isinstance(error, OSError):
            raise
        reason = "the disk is full" if full else lock.reason(error)
        advice = "Make room" if full else "Mend that, or choose another folder with output=FOLDER,"
        found = [folder.name for folder in _folders(output) if not _inspect(folder)[0]] if output.is_dir() else []
        kept = f"the last whole checkpoint is {found[0]}" if found else "there is no checkpoint yet"
        raise DiffpoError(
            f"cannot write into {output}: {reason}; {kept}. {advice} and run the same command again"
            + (": it resumes from there" if found else "")
        ) from error
