"""Model families: the only place that knows a family's conditioning. One file each, the same few methods (family.py).

`load` reads the pipeline's own model_index.json to tell the family; `load_pipeline` gives the whole pipeline, for
generation. Where configs and weights come from is in pipeline.py, or in single_file.py for a model that is one file.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.text import plain
from ..config import Model

# the class that model_index.json names -> file here, class in it
FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "PixArtAlphaPipeline": ("pixart", "PixArt"),
    "PixArtSigmaPipeline": ("pixart", "PixArt"),
    "FluxPipeline": ("flux", "Flux"),
    "DiTPipeline": ("dit", "DiT"),
}


def named(path: str | Path, config: str | Path | None = None) -> Model:
    """The settings of a model of which no more is said, as on the command line. DiffpoError for a name that is none."""
    try:
        return Model(path=str(path), config=None if config is None else str(config))
    except ValidationError as error:
        (problem, *_) = error.errors()
        option = "--model-config" if problem["loc"] == ("config",) else "--model"
        reason = problem["msg"].removeprefix("Value error, ")
        raise DiffpoError(f"{option} {plain(repr(problem['input']), 200)}: {reason}") from None


def load(settings: Model, precision: str = "no", resolution: int = 1024) -> Any:
    """The family of ``settings.path``; nothing large is read yet. ``precision``: no | bf16 | fp16; ``resolution`` of
    the images in pixels."""
    return family_class(pipeline_class(settings), settings.path)(settings, precision, resolution)


def family_class(name: str, path: str) -> Any:
    """The class here for a pipeline's class by its name; ``path`` is for the error."""
    if name not in FAMILIES:
        raise DiffpoError(f"{path} is a {name}; diffpo trains {', '.join(FAMILIES)}")
    module, cls = FAMILIES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)


def pipeline_class(settings: Model) -> str:
    """The class of the model's pipeline by its name, as in model_index.json."""
    return source(settings).index()["_class_name"]


def source(settings: Model) -> Any:
    """Where the model's configs and weights come from: a `pipeline.Pipeline`, or a `single_file.SingleFile`."""
    from . import single_file
    from .pipeline import Pipeline

    if single_file.is_one(settings.path):
        return single_file.SingleFile(settings)
    if settings.config:
        raise DiffpoError(
            f"model.config (or --model-config) is for a model that is one file; {settings.path} has its own configs"
        )
    return Pipeline(settings)


def load_pipeline(
    model: str | Model, dtype: str | dict[str, str] = "float32", device: str | None = None, **parts: Any
) -> Any:
    """A whole diffusers pipeline in inference mode, on ``device`` (default: cuda if there is one).

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
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DiffpoError(f"the device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    dtypes = {part: getattr(torch, name) for part, name in dtype.items()} if isinstance(dtype, dict) else None
    limit_waiting()
    settings = model if isinstance(model, Model) else named(model)
    return source(settings).pipeline(dtypes or getattr(torch, dtype), **parts).to(device)


HARMLESS = (
    "No LoRA keys associated to CLIPTextModel",  # our LoRAs adapt the UNet alone
    "Token indices sequence length is longer than",  # it is truncated; `too_long` counts what is
    "The following part of your input was truncated",  # the same, with all of the text
    "should be kept in float32: []",  # none should; of networks from one file
)
# peft imports bitsandbytes whether it is used or not, which then misses kernels of the hub
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def hush() -> None:
    """Keep the libraries' remarks in `HARMLESS` from the user; everything else they say is shown."""
    for library in ("diffusers", "transformers"):
        for handler in logging.getLogger(library).handlers:
            if _worth_saying not in handler.filters:
                handler.addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in HARMLESS)


def too_long(pipe: Any, texts: Sequence[str]) -> str:
    """One sentence on the texts that the text encoder does not read to their end; empty if it reads all."""
    # the last encoder reads the most: T5's limit is the pipeline's, CLIP's its tokenizer's
    names = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if getattr(pipe, name, None) is not None]
    if not names:
        return ""
    tokenizer = getattr(pipe, names[0])
    cut = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
    limit = tokenizer.model_max_length if cut is None else cut.default
    longer = sum(len(ids) > limit for ids in tokenizer(list(texts)).input_ids)
    if not longer:
        return ""
    return (
        f"{longer} of {len(texts)} texts have more than the {limit} tokens that the model reads; their ends are cut off"
    )


def text_width(network: Any) -> int:
    """The width of the text embedding that the network attends to. DiffpoError for networks that attend to none, or
    that mask the padding."""
    config = network.config
    width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
    if type(network).__name__ in ("PixArtTransformer2DModel", "DiTTransformer2DModel") or not width:
        raise DiffpoError(
            f"a {type(network).__name__} has no place for user tokens: it takes no text embedding of fixed length; use "
            f"an objective without users"
        )
    return width


def vae_factor(pipe: Any) -> int:
    """Pixels per latent, each way."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def local(path: str) -> str:
    """``~`` expanded where the path is a folder here; a hub id as it is."""
    folder = os.path.expanduser(path)
    return folder if os.path.isdir(folder) else path


def dtype_option(dtype: Any) -> dict[str, Any]:
    """`from_pretrained`'s name for the dtype: diffusers 0.42 renamed torch_dtype."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what `from_pretrained` raises for a model that cannot be had into one message with the next step."""
    try:
        yield
    except Exception as error:
        if not hub_failed(error):
            raise
        reason, first = (" ".join(str(each).split())[:300] for each in (error, _first_cause(error)))
        if os.path.isdir(local(path)):
            raise DiffpoError(f"cannot read the model in {path}: {reason}") from error
        if path.startswith(("/", "~", ".")) or path.count("/") > 1:
            raise DiffpoError(
                f"there is no model in {path}: no such folder (relative paths start from {Path.cwd()}). A model is a "
                f"diffusers folder that holds model_index.json, or a hub id"
            ) from error
        offline = ""
        if os.environ.get("HF_HUB_OFFLINE", "0") != "0":
            offline = " HF_HUB_OFFLINE is set, so it was not looked up."
        raise DiffpoError(
            f"cannot load the model {path!r}: it is no folder in {Path.cwd()}, and the hub did not give it.{offline} "
            f"With a network, run `hf download {path}` once (log in with `hf auth login` if the model is gated); "
            f"without, set model.path (or --model) to a local folder that holds model_index.json. ({reason}"
            f"{f'; {first}' if first not in reason else ''})"
        ) from error


def hub_failed(error: Exception) -> bool:
    """Is it what the libraries raise for files that cannot be read or had?"""
    # safetensors and huggingface_hub derive theirs from these three, the hub's HTTP client (httpx) does not
    return isinstance(error, (OSError, ValueError, RuntimeError)) or type(error).__module__.startswith("http")


def _first_cause(error: BaseException) -> BaseException:
    """What the hub's client wraps: a time-out, a status of the server."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
