"""Model families: the only place that knows a family's conditioning. One file each, the same few methods (family.py).

`load` reads the pipeline's own model_index.json to tell the family; `load_pipeline` gives the whole pipeline, for
generation. Where configs and weights come from is in pipeline.py, or in single_file.py for a model that is one file.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from ..common.errors import DiffpoError
from ..config import Model
from .source import load_pipeline, named, pipeline_class, source_of, vae_factor

__all__ = [
    "FAMILIES",
    "family_class",
    "load",
    "load_pipeline",
    "named",
    "pipeline_class",
    "source_of",
    "text_width",
    "too_long",
    "vae_factor",
]

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
