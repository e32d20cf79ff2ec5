"""CLIP score (Hessel et al. 2021, "CLIPScore"): the cosine between picture and prompt, here without the paper's 2.5.

By default OpenAI's ViT-L-14; numbers of different backbones cannot be compared, so the report names the model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..common.images import rgb
from .missing import missing
from .tensors import by_transform

MODEL = "ViT-L-14:openai"


def load_open_clip(name: str, device: str, advice: str) -> tuple[Any, Any, Any]:
    """``ARCHITECTURE:WEIGHTS`` of open_clip (weights: its tag or a local file) -> model, transform, tokenizer."""
    import open_clip

    architecture, _, weights = name.partition(":")
    logging.root.addFilter(_not_said_twice)
    try:
        if not Path(weights).is_file() and weights not in open_clip.list_pretrained_tags_by_model(architecture):
            raise FileNotFoundError(
                f"{weights or 'no weights named'}: neither a file nor a name of weights in open_clip"
            )
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=weights)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # open_clip, timm and the hub raise a dozen types here; all mean: no model
        raise missing(f"the open_clip model {name}", error, advice) from None
    finally:
        logging.root.removeFilter(_not_said_twice)
    return model.to(device).eval(), transform, tokenizer


def _not_said_twice(record: logging.LogRecord) -> bool:
    """open_clip logs a failed download and raises it too."""
    return not record.getMessage().startswith("Failed to download weights")


class ClipScore:
    """``model``: an open_clip model, with its picture ``transform`` and its ``tokenizer``."""

    names: tuple[str, ...] = ("clip",)
    optional: frozenset[str] = frozenset()

    def __init__(self, model, transform, tokenizer, device: str = "cpu"):
        self.model, self.transform = model.to(device).eval().requires_grad_(False), transform
        self.tokenizer, self.device = tokenizer, device

    @classmethod
    def load(cls, source: str | None, device: str) -> ClipScore:
        # OpenAI trained with QuickGELU; open_clip does so for its own tags but not for a local file
        advice = (
            "It is fetched once by open_clip itself, on a machine with network; or name other weights or a local file: "
            "--scorers clip=ViT-B-32:laion2b_s34b_b79k, clip=ViT-L-14-quickgelu:FILE (OpenAI's)"
        )
        return cls(*load_open_clip(source or MODEL, device, advice), device)

    @torch.inference_mode()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pixels = torch.stack([self.transform(rgb(image)) for image in images])
        return {"clip": self._cosine(pixels, prompts).cpu().double().numpy()}

    def rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`score` of (n, 3, H, W) in [0, 1], with gradients."""
        return {"clip": self._cosine(by_transform(pixels, self.transform, "clip"), prompts)}

    def _cosine(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        image_features = self.model.encode_image(pixels.to(self.device), normalize=True)
        text_features = self.model.encode_text(self.tokenizer(prompts).to(self.device), normalize=True)
        return (image_features * text_features).sum(1)
