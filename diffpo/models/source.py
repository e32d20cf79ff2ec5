"""Where a model's configs and weights come from: a pipeline's folder, a hub id, or one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..common import carried, devices
from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.text import plain
from ..config import Model
from . import autoencoders
from .file_header import is_one
from .pipeline import Pipeline
from .pretrained import hush
from .single_file import SingleFile

OPTIONS = {"path": "--model", "config": "--model-config", "family": "--family"}  # of the command line


def named(path: str | Path, config: str | Path | None = None, family: str | None = None) -> Model:
    """The settings of a model by what the command line has for it. DiffpoError for values that cannot be used."""
    try:
        return Model(path=carried.found(str(path)), config=None if config is None else str(config), family=family)
    except ValidationError as error:
        (problem, *_) = error.errors()
        option = OPTIONS[str(problem["loc"][0])]
        reason = problem["msg"].removeprefix("Value error, ")
        raise DiffpoError(f"{option} {plain(repr(problem['input']), 200)}: {reason}") from None


def pipeline_class(settings: Model) -> str:
    """The class of the model's pipeline by its name, as in model_index.json."""
    return source_of(settings).index()["_class_name"]


def source_of(settings: Model) -> Any:
    """Where the model's configs and weights come from: a `pipeline.Pipeline`, or a `single_file.SingleFile`."""
    if is_one(settings.path):
        return SingleFile(settings)
    if settings.config:
        raise DiffpoError(
            f"model.config (or --model-config) is only for a model in one file: leave it out, because {settings.path} "
            f"has its own configs"
        )
    return Pipeline(settings)


def load_pipeline(
    model: str | Model, dtype: str | dict[str, str] = "float32", device: str | None = None, **parts: Any
) -> Any:
    """A whole diffusers pipeline in inference mode, on ``device`` (default: `devices.best`).

    ``model``: its path alone, or with other settings. ``dtype`` is a torch dtype by name, or one for each part of the
    pipeline; ``parts`` replace its own (None: left out), or are options of its class.
    """
    import torch
    import transformers
    from diffusers.utils.logging import disable_progress_bar

    # a bar per weight file, gone within a second, hides what a run has to say
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    hush()
    device = device or devices.best()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DiffpoError(f"the device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if isinstance(dtype, dict):
        dtypes = {part: getattr(torch, name) for part, name in dtype.items()}
    else:
        dtypes = getattr(torch, dtype)
    limit_waiting()
    settings = model if isinstance(model, Model) else named(model)
    return source_of(settings).pipeline(dtypes, **parts).to(device)


def vae_factor(pipe: Any) -> int:
    """Pixels per latent of the network, each way."""
    return autoencoders.factor(pipe.vae.config)
