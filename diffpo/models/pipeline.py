"""Where a model comes from, a pipeline's folder or the hub; single_file.py has the same methods for one file."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..config import Model
from .pretrained import dtype_option, local, readable

if TYPE_CHECKING:
    import torch


class Pipeline:
    """A pipeline in diffusers' format.

    Attributes:
        name_or_path: what diffusers takes for it: the folder, or the hub id.
        missing: parts whose weights are elsewhere.
    """

    missing: tuple[str, ...] = ()

    def __init__(self, settings: Model) -> None:
        self.settings, self.path, self.name_or_path = settings, settings.path, local(settings.path)
        self.revision = settings.revision
        self.options = {"revision": settings.revision, "variant": settings.variant}

    def index(self) -> dict[str, Any]:
        """Its model_index.json."""
        index = Path(self.name_or_path) / "model_index.json"
        with readable(self.path):
            if not os.path.isdir(self.name_or_path):
                from huggingface_hub import hf_hub_download

                limit_waiting()
                index = Path(hf_hub_download(self.path, "model_index.json", revision=self.revision))
            elif not index.exists() and (files := sorted(index.parent.glob("*.safetensors"))):
                raise DiffpoError(
                    f"{index.parent} holds no model_index.json, so it is no pipeline; if {files[0].name} is the model, "
                    f"name the file itself: {files[0]}"
                )
            return read_index(index)

    def config(self, part: str) -> dict[str, Any]:
        """The config.json of a part."""
        with readable(self.path):
            return read_config(self.name_or_path, part, self.revision)

    def require(self, parts: set[str]) -> None:
        """A missing part is found when it is loaded."""

    def fits(self, part: str, module: torch.nn.Module) -> None:
        """diffusers checks it when it loads the weights."""

    def module(self, cls: Any, part: str, dtype: torch.dtype) -> torch.nn.Module:
        """A part of the class ``cls`` with its weights, on the CPU."""
        with readable(self.path):
            return cls.from_pretrained(self.name_or_path, subfolder=part, **self.options, **dtype_option(dtype))

    def pipeline(self, dtype: torch.dtype | dict[str, torch.dtype], **parts: Any) -> Any:
        """The whole pipeline on the CPU. ``parts`` replace its own (None: left out) or are options of its class."""
        from diffusers import DiffusionPipeline

        with readable(self.path):
            return DiffusionPipeline.from_pretrained(self.name_or_path, **self.options, **dtype_option(dtype), **parts)

    def files(self) -> list[Path]:
        """Its files on this machine, in the folder or in the hub's cache; nothing is downloaded."""
        if os.path.isdir(self.name_or_path):
            return listed(Path(self.name_or_path))
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(self.path, "model_index.json", revision=self.revision)
        return listed(Path(index).parent) if isinstance(index, str) else []

    def fingerprint(self) -> str:
        """Of a folder, the hash of everything in it that decides an image; of a hub id, the commit in the cache."""
        if not os.path.isdir(self.name_or_path):
            return f"commit:{self._folder.name}"
        return hash_of(self._folder, ".safetensors", ".json", ".txt", ".bin")

    def stored(self, part: str) -> str | None:
        """What most weights of a part are stored in, by safetensors' name; None without safetensors."""
        from safetensors import safe_open

        # not the variants, as in model.fp16.safetensors
        files = sorted(
            path for path in (self._folder / part).glob("*.safetensors") if re.fullmatch(r"[\w-]+", path.stem)
        )
        if not files:
            return None
        with safe_open(files[0], "pt") as file:
            return Counter(file.get_slice(name).get_dtype() for name in file.keys()).most_common(1)[0][0]

    @functools.cached_property
    def _folder(self) -> Path:
        """The folder, or the hub's whole pipeline in the cache."""
        from diffusers import DiffusionPipeline

        if os.path.isdir(self.name_or_path):
            return Path(self.name_or_path)
        limit_waiting()
        with readable(self.path):
            return Path(DiffusionPipeline.download(self.path, **self.options))


def listed(folder: Path) -> list[Path]:
    """The files of a pipeline or of one of its parts, as absolute paths."""
    folder = folder.absolute()
    return [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]


def read_index(path: Path) -> dict[str, Any]:
    """A model_index.json that says its pipeline's class. DiffpoError for anything else."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index["_class_name"], str):
            raise TypeError(f"_class_name is {index['_class_name']!r}")
        return index
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DiffpoError(f"{path} does not describe a diffusers pipeline ({error!r})") from None


def read_config(name_or_path: str | Path, part: str, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a part of the pipeline in the folder or hub repository ``name_or_path``."""
    from diffusers import ConfigMixin

    class Reader(ConfigMixin):
        config_name = "scheduler_config.json" if part == "scheduler" else "config.json"

    return dict(Reader.load_config(str(name_or_path), subfolder=part, revision=revision))


def hash_of(folder: Path, *kinds: str) -> str:
    """sha256 over all files below ``folder`` whose names end in one of ``kinds``."""
    total = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in kinds):
        with open(path, "rb") as file:
            total.update(path.relative_to(folder).as_posix().encode() + file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()}"
