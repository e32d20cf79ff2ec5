"""Feature vectors of pictures, for what compares many pictures: diversity, distances of distributions, similarity.

A scorer gives a number for each picture; here a network gives a vector for each, and the caller compares them. `load`
takes a name in `FEATURES`, or ``package.module:Class`` of your own. Naming one of your own imports its module, which
runs it; `Features` defines what the class must have.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..common import carried
from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.imports import load_attribute
from ..common.names import hint
from ..common.text import plain
from .missing import missing
from .outside import made

if TYPE_CHECKING:
    import torch
    from PIL import Image

# file here and class in it, which is made by its `load(source, device)`
FEATURES = {
    "dinov2": "features:DinoV2",
    "clip": "features:ClipTower",
    "shapes": "features:ShapesTower",
    "inception": "inception:Inception",
    "lpips": "lpips:Lpips",
}
DINO = "facebook/dinov2-base"
TINY_CLIP = carried.HOME / "assets" / "tiny-clip"
AT_ONCE = 32  # pictures in a batch


class Features(Protocol):
    """What a source of features has, one of your own too.

    A class of your own is called with ``(source, device)`` if it takes two arguments, else with none. ``source`` is the
    text behind "=" in ``package.module:Class=SOURCE``, or None; ``device`` is "cpu", "cuda" or "mps".

    Attributes:
        name: of network and weights. Vectors of different names cannot be compared.
    """

    name: str

    def embed(self, images: list[Image.Image]) -> np.ndarray:
        """(n, d) float32 for n PIL pictures of any size and mode. The vectors are not normalised, and a picture's
        vector does not depend on the others."""


def load(spec: str, device: str = "cpu") -> Features:
    """The features that ``spec`` names: ``dinov2[=FOLDER or hub id]``, ``clip[=ARCHITECTURE:WEIGHTS]`` of open_clip,
    ``shapes`` (trained on the embedded world), ``inception[=FILE]`` of FID, ``lpips=FILE``, or
    ``package.module:Class[=SOURCE]``.

    DiffpoError for an unknown name, for weights that are not at hand, and for a class that gives no features.
    """
    name, _, source = spec.partition("=")
    if ":" in name:
        return _Outside(name, source or None, device)
    if name not in FEATURES:
        raise DiffpoError(f"unknown features {plain(name, 100)!r}: {hint(name, FEATURES)}")
    limit_waiting()
    module, _, attribute = FEATURES[name].partition(":")
    package = __name__.rpartition(".")[0]
    return getattr(importlib.import_module(f"{package}.{module}"), attribute).load(source or None, device)


class Batched:
    """Features whose pictures are prepared one by one and go through the network ``AT_ONCE`` at a time."""

    name: str
    device: str

    def embed(self, images: list[Image.Image]) -> np.ndarray:
        import torch

        from ..common.images import rgb

        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), AT_ONCE):
                pixels = torch.cat([self._prepared(rgb(image)) for image in images[start : start + AT_ONCE]])
                parts.append(self._vectors(pixels.to(self.device)).float().cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        """(1, 3, H, W), with H and W equal for all pictures."""
        raise NotImplementedError

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class DinoV2(Batched):
    """DINOv2 (Oquab et al. 2023): the class token after the last layer norm; (n, 768) by default.

    ``model``: a transformers Dinov2Model, or another whose ``pooler_output`` is the vector; ``processor``: its image
    processor, which says how pictures are resized and cropped.
    """

    def __init__(self, model: Any, processor: Any, device: str = "cpu", name: str = "dinov2") -> None:
        self.model, self.processor = model.to(device).eval().requires_grad_(False), processor
        self.device, self.name = device, name

    @classmethod
    def load(cls, source: str | None, device: str) -> DinoV2:
        """``source``: a folder or a hub id with model and processor."""
        import torch
        from transformers import AutoImageProcessor, AutoModel

        where = source or DINO
        try:
            model = AutoModel.from_pretrained(where, dtype=torch.float32)
            processor = AutoImageProcessor.from_pretrained(where)
        except (OSError, ValueError) as error:
            advice = f"Fetch it once with `hf download {DINO}`, or give a folder that holds it: dinov2=FOLDER"
            raise missing(f"DINOv2 from {where}", error, advice) from None
        return cls(model, processor, device, f"dinov2={where}")

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=[image], return_tensors="pt").pixel_values

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).pooler_output


class ClipTower(Batched):
    """The projected vectors of an open_clip image tower, before they are normalised; (n, 768) by default."""

    def __init__(self, model: Any, transform: Any, device: str = "cpu", name: str = "clip") -> None:
        self.model, self.transform = model.to(device).eval().requires_grad_(False), transform
        self.device, self.name = device, name

    @classmethod
    def load(cls, source: str | None, device: str) -> ClipTower:
        from .clip import MODEL, load_open_clip

        where = source or MODEL
        advice = (
            "It is fetched once by open_clip itself, on a machine with network; or name other weights or a local file: "
            "clip=ViT-B-32:laion2b_s34b_b79k, clip=ViT-L-14-quickgelu:FILE (OpenAI's)"
        )
        model, transform, _ = load_open_clip(where, device, advice)
        return cls(model, transform, device, f"clip={where}")

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)[None]

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels)


class ShapesTower(Batched):
    """The image tower of assets/tiny-clip, trained on the embedded world; (n, 64)."""

    name = "shapes"

    def __init__(self, model: Any, processor: Any, device: str = "cpu") -> None:
        self.model, self.processor = model.to(device).eval().requires_grad_(False), processor
        self.device = device

    @classmethod
    def load(cls, source: str | None, device: str) -> ShapesTower:
        import torch
        from transformers import CLIPImageProcessor, CLIPModel

        if source is not None:
            raise DiffpoError(f"the features shapes take no source: leave out ={plain(source, 100)}")
        try:
            model = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
            processor = CLIPImageProcessor.from_pretrained(TINY_CLIP)
        except (OSError, ValueError) as error:
            raise missing(
                f"the embedded CLIP {TINY_CLIP}", error, "It is part of diffpo: install that again."
            ) from None
        return cls(model, processor, device)

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=[image], return_tensors="pt").pixel_values

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        from .pickscore import projected

        return projected(self.model.get_image_features(pixel_values=pixels))


class _Outside:
    """Features of a class from outside the package, with its answers checked."""

    def __init__(self, spec: str, source: str | None, device: str) -> None:
        made_by = load_attribute(spec, "features", "a class, see diffpo.scorers.features.Features", callable)
        self.inner = made(f"the class of features {spec}", made_by, source, device)
        if not callable(getattr(self.inner, "embed", None)):
            raise DiffpoError(f"{spec} gives no features: it needs embed(images), which returns an (n, d) array")
        name = getattr(self.inner, "name", None)
        self.spec, self.name = spec, plain(name, 200) if isinstance(name, str) else spec

    def embed(self, images: list[Image.Image]) -> np.ndarray:
        try:
            found = np.asarray(self.inner.embed(images), np.float32)
        except (TypeError, ValueError, RuntimeError) as error:  # text, ragged lists, tensors with gradients or on a GPU
            raise DiffpoError(f"the features {self.spec}: embed failed: {plain(error, 200)}") from error
        if found.ndim != 2 or len(found) != len(images):
            raise DiffpoError(f"the features {self.spec} have shape {found.shape} for {len(images)} images, not (n, d)")
        return found
