"""The arms of an evaluation, as ``--arm NAME=WHAT`` names them: what makes the pictures of each, or where they lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.images import is_picture
from ..common.names import hint
from ..common.text import plain
from ..models.file_header import read_header
from ..weights import lora_file
from ..weights.full import WholeNetwork
from .generation import Generation
from .manifest import check_arm

INTERNAL = {"batch_size", "device", "paths", "model_hash", "lora_hash", "negative_lora_hash", "user_hash", "plan_hash"}
TYPES: dict[str, type] = {
    **dict.fromkeys(("seed", "images_per_prompt", "steps", "base_calls", "height", "width"), int),
    **dict.fromkeys(("guidance", "lora_weight", "negative_lora_weight"), float),
}
OWN = tuple(each.name for each in fields(Generation) if each.name not in INTERNAL)  # settings that an arm may have
SETTING = re.compile(r"([a-z][a-z_-]*)=(.*)", re.DOTALL)
WEIGHTED = re.compile(r"(.+)@([0-9]*\.?[0-9]+)", re.DOTALL)
OF_LORA = re.compile(r"lora|hada_w|oft_|\.diff(_b)?$|dora_scale", re.IGNORECASE)  # in names of weights
LORA_FILES = (lora_file.FILE_NAME, lora_file.PEFT_FILE_NAME)
EXAMPLE = "write NAME=WHAT, for example base, mine=runs/mine, or fast=lora=runs/mine,steps=8"

Source = Generation | Path  # of an arm's pictures: how they are made, or the folder that they are in


def read_arms(specs: Sequence[str], options: Mapping[str, Any]) -> dict[str, Source]:
    """The arms that ``specs`` name, in their order; the first is what the others are compared with.

    A spec is ``NAME=WHAT``. WHAT is ``base``; a LoRA file or the folder of a run, with ``@WEIGHT`` for its strength; a
    folder of pictures; a plan of `diffpo calibrate`; another model; or ``key=value,...`` of `OWN` and ``images``.
    ``base`` alone means ``base=base``. ``options``: of `Generation`, for every arm that does not set its own.

    Raises DiffpoError that names the arm: a name that cannot be a folder's, or that is there twice; a key that there is
    not; a value of another kind.
    """
    arms: dict[str, Source] = {}
    for spec in specs:
        name, equals, what = spec.partition("=")
        if not equals and name != "base":
            raise DiffpoError(f"--arm {plain(spec, 200)} has no name: {EXAMPLE}")
        check_arm(name)
        if name in arms:
            raise DiffpoError(f"--arm {plain(spec, 200)}: there are two arms of the name {name!r}; rename one")
        own = _settings(name, what or "base")
        if (images := own.pop("images", None)) is not None:
            if own:
                raise DiffpoError(f"--arm {name}: a folder of pictures has no {', '.join(own)}; leave that out")
            arms[name] = Path(images).expanduser().absolute()
            continue
        if own.get("plan") is not None:  # it has its own number of calls and solver
            own = {"steps": None, "solver": None} | own
        arms[name] = Generation(**{"model": "", **options, **own})
    return arms


def _settings(name: str, what: str) -> dict[str, Any]:
    """What an arm sets for itself: fields of `Generation`, or ``images``."""
    if not SETTING.match(what):
        return _found(name, what)
    own: dict[str, Any] = {}
    for part in what.split(","):
        setting = SETTING.fullmatch(part.strip())
        if setting is None:
            raise DiffpoError(f"--arm {name}: {plain(part, 100)!r} is not key=value; {EXAMPLE}")
        key, value = setting[1].replace("-", "_"), setting[2].strip()
        if key not in (*OWN, "images"):
            raise DiffpoError(f"--arm {name}: unknown setting {key!r}: {hint(key, [*OWN, 'images'])}")
        if key == "lora":
            own |= _weighted(value)
        elif key == "any_model":
            own[key] = value.lower() in ("true", "yes", "1")
        else:
            try:
                own[key] = TYPES.get(key, str)(value)
            except ValueError:
                kind = "a whole number" if TYPES[key] is int else "a number"
                raise DiffpoError(f"--arm {name}: {key} must be {kind}, not {plain(value, 60)!r}") from None
    return own


def _weighted(value: str) -> dict[str, Any]:
    """A LoRA's path and, behind the last @, its strength."""
    found = WEIGHTED.fullmatch(value)
    if found is None or Path(value).expanduser().exists():
        return {"lora": value}
    return {"lora": found[1], "lora_weight": float(found[2])}


def _found(name: str, what: str) -> dict[str, Any]:
    """The setting that ``what`` is: by its name, by what lies in the folder, or by the header of the file."""
    if what == "base":
        return {}
    weighted = _weighted(what)
    path = Path(weighted["lora"]).expanduser()
    if path.is_dir():
        if WholeNetwork.find(path) or any((path / each).is_file() for each in LORA_FILES):
            return weighted
        if (path / "model_index.json").is_file():
            return {"model": what}
        if (path / "manifest.jsonl").is_file() or (path / "images").is_dir() or _holds_pictures(path):
            return {"images": what}
        raise DiffpoError(
            f"--arm {name}: {path} is no arm: it holds neither a LoRA ({' or '.join(LORA_FILES)}), nor a pipeline "
            f"(model_index.json), nor pictures"
        )
    if not path.is_file():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", what) and not what.endswith(".safetensors"):
            return {"model": what}  # a hub id
        raise DiffpoError(f"--arm {name}: there is no file or folder {plain(path, 300)}; {EXAMPLE}")
    weights, metadata = read_header(path, str(path))
    if "samplers_plan" in metadata:
        return {"plan": what}
    return weighted if any(OF_LORA.search(key) for key in weights) else {"model": what}


def _holds_pictures(path: Path) -> bool:
    return any(is_picture(each.name) for each in path.iterdir())
