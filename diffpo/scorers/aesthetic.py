"""LAION aesthetic predictor v2 (``sac+logos+ava1-l14-linearMSE``): a head over CLIP ViT-L/14, about 1 to 10.

It does not look at the prompt.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..common.images import rgb
from .clip import load_open_clip
from .missing import missing
from .tensors import by_transform
from .weights import read_state

BACKBONE = "ViT-L-14:openai"
HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")


def head(width: int = 768) -> torch.nn.Sequential:
    """The published head: five linear layers with dropout and, on purpose, no activation between them."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    return torch.nn.Sequential(
        *(linear(width, 1024), dropout(0.2)),
        *(linear(1024, 128), dropout(0.2)),
        *(linear(128, 64), dropout(0.1)),
        *(linear(64, 16), linear(16, 1)),
    )


def load_head(path: str | Path) -> torch.nn.Sequential:
    """The head from a .safetensors or .pth file with the published names (``layers.0.weight``, ...)."""
    state = read_state(path)
    state = {key.removeprefix("layers."): value.float() for key, value in state.items()}
    model = head(state["0.weight"].shape[1])
    model.load_state_dict(state)
    return model.eval()


class Aesthetic:
    """``model``: an open_clip model with its ``transform``; ``head``: features (n, d) -> (n, 1)."""

    names: tuple[str, ...] = ("aesthetic",)
    optional: frozenset[str] = frozenset()
    reads_prompt = False

    def __init__(self, model, transform, head, device: str = "cpu"):
        self.model, self.transform = model.to(device).eval().requires_grad_(False), transform
        self.head = head.to(device).eval().requires_grad_(False)
        self.device = device

    @classmethod
    def load(cls, source: str | None, device: str) -> Aesthetic:
        """``source``: the file of the head; the backbone comes from open_clip."""
        model, transform, _ = load_open_clip(
            BACKBONE, device, "It is fetched once by open_clip itself, on a machine with network."
        )
        try:
            if source is None:
                from huggingface_hub import hf_hub_download

                source = hf_hub_download(*HEAD)
            loaded = load_head(source)
        except Exception as error:  # missing, truncated, pickled, or other layers: all mean no head
            raise missing(
                f"the aesthetic head {source or '/'.join(HEAD)}",
                error,
                f"Fetch it once with `hf download {' '.join(HEAD)}`, or give sac+logos+ava1-l14-linearMSE.pth: "
                "--scorers aesthetic=FILE",
            ) from None
        return cls(model, transform, loaded, device)

    @torch.inference_mode()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pixels = torch.stack([self.transform(rgb(image)) for image in images])
        return {"aesthetic": self._value(pixels).cpu().double().numpy()}

    def rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`score` of (n, 3, H, W) in [0, 1], with gradients."""
        return {"aesthetic": self._value(by_transform(pixels, self.transform, "aesthetic"))}

    def _value(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.model.encode_image(pixels.to(self.device), normalize=True)
        return self.head(features.to(self.head[0].weight.dtype))[:, 0]
