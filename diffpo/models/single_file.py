"""A model in one safetensors file with the original programs' names, as ComfyUI, A1111 and Forge read it.

The weights are the file's. The configs, tokenizers and the scheduler, which are not in it, are those of a pipeline:
`model.config`, else one of released.py, else a repository of the hub. So are parts that the file lacks.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import Counter
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.text import plain
from ..config import Model
from . import released
from .file_header import read_header
from .file_kind import kind_of, parts_of
from .file_parts import converted, reading, text_encoder
from .layouts import LAYOUTS
from .pipeline import Pipeline, hash_of, listed, read_config, read_index
from .pretrained import dtype_option, hub_failed, local

if TYPE_CHECKING:
    import torch

CONFIGS = ("*.json", "*.txt", "*.model")  # of a repository: all but the weights
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a pipeline that no file has
VELOCITY = "-v"  # behind the name of a released pipeline: its network predicts v
HUB = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
}
INPUTS = {  # channels that a network takes beside the 4 (FLUX: 64) of text-to-image
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing model",
    9: "an inpainting model",
    128: "FLUX Depth or Canny",
    384: "FLUX Fill, which is for inpainting",
}
FIRST = ("input_blocks.0.0.weight", "img_in.weight", "x_embedder.proj.weight")  # the layers that take them
SCALES = (".scale_weight", ".weight_scale")  # of fp8 weights, as ComfyUI writes them


class SingleFile:
    """A model in one file, with the methods of `pipeline.Pipeline`.

    Only the header is read until a part is asked for, and nothing is ever unpickled. DiffpoError, which names the file
    and what it is, for anything but a model of a family that diffpo trains.

    Attributes:
        parts: the parts of the pipeline that are in the file: {name in the part: name in the file}.
        missing: those that are not.
        name: whose configs are used: a folder, a hub id, or one of released.py, with `VELOCITY` perhaps.
    """

    def __init__(self, settings: Model) -> None:
        self.settings, self.file = settings, Path(os.path.expanduser(settings.path))
        self.weights, self.metadata = read_header(self.file, settings.path)
        self.kind = kind_of(self.file, self.weights)
        self.layout = LAYOUTS[self.kind]
        self.parts, self.strangers = parts_of(self.layout, self.weights)
        self.missing = [part for part in self.layout.parts if part not in self.parts]
        self.component = next(iter(self.layout.parts))
        self.name = settings.config or self._default()
        self.released = self.name.removesuffix(VELOCITY) in released.PIPELINES

    # ---- whose configs

    def _default(self) -> str:
        velocity = {"v": True, "epsilon": False}.get(self.metadata.get("modelspec.prediction_type", ""))
        velocity = True if "v_pred" in self.weights else velocity
        if self.kind == "sd2" and velocity is None:
            raise DiffpoError(
                f"{self.file} is {self.layout.title}, without a mark for noise or v prediction: set model.config (or "
                f"--model-config) to sd2 or to sd2{VELOCITY}. The released models for 768 px predict v"
            )
        if self.layout.examples:
            raise DiffpoError(
                f"{self.file} is {self.layout.title}, the network without its configs and text encoders: set "
                f"model.config (or --model-config) to the pipeline that it is of, e.g. "
                f"{' or '.join(self.layout.examples)}, or a folder of yours"
            )
        if self.kind in released.PIPELINES:
            return self.kind + (VELOCITY if velocity else "")
        inner = self.parts[self.component]
        if self.kind == "flux":
            return HUB["flux-dev" if "guidance_in.in_layer.weight" in inner else "flux-schnell"]
        if "joint_blocks.37.x_block.attn.qkv.weight" in inner:
            return HUB["sd3.5-large"]
        return HUB["sd3.5-medium" if "joint_blocks.0.x_block.attn2.qkv.weight" in inner else "sd3-medium"]

    @property
    def name_or_path(self) -> str:
        """What diffusers takes for the configs."""
        return str(self.folder)

    @property
    def lender(self) -> Pipeline:
        """The pipeline that has the parts which the file lacks."""
        here = self.released or os.path.isdir(local(self.name))
        return Pipeline(
            self.settings.model_copy(update={"path": self.name_or_path if here else self.name, "config": None})
        )

    @functools.cached_property
    def folder(self) -> Path:
        """Where its configs are on this machine."""
        if self.released:
            return released.folder(self.name.removesuffix(VELOCITY))
        folder = Path(local(self.name))
        if os.path.isdir(folder):
            if not (folder / "model_index.json").is_file():
                raise DiffpoError(f"model.config={self.name} is not the folder of a pipeline: no model_index.json")
            return folder
        if self.name.startswith(("/", ".", "~")) or self.name.count("/") > 1:
            raise DiffpoError(f"model.config={self.name}: there is no such folder; paths start from {Path.cwd()}")
        from huggingface_hub import snapshot_download

        limit_waiting()
        try:
            folder = Path(snapshot_download(self.name, revision=self.settings.revision, allow_patterns=[*CONFIGS]))
            if not (folder / "model_index.json").is_file():
                raise OSError("the copy in the cache holds no model_index.json")
            return folder
        except Exception as error:
            if not hub_failed(error):
                raise
            raise self._fetch(plain(error, 300)) from error

    def _fetch(self, reason: str) -> DiffpoError:
        """The error that says what to fetch from the hub."""
        wanted = [*CONFIGS, *(f"{part}/*.safetensors" for part in self.missing)]
        include = " ".join(f"--include '{pattern}'" for pattern in wanted)
        lacking = f" and what it lacks ({', '.join(self.missing)})" if self.missing else ""
        known = ", ".join([*released.PIPELINES, *(name + VELOCITY for name in ("sd2", "sdxl"))])
        none = f"not one of {known}, " if "/" not in self.name else ""
        return DiffpoError(
            f"{self.file} is {self.layout.title}. Its configs{lacking} come from {self.name!r}, which is {none}not a "
            f"folder in {Path.cwd()}, and not available from the hub. With a network, run `hf download {self.name} "
            f"{include}` once (log in with `hf auth login` if the model is gated). Without one, set model.config (or "
            f"--model-config) to a pipeline's folder. ({reason})"
        )

    def index(self) -> dict[str, Any]:
        index = read_index(self.folder / "model_index.json")
        known = (self.layout.pipeline, *self.layout.also)
        if index["_class_name"] not in known:
            raise DiffpoError(
                f"{self.file} is {self.layout.title}, but model.config={self.name} is a {index['_class_name']}: "
                f"name a {' or a '.join(known)}"
            )
        return index

    def config(self, part: str) -> dict[str, Any]:
        with self._reading(part):
            config = read_config(self.folder, part)
        if part == "scheduler" and self.kind in released.PIPELINES:
            if "v_pred" in self.weights or (self.released and self.name.endswith(VELOCITY)):
                config["prediction_type"] = "v_prediction"
            if "ztsnr" in self.weights:  # its last timestep is pure noise, where sampling begins (arXiv 2305.08891)
                config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config

    def require(self, parts: set[str]) -> None:
        """DiffpoError unless this is a text-to-image model of the configs' family, and each of ``parts`` is in the file
        or can be where the configs are."""
        self.index()
        inner, wanted = self.parts[self.component], self.config(self.component).get("in_channels")
        takes = next((self.weights[inner[name]].shape[1:2] for name in FIRST if name in inner), ())
        if self.layout.network is not None and wanted and takes != (wanted,):
            channels = takes[0] if takes else 0
            known = f" It is {INPUTS[channels]}." if channels in INPUTS else ""
            raise DiffpoError(
                f"the network in {self.file} takes {channels} input channels, but the configs of {self.name} give "
                f"{wanted}.{known} Use a text-to-image model, or set model.config (--model-config) to its own configs"
            )
        absent = [
            part for part in self.missing if part in parts and not any((self.folder / part).glob("*.safetensors"))
        ]
        if absent and self.lender.name_or_path != self.name_or_path:  # of the hub
            from huggingface_hub import constants

            if constants.HF_HUB_OFFLINE:
                raise self._fetch(f"HF_HUB_OFFLINE is set, and the cache has no {', '.join(absent)}")
        elif absent:
            vae = ", or model.vae to a VAE" if absent == ["vae"] else ""
            raise DiffpoError(
                f"{self.file} holds only {', '.join(self.parts)}. Set model.config (or --model-config) to the folder "
                f"or hub id of a pipeline that has {', '.join(absent)}{vae}"
            )

    # ---- the parts

    def fits(self, part: str, module: torch.nn.Module) -> None:
        """DiffpoError unless ``module`` (on the meta device will do) has as many weights as the file."""
        mine = self.parts[part]
        there = sum(math.prod(self.weights[mine[name]].shape) for name in mine if name not in self.layout.unused)
        here = sum(value.numel() for value in module.state_dict().values())
        if there != here:
            raise DiffpoError(
                f"the {part} in {self.file} has {there:,} weights, but the configs of {self.name} give {here:,}. "
                f"Set model.config (or --model-config) to a pipeline of the same architecture"
            )

    def module(self, cls: Any, part: str, dtype: torch.dtype) -> torch.nn.Module:
        if part not in self.parts:
            self.require({part})
            return self.lender.module(cls, part, dtype)
        with self._reading(part):
            if not hasattr(cls, "from_single_file"):
                config = cls.config_class.from_pretrained(str(self.folder), subfolder=part)
                return text_encoder(cls, config, self.layout.parts[part][0], self._state(part, dtype), dtype)
            state = self._state(part, dtype)
            if self.layout.network is not None or part != self.component:  # the other converters expect no prefix
                state = {self.parts[part][name]: value for name, value in state.items()}
            return converted(cls, state, (self.name_or_path, part), dtype, self.layout.unused)

    def _state(self, part: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The part's weights by their names in it; fp8 in ``dtype``, multiplied by its scale if it has one."""
        from safetensors import safe_open

        state = {}
        with safe_open(self.file, "pt") as file:
            for name, full in self.parts[part].items():
                value, kind = file.get_tensor(full), self.weights[full].dtype
                scales = [scale for end in SCALES if (scale := full.removesuffix(".weight") + end) in self.weights]
                if scales and not kind.startswith("F8"):
                    raise ValueError(f"{full} is quantised as {kind}; take the model in fp16, bf16 or fp8")
                if scales:
                    value = value.float() * file.get_tensor(scales[0]).float()
                state[name] = value.to(dtype) if kind.startswith("F8") else value
        return state

    def _reading(self, part: str) -> contextlib.AbstractContextManager[None]:
        return reading(f"the {part} of {self.file}", self.name)

    def pipeline(self, dtype: torch.dtype | dict[str, torch.dtype], **parts: Any) -> Any:
        from diffusers import DiffusionPipeline

        index = self.index()
        there = {name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]}
        there -= parts.keys()
        self.require(there)
        if self.strangers:
            print(
                f"{self.file}: {len(self.strangers)} weights belong to no part of {self.layout.title} and were not "
                f"read, e.g. {plain(self.strangers[0])}"
            )
        for name in there.intersection(self.parts):
            parts[name] = self.module(self._class(name), name, dtype[name] if isinstance(dtype, dict) else dtype)
        if "scheduler" in there:
            parts["scheduler"] = self._class("scheduler").from_config(self.config("scheduler"))
        for name in there.intersection(OPTIONAL):
            parts[name] = None
        if "safety_checker" in there:
            parts["requires_safety_checker"] = False
        if there.intersection(self.missing):
            return self.lender.pipeline(dtype, **parts)
        with self._reading("tokenizer"):
            return DiffusionPipeline.from_pretrained(self.name_or_path, **dtype_option(dtype), **parts)

    def _class(self, part: str) -> Any:
        """The class of a part, of diffusers' and transformers' alone."""
        import diffusers
        import transformers

        library, name = self.index()[part]
        found = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(name), None)
        if found is None:
            raise DiffpoError(f"{self.folder / 'model_index.json'}: {part} is not a class of diffusers or transformers")
        return found

    def files(self) -> list[Path]:
        """The file, and those of the pipeline with its configs and missing parts."""
        lent = self.lender.files() if self.missing and self.lender.name_or_path != self.name_or_path else []
        return [self.file.absolute(), *listed(self.folder), *lent]

    def fingerprint(self) -> str:
        """A hash of the file and of all else that decides an image."""
        total = sha256()
        with open(self.file, "rb") as file:
            total.update(file_digest(file, "sha256").digest())
        if self.lender.name_or_path == self.name_or_path:
            total.update(f"{self.name}{hash_of(self.folder, *(k[1:] for k in CONFIGS), '.safetensors')}".encode())
        else:
            total.update(self.folder.name.encode())  # the commit
        return f"sha256:{total.hexdigest()}"

    def stored(self, part: str) -> str | None:
        if part in self.missing:
            return self.lender.stored(part)
        counts = Counter(self.weights[name].dtype for name in self.parts.get(part, {}).values())
        return counts.most_common(1)[0][0] if counts else None
