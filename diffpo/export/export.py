"""`diffpo export`: a LoRA in the formats of other programs, written whole or not at all, and read back before it is
kept.

OUT/pytorch_lora_weights.safetensors   diffusers: for `pipe.load_lora_weights`
OUT/<OUT's name>.safetensors           kohya: for ComfyUI, A1111 and Forge (kohya.py)
OUT/<OUT's name>.safetensors           comfyui: of every kind, for ComfyUI (comfyui.py)
OUT/model_index.json, ...              merged: a pipeline that needs no LoRA any more
OUT/<OUT's name>.safetensors           single: the same as one file, for ComfyUI, A1111 and Forge (models/layouts.py)
OUT/README.md                          the model card
OUT/images/                            pictures that it shows, with --results
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..common import hub, lock
from ..common.errors import DiffpoError
from ..common.files import beside, whole_folder, writing
from ..common.run_folder import CHECKPOINT
from ..common.text import plain
from ..config import Model
from ..models import Family, file_write, layouts
from ..weights import full, lora_apply, lora_change, lora_file, trained
from ..weights.lora_change import Change, Place
from ..weights.lora_file import FILE_NAME
from . import comfyui, kohya, pictures
from .card import Shown, evaluation_table, export_card, is_hub_id, training_table, usage

MERGED = ("merged", "single")  # a model without a LoRA
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names of dtypes


@dataclass(frozen=True)
class Export:
    """What is exported, and how. The defaults of `diffpo export` are here.

    Attributes:
        lora: a LoRA file, or a folder that holds a LoRA or a network that was trained as a whole.
        to: diffusers, kohya, comfyui, merged or single. The last two also take LoRAs from elsewhere and whole networks.
        model: the base model: a pipeline's folder, a hub id or one file.
        out: a new folder.
        model_config, family: as `Model.config` and `Model.family`.
        dtype: a torch dtype by name; None is the LoRA's own, or what each part of the model is stored in.
        scale: the strength of the LoRA, for merged and single.
        results: a folder of `diffpo eval`, for the model card.
        push: a hub repository to upload ``out`` to.
    """

    lora: str | Path
    to: str
    model: str
    out: str | Path
    model_config: str | Path | None = None
    family: str | None = None
    dtype: str | None = None
    scale: float = 1.0
    results: str | Path | None = None
    push: str | None = None

    def base(self) -> Model:
        """The settings of the base model."""
        return models.named(self.model, self.model_config, self.family)


def run(export: Export) -> Path:
    """Write ``export``; returns its folder.

    Raises DiffpoError if the folder is not empty, the LoRA is damaged or not of this model, the family has no such
    format, the disk is full, or the hub cannot be reached; nothing half-written stays in the folder.
    """
    out, to, base = Path(export.out).expanduser().resolve(), export.to, export.base()
    _check_target(out, export)
    file = trained.find(export.lora)
    whole = file.is_dir()
    if whole and (to not in MERGED or export.scale != 1):
        raise DiffpoError(
            f"{file} is a whole network, not a LoRA: export it with --to merged or single, without --scale"
        )
    weights, about = ({}, full.read_about(file)) if whole else lora_file.read_lora(file)
    lora_hash = trained.file_hash(file)
    measured, shown = "", list[pictures.Pair]()
    if export.results:
        results = Path(export.results).expanduser()
        measured, shown = evaluation_table(results, lora_hash), pictures.pairs(results)
        if not shown:
            print(f"{results} holds no pictures of base and tuned, so the card shows none")
    pipeline = models.pipeline_class(base)
    family = models.family_class(base, pipeline)
    if to == "kohya":
        kohya.format_of(family)
    if to == "comfyui":
        comfyui.require(family)
    if to == "single":
        layouts.check_pipeline(pipeline)
    _check_weights(file, weights, family.component, to)
    api = hub.client(export.push) if export.push else None

    with lock.held(out, beside(out, "lock")), _quiet_diffusers():
        encoders = {name.partition(".")[0] for name in weights if name.startswith("text_encoder")}
        pipe, source = _load(base, family, export, encoders)
        changes = {} if whole else lora_apply.check_lora(pipe, file)
        layers = {} if to in MERGED else {name: _by_layer(file, name, each) for name, each in changes.items()}
        if to == "kohya":
            kohya.check_kind(lora_change.kind_of(layers[family.component]))
        name = {"diffusers": FILE_NAME, "merged": ""}.get(to, f"{out.name}.safetensors")
        with writing(out, "--out", kept="Nothing is left there."), whole_folder(out) as part:
            if to == "diffusers":
                _copy(file, part)
            elif to == "kohya":
                kohya.write(part / name, family, pipe, layers[family.component], export.dtype, about)
            elif to == "comfyui":
                comfyui.write(part / name, family, pipe, layers, export.dtype, about)
            else:
                if whole:
                    trained.load_into(pipe, file)
                for component, changed in changes.items():  # a LoRA from elsewhere may change text encoders too
                    lora_change.merge(pipe.components[component], changed, export.scale)
                if to == "single":
                    file_write.write(part / name, pipe, source)
                else:
                    pipe.save_pretrained(part)
                    _tidy(part, source.index())
            run_folder = file.parent.parent if file.parent.name.startswith(CHECKPOINT) else file.parent
            curves = training_table(run_folder, about["step"]) if "step" in about else ""
            model = export.model if is_hub_id(export.model) else about.get("base", {}).get("name") or export.model
            lokr = lora_change.kind_of(layers.get(family.component)) == "lokr"
            part_name = family.component if lokr else None
            how = usage(to, name, model, pipeline, trained.knows_users(file), part_name)
            pictures.copy(shown, part)
            card = export_card(model, about, "full" if whole else to, Shown(how, [curves, measured], shown), lora_hash)
            (part / "README.md").write_text(card, encoding="utf-8")
    print(f"the export is in {out}" + (f" ({name})" if name else ""))
    if api and export.push:
        hub.push(api, export.push, out)
    return out


def _by_layer(file: Path, part: str, changed: list[tuple[Place, Change]]) -> dict[str, Change]:
    layers = lora_change.by_layer(changed)
    if layers is None:
        raise DiffpoError(
            f"{file} has one change for several layers of the {part}, which cannot be divided by layers; use --to "
            f"merged"
        )
    return layers


def _copy(file: Path, part: Path) -> None:
    """The LoRA as it is, with its user tokens if it has some."""
    shutil.copyfile(file, part / FILE_NAME)
    if lora_file.users_file(file).is_file():
        shutil.copyfile(lora_file.users_file(file), part / lora_file.USERS_FILE_NAME)


def _check_target(out: Path, export: Export) -> None:
    if out.suffix == ".safetensors":
        raise DiffpoError(f"--out is a folder, for the file and its card: {out.with_suffix('')}, for example")
    try:
        occupied = out.exists() and any(out.iterdir())
    except OSError as error:  # a file, too long a name, a folder that this user may not look into
        raise DiffpoError(f"cannot use {out}: {error.strerror}; choose another folder with --out") from None
    if occupied:
        raise DiffpoError(f"{out} is not empty; choose another folder with --out, or delete this one")
    if export.scale != 1 and export.to not in MERGED:
        raise DiffpoError(
            "--scale is only for --to merged and single; otherwise set the strength where you load the LoRA"
        )
    if export.dtype and export.to == "diffusers":
        raise DiffpoError("--to diffusers copies the LoRA as it is: leave --dtype out")


def _check_weights(file: Path, weights: dict[str, torch.Tensor], component: str, to: str) -> None:
    """DiffpoError unless the weights are finite and, if they are not merged, belong to the network alone under today's
    names."""
    names = rf"({component}|text_encoder\w*)\..+\.(lora_[AB]\.weight|lora_magnitude_vector|lokr_\w+)"
    foreign = [name for name in weights if not re.fullmatch(names, name)]
    if to == "kohya" and any(name.startswith("text_encoder") for name in weights):
        raise DiffpoError(f"{file} adapts text encoders, which --to kohya does not write: use --to comfyui")
    if foreign and to not in MERGED:
        raise DiffpoError(
            f"{file} holds {plain(foreign[0], 200)}, which is not a LoRA weight that diffpo writes for a {component}. "
            f"Export the LoRA of a training run, or use --to merged, which takes other LoRAs too"
        )
    for name, value in weights.items():
        # LyCORIS writes alphas that mean nothing, and in half precision are infinite
        if value.is_floating_point() and not name.endswith(".alpha") and not value.float().isfinite().all():
            raise DiffpoError(f"{file}: {plain(name, 200)} is not finite; export an earlier checkpoint")


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide diffusers' remarks on text encoders that were left out and on float16 on a CPU. They do not matter here, and
    errors are checked."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(model: Model, family: type[Family], export: Export, encoders: set[str]) -> tuple[Any, Any]:
    """The pipeline, in the export's dtype or as it is stored, and its source; the network alone unless it is merged,
    and the text ``encoders`` that the LoRA adapts."""
    source, to, dtype = models.source_of(model), export.to, export.dtype
    parts = [name for name, value in source.index().items() if isinstance(value, list) and value[0]]
    left_out: dict[str, Any] = {}
    if to not in MERGED:
        left_out = {
            name: None for name in parts if name not in (family.component, "scheduler", *encoders)
        } | family.without
        dtype = None  # the LoRA's, not the base's
    if to == "single":  # what the file lacks stays where it is
        left_out = {name: None for name in source.missing}
    stored = {} if dtype else {name: source.stored(name) for name in parts if name not in left_out}
    dtypes = {name: _kept(model, name, kind, to) for name, kind in stored.items() if kind}
    return models.load_pipeline(model, dtype or dtypes or "float32", "cpu", **left_out), source


def _kept(model: Model, part: str, stored: str, to: str) -> str:
    """The precision to load a part in. A LoRA that is not merged does not need the base's precision, and in float16 its
    small weights vanish."""
    if to not in MERGED:
        return "float32" if stored in ("F32", "F16") else "bfloat16"
    if stored not in STORED:
        raise DiffpoError(
            f"the {part} of {model.path} is stored in {stored}: add --dtype, e.g. --dtype bfloat16, to write it"
        )
    return STORED[stored]


def _tidy(folder: Path, before: dict[str, Any]) -> None:
    """Correct what `save_pretrained` wrote. It leaves out entries of model_index.json that belong to no part, such as
    DiT's class names, and adds the base model's path on this disk."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved.pop("_name_or_path", None)
        if path.parent == folder:
            saved |= {k: v for k, v in before.items() if k not in saved and k[0] != "_" and not isinstance(v, list)}
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
