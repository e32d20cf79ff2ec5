"""Whose folder is it? A run writes into an empty folder, or goes on in its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..common import lock
from ..common.errors import DiffpoError
from ..common.run_folder import BEST, BETA, BETAS, CONFIG_NAME, METRICS_NAME, SAMPLES, TRACKED
from ..common.text import plain, read_text
from ..config import Config, ScorerConfig, load_config, stored_identity
from ..config.reader import parsed
from . import checkpoint

COMMANDS: dict[type[BaseModel], str] = {Config: "train", ScorerConfig: "train-scorer"}
OLD_STATE = "unfinished.pt"  # what `train-scorer` saved before it wrote checkpoints
CHOOSE = "Choose another folder with output=FOLDER"


def check_folder(config: Config | ScorerConfig) -> None:
    """May ``config.output`` be this run's folder? Nothing is written.

    A folder with checkpoints belongs to the run whose settings stand in them (in those of older versions: in
    config.yaml). A run that failed before its first checkpoint has nothing to lose, so its settings may be changed.
    Raises DiffpoError if the folder holds something else, or a run whose settings differ in what they compute.
    """
    output, ours = config.output, config.identity()
    try:
        saved = bool(checkpoint.folders(output))
    except OSError:  # check_unused reports it
        saved = False
    if not saved:
        check_unused(output)
        return
    for where, theirs in _settings(output, type(config)):
        if theirs != ours:
            raise DiffpoError(
                f"{output} holds another run, with other settings in {where} ({differences(theirs, ours)}). {CHOOSE}, "
                f"or delete this one"
            )


def check_unused(output: Path) -> None:
    """DiffpoError if ``output`` holds anything but what a run leaves that ended before it saved something."""
    try:
        names = {path.name for path in output.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:  # a file, too long a path, a folder that this user may not look into
        raise DiffpoError(f"cannot use {output}: {error.strerror}. {CHOOSE}") from None
    if OLD_STATE in names:
        raise DiffpoError(
            f"{output / OLD_STATE} was saved by an older version of diffpo, and this one cannot resume it. {CHOOSE}, "
            f"or finish the run with that version"
        )
    left = {lock.NAME, BETA, BETAS}
    if CONFIG_NAME in names:
        left |= {CONFIG_NAME, METRICS_NAME, TRACKED, "tensorboard", SAMPLES, BEST}
    if other := sorted(name for name in names - left if not (name.startswith(".") and name.endswith(".part"))):
        raise DiffpoError(
            f"{output} is not the folder of a training run: it holds {plain(other[0], 100)} and no checkpoint. {CHOOSE}"
        )
    if CONFIG_NAME in names and not _written_by_a_run(output / CONFIG_NAME):
        raise DiffpoError(
            f"{output / CONFIG_NAME} was not written by a run, and would be overwritten. {CHOOSE}, or move it away"
        )


def _written_by_a_run(path: Path) -> bool:
    """Runs write plain YAML without comments; of what people wrote, nothing may be lost."""
    try:
        text = read_text(path)
        return yaml.safe_dump(parsed(text), sort_keys=False, allow_unicode=True) == text
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _settings(output: Path, kind: type[Config | ScorerConfig]) -> Iterator[tuple[Path, dict]]:
    """What the checkpoints in ``output`` were computed with, by `Config.identity`, and where that stands."""
    found = False
    for folder in checkpoint.folders(output):
        try:
            settings = checkpoint.read_manifest(folder)["settings"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # damaged, which `checkpoint.latest` reports, or an older version's
        found = True
        where = folder / checkpoint.MANIFEST_NAME
        yield where, _identity(settings, kind, where)
    written = output / CONFIG_NAME
    if not found and not written.exists():
        raise DiffpoError(f"{output} has no record of the settings of its checkpoints. {CHOOSE}")
    if not found:
        yield written, load_config(written, (), kind, imports=False).identity()


def _identity(settings: Any, kind: type[Config | ScorerConfig], where: Path) -> dict:
    """`Config.identity` of the settings in a checkpoint; DiffpoError if they are not of this ``kind`` of run."""
    for other, command in COMMANDS.items():
        if other is not kind and isinstance(settings, dict) and settings.keys() == other.model_fields.keys():
            raise DiffpoError(f"{where} belongs to a run of `diffpo {command}`. {CHOOSE}")
    try:
        return stored_identity(settings, kind)
    except (ValidationError, RecursionError) as error:
        what = "they are nested too deep"
        if isinstance(error, ValidationError):
            fault = error.errors(include_url=False)[0]
            what = plain(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}", 200)
        raise DiffpoError(
            f"{where} holds settings that this version of diffpo does not have ({what}). {CHOOSE}, or continue with "
            f"the version that wrote them"
        ) from None


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
