"""Model families: all that depends on the kind of model. One file for each, a subclass of `family.Family`.

`load` finds the family by the pipeline's own model_index.json; `load_pipeline` gives the whole pipeline, for
generation. Where configs and weights come from is in pipeline.py, or in single_file.py for a model that is one file.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from ..common.errors import DiffpoError
from ..common.imports import load_attribute
from ..config import Model
from .family import Family
from .original import Piece
from .source import load_pipeline, named, pipeline_class, source_of, vae_factor

__all__ = [
    "FAMILIES",
    "Family",
    "built_in",
    "family_class",
    "family_of",
    "load",
    "load_pipeline",
    "named",
    "names_in_loras",
    "pipeline_class",
    "source_of",
    "text_width",
    "too_long",
    "vae_factor",
]

# file here and class in it; `model.family` names one that is elsewhere
FAMILIES = (
    "sd:StableDiffusion",
    "sdxl:StableDiffusionXL",
    "sd3:StableDiffusion3",
    "pixart:PixArt",
    "flux:Flux",
    "flux:FluxKontext",
    "dit:DiT",
    "z_image:ZImage",
    "qwen_image:QwenImage",
    "qwen_image21:QwenImage21",
    "qwen_image_edit:QwenImageEdit",
    "qwen_image_edit:QwenImageEditPlus",
    "flux2:Flux2Klein",
    "flux2:Flux2",
    "sana:Sana",
    "lumina2:Lumina2",
    "chroma:Chroma",
    "hidream:HiDream",
    "ovis_image:OvisImage",
    "krea2:Krea2",
    "longcat:LongCatImage",
    "longcat:LongCatImageEdit",
)


def load(settings: Model, precision: str = "no", resolution: int = 1024) -> Family:
    """The family of ``settings.path``; nothing large is read yet. ``precision``: no | bf16 | fp16; ``resolution`` of
    the images in pixels."""
    return family_class(settings)(settings, precision, resolution)


@functools.cache
def built_in() -> dict[str, type[Family]]:
    """The families here by the pipelines that they serve."""
    found: dict[str, type[Family]] = {}
    for spec in FAMILIES:
        module, _, name = spec.partition(":")
        family = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        found |= dict.fromkeys(family.pipelines, family)
    return found


def family_class(settings: Model, pipeline: str | None = None) -> type[Family]:
    """The family of a model: ``settings.family``, or the one here that serves the model's pipeline, whose class may be
    known already.

    DiffpoError: no family here serves it; ``settings.family`` cannot be imported, is no whole subclass of `Family`, or
    serves other pipelines.
    """
    pipeline, families = pipeline or pipeline_class(settings), built_in()
    if settings.family is None:
        if pipeline not in families:
            raise DiffpoError(
                f"{settings.path} is a {pipeline}, and diffpo trains {', '.join(families)}. For another family, set "
                f"model.family=package.module:Class to a class of your own (docs/extending.md)"
            )
        return families[pipeline]
    family = load_attribute(settings.family, "model.family", "a class derived from diffpo.models.Family", _is_family)
    given = f"model.family={settings.family}"
    undefined = [*sorted(family.__abstractmethods__), *(["network_class"] * (not hasattr(family, "network_class")))]
    if undefined:
        raise DiffpoError(f"{given} is not complete: {family.__name__} does not define {', '.join(undefined)}")
    if pipeline not in family.pipelines:
        serves = ", ".join(family.pipelines) or "not set"
        raise DiffpoError(f"{given} does not fit {settings.path}, which is a {pipeline}: its pipelines are {serves}")
    return family


def _is_family(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Family)


def family_of(network: torch.nn.Module) -> type[Family] | None:
    """The family whose network this is. A class from outside counts once it is imported, if no family here has that
    network. None for parts of another kind, e.g. text encoders."""
    families = (*built_in().values(), *_subclasses(Family))
    kind = type(network).__name__
    return next((family for family in families if getattr(family, "network_class", None) == kind), None)


def _subclasses(family: type[Any]) -> Iterator[type[Family]]:
    for each in family.__subclasses__():
        yield each
        yield from _subclasses(each)


def names_in_loras(part: torch.nn.Module, layers: Collection[str]) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """`Family.names_in_loras` of a network's family; nothing for another part of a pipeline."""
    family = family_of(part)
    return iter(()) if family is None else family.names_in_loras(layers, part.config)


def text_width(network: torch.nn.Module) -> int:
    """`Family.text_width` of a network's family."""
    family = family_of(network)
    if family is None:
        raise DiffpoError(f"objective.users does not work with a {type(network).__name__}: set objective.users=false")
    return family.text_width(network)


def too_long(pipe: Any, texts: Sequence[str]) -> str:
    """One sentence on the texts that the text encoder does not read to their end; empty if it reads all."""
    # the last encoder reads the most: T5's limit is the pipeline's, CLIP's its tokenizer's
    names = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if getattr(pipe, name, None) is not None]
    if not names:
        return ""
    tokenizer = getattr(pipe, names[0])
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    options = (inspect.signature(each).parameters for each in (type(pipe).__call__, pipe.encode_prompt))
    cut = next((each["max_sequence_length"] for each in options if "max_sequence_length" in each), None)
    if family := built_in().get(type(pipe).__name__):
        texts = family.as_read(pipe, texts)
    limit = tokenizer.model_max_length if cut is None else cut.default
    longer = sum(len(ids) > limit for ids in tokenizer(list(texts)).input_ids)
    if not longer:
        return ""
    return (
        f"{longer} of {len(texts)} texts have more than the {limit} tokens that the model reads; their ends are cut off"
    )
