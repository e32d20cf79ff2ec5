"""MPS (Zhang et al. 2024, "Learning Multi-dimensional Human Preference for Text-to-Image Generation"), overall score.

CLIP-H, and four layers in which the picture's tokens attend to those words of the prompt that are near to a condition,
a list of words on quality (section 4). The score is ``exp(logit_scale) * cos``, about 0 to 20.

The published code divides by the largest similarity of a whole batch; it is used there with one prompt at a time, and
so is each prompt here. It computes in half precision, this in float32.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention, silu

from ..common.images import rgb
from .missing import missing
from .pickscore import PROCESSOR
from .tensors import by_processor
from .weights import read_state

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
NEAR = 0.3  # share of a prompt's largest similarity from which a word counts, as in the published evaluation
BASE = 10_000  # of the rotary embedding
PAGE = "https://github.com/Kwai-Kolors/MPS"


class Cross(nn.Module):
    """Pre-norm attention of x to a context with one key and value for all heads, beside a SwiGLU layer; plus x."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff = nn.ModuleDict({"0": _plain(width, 8 * width), "2": _plain(4 * width, width)})

    def forward(self, x: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        """x (n, l, d), context (n, k, d), keep (n, k): the context's tokens that are attended to."""
        normed = self.norm(x)
        key, value = self.to_kv(context).chunk(2, -1)
        attended = _attend(_split(self.to_q(normed), self.heads), key, value, keep[:, None, None])
        return x + self.to_out(attended) + self.ff["2"](_swiglu(self.ff["0"](normed)))


class Own(nn.Module):
    """The same of x to itself, with rotary positions."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.widths = heads, (heads * head_width, head_width, head_width, 8 * width)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = _plain(width, sum(self.widths))
        self.attn_out = _plain(heads * head_width, width)
        self.ff_out = nn.ModuleDict({"1": _plain(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, -1)
        attended = _attend(_turned(_split(query, self.heads)), _turned(key), value)
        return x + self.attn_out(attended) + self.ff_out["1"](_swiglu(hidden))


class Layers(nn.Module):
    """Alternating `Cross` and `Own`. The defaults are the published sizes."""

    def __init__(self, width: int = 1024, depth: int = 4, heads: int = 16, head_width: int = 64) -> None:
        super().__init__()
        made = [
            nn.ModuleDict({"cross": Cross(width, heads, head_width), "own": Own(width, heads, head_width)})
            for _ in range(depth)
        ]
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["own"](layer["cross"](x, context, keep))
        return x


def _plain(inner: int, outer: int) -> nn.Linear:
    return nn.Linear(inner, outer, bias=False)


def _swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return silu(gate) * value


def _split(x: Tensor, heads: int) -> Tensor:
    """(n, l, heads * w) -> (n, heads, l, w)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """Queries (n, heads, l, w), one key and value (n, k, w) for all heads -> (n, l, heads * w)"""
    key, value = (each[:, None].expand(-1, query.shape[1], -1, -1) for each in (key, value))
    return scaled_dot_product_attention(query, key, value, keep).transpose(1, 2).flatten(2)


def _turned(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of (..., l, w), where the halves of w are the two coordinates."""
    half = x.shape[-1] // 2
    rates = 1 / BASE ** (torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def load_published(clip: nn.Module, layers: Layers, state: dict[str, Tensor]) -> None:
    """Take the published state dict (``model.*`` is transformers' CLIPModel, ``cross_model.*`` the layers) into
    ``clip`` and ``layers``. RuntimeError if a tensor is missing or of another shape."""
    buffers = ("position_ids", "inv_freq")  # computed here
    state = {key: value.float() for key, value in state.items() if not key.endswith(buffers)}
    named = {}
    for key, value in state.items():
        if key.startswith("cross_model."):
            key = re.sub(r"^(layers\.\d+)\.0\.fn\.", r"\1.cross.", key.removeprefix("cross_model."))
            named[re.sub(r"^(layers\.\d+)\.1\.fn\.", r"\1.own.", key)] = value
    layers.load_state_dict(named)
    clip.load_state_dict({key.removeprefix("model."): value for key, value in state.items() if key[:6] == "model."})


class MPS:
    """``model``: a transformers CLIPModel; ``layers``: `Layers`; ``processor``: the CLIPProcessor."""

    names: tuple[str, ...] = ("mps",)
    optional: frozenset[str] = frozenset()

    def __init__(self, model: Any, layers: Layers, processor: Any, device: str = "cpu") -> None:
        self.model, self.layers = (part.to(device).eval().requires_grad_(False) for part in (model, layers))
        self.processor, self.device = processor, device
        with torch.no_grad():
            self.condition = self._text([CONDITION])[0][0]

    @classmethod
    def load(cls, source: str | None, device: str) -> MPS:
        """``source``: the published model's state dict, as a file of torch or .safetensors."""
        from transformers import CLIPConfig, CLIPModel, CLIPProcessor

        try:
            if source is None:
                raise FileNotFoundError("its weights are not on the hub: name a file")
            state = read_state(source)
            processor, model = (
                CLIPProcessor.from_pretrained(PROCESSOR),
                CLIPModel(CLIPConfig.from_pretrained(PROCESSOR)),
            )
            layers = Layers()
            load_published(model, layers, state)
        except Exception as error:  # missing, truncated, pickled, or another model's: all mean no MPS
            raise missing(
                f"MPS from {source or 'the hub'}, with the processor of {PROCESSOR}",
                error,
                f"{PAGE} links the file MPS_overall_checkpoint.pth, a whole pickled model: reading it runs code, so "
                'diffpo does not. In a copy of that repository, run once: python -c "import torch; '
                "torch.save(torch.load('MPS_overall_checkpoint.pth').state_dict(), 'mps.pt')\". Fetch the processor "
                f'with `hf download {PROCESSOR} --include "*.json" "*.txt"`. Then use --scorers mps=mps.pt',
            ) from None
        return cls(model, layers, processor, device)

    @torch.inference_mode()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pixels = self.processor(images=[rgb(image) for image in images], return_tensors="pt").pixel_values
        return {"mps": self._cosine(pixels, prompts).cpu().double().numpy()}

    def rate(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """`score` of (n, 3, H, W) in [0, 1], with gradients."""
        return {"mps": self._cosine(by_processor(pixels, self.processor.image_processor), prompts)}

    def _text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Projected features of all tokens, padding too (n, l, d), and of the last one (n, d)."""
        length = min(77, self.model.config.text_config.max_position_embeddings)
        ids = self.processor(
            text=prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        found = self.model.text_model(input_ids=ids.to(self.device))
        return self.model.text_projection(found.last_hidden_state), self.model.text_projection(found.pooler_output)

    def _cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        words, whole = self._text(prompts)
        near = (words @ self.condition.T.to(words)).amax(-1)
        keep = near / near.amax(1, keepdim=True) > NEAR
        tokens = self.model.visual_projection(self.model.vision_model(pixel_values=pixels.to(self.device))[0])
        seen = self.layers(tokens, words, keep)[:, 0]
        return self.model.logit_scale.exp() * cosine_similarity(whole, seen)
