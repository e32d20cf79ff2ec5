"""The step-aware preference model of SPO (Liang et al. 2024, arXiv 2406.04314, section 4.1).

A CLIP whose vision tower gets the time: t -> sinusoidal embedding -> MLP -> in each layer a shift, a scale and a
gate for the attention and for the MLP (adaptive layer norm), and a shift and a scale after the last norm. At the start
all of these are the identity. So training begins at the CLIP's own score (PickScore in the paper), exp(logit_scale) *
cos(picture, text), of the decoded x_0 estimate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.errors import DiffpoError
from ...common.files import write_atomic
from ..missing import missing
from . import base

WEIGHTS = "time.safetensors"


class StepAware(nn.Module):
    """``clip``, a transformers CLIPModel, and what the time does to its vision tower, by hooks on the tower's own
    layers."""

    def __init__(self, clip: nn.Module, time_aware: bool = True) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        self.clip, self.time_aware = clip, time_aware
        tower = clip.vision_model
        width = tower.config.hidden_size
        self.time = nn.ModuleDict(
            {
                "sinusoidal": Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0),
                "mlp": TimestepEmbedding(256, width),
                "layers": nn.ModuleList(nn.Linear(width, 6 * width) for _ in tower.encoder.layers),
                "last": nn.Linear(width, 2 * width),
            }
        )
        for number, linear in enumerate([*self.time["layers"], self.time["last"]]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            if number < len(self.time["layers"]):  # gates are 1; scales are 1 + what the linear layer gives
                linear.bias.data.view(6, width)[[2, 5]] = 1.0
        self._now: list[tuple[Tensor, ...]] = []  # within `image_features`: the modulation of each layer, then the last
        for number, layer in enumerate(tower.encoder.layers):
            layer.layer_norm1.register_forward_hook(self._affine(number, 0))
            layer.self_attn.register_forward_hook(self._gate(number, 2))
            layer.layer_norm2.register_forward_hook(self._affine(number, 3))
            layer.mlp.register_forward_hook(self._gate(number, 5))
        tower.post_layernorm.register_forward_hook(self._affine(len(tower.encoder.layers), 0))

    def _affine(self, number: int, first: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            shift, scale = self._now[number][first : first + 2]
            if output.ndim == 2:  # the class token alone
                shift, scale = shift[:, 0], scale[:, 0]
            return output * (1 + scale) + shift

        return hook

    def _gate(self, number: int, place: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            gate = self._now[number][place]
            return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate

        return hook

    def image_features(self, pixels: Tensor, t: Tensor) -> Tensor:
        """Prepared pictures (n, 3, H, W) and t (n,) -> (n, d), not normalised."""
        t = t if self.time_aware else torch.zeros_like(t)
        time = F.silu(self.time["mlp"](self.time["sinusoidal"](t).to(pixels.dtype)))
        parts = [*((linear, 6) for linear in self.time["layers"]), (self.time["last"], 2)]
        self._now = [linear(time)[:, None].chunk(number, -1) for linear, number in parts]  # each (n, 1, width)
        try:
            return _projected(self.clip.get_image_features(pixel_values=pixels))
        finally:
            self._now = []

    def forward(self, pixels: Tensor, t: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(n,) scores; ``ids`` and ``mask`` (n, tokens)."""
        text = _projected(self.clip.get_text_features(input_ids=ids, attention_mask=mask))
        return self.clip.logit_scale.exp() * F.cosine_similarity(self.image_features(pixels, t), text)


class StepAwareScorer:
    """A `steps.StepScorer`; ``module`` is what is trained."""

    needs_vae = True

    def __init__(self, family: Any, clip: Any, tokenizer: Any, processor: Any, time_aware: bool, name: str) -> None:
        self.family, self.name = family, name
        self.module = StepAware(clip, time_aware)
        self.tokenizer, self.processor = tokenizer, processor

    @classmethod
    def fresh(cls, family: Any, clip: str, processor: str | None, time_aware: bool, seed: int) -> StepAwareScorer:
        """From a CLIPModel, and tokenizer and image processor beside it or in ``processor``: folders or hub ids."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(family, *_read(clip, processor or clip), time_aware, clip)

    @classmethod
    def load(cls, folder: Path, family: Any, device: Any) -> StepAwareScorer:
        about = base.read_about(folder)
        scorer = cls(family, *_read(str(folder), str(folder)), about["time_aware"], str(folder))
        base.read_weights(scorer.module.time, folder / WEIGHTS)
        scorer.module.eval().requires_grad_(False).to(device)
        return scorer

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """The CLIP as `from_pretrained` reads it, with the time's weights and a description beside it."""
        from safetensors.torch import save

        self.module.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_atomic(folder / WEIGHTS, save(self.module.time.state_dict()))
        text = json.dumps({"kind": "pixel", "time_aware": self.module.time_aware, **about}, indent=1)
        write_atomic(folder / base.ABOUT, f"{text}\n".encode())

    def prepare(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) about [-1, 1] -> what the tower takes: bicubic to the shorter side, centre crop, normalised.

        The image processor's own numbers, on tensors; it works on 8-bit pictures one at a time.
        """
        side = self.module.clip.vision_model.config.image_size
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1)
        height, width = pixels.shape[-2:]
        if min(height, width) != side:
            size = [round(each * side / min(height, width)) for each in (height, width)]
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((each - side) // 2 for each in pixels.shape[-2:])
        pixels = pixels[..., top : top + side, left : left + side]
        mean, std = (pixels.new_tensor(getattr(self.processor, f"image_{name}")) for name in ("mean", "std"))
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def rate(self, x_t: Tensor, x_0: Tensor, t: Tensor, captions: Sequence[str], cond: dict[str, Tensor]) -> Tensor:
        """`score` with gradients, for the model and by x_0."""
        length = self.module.clip.text_model.config.max_position_embeddings
        text = self.tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.prepare(self.family.decoded(x_0))
        return self.module(pixels, t, text.input_ids.to(pixels.device), text.attention_mask.to(pixels.device))

    @torch.no_grad()
    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor, captions: Sequence[str], cond: dict[str, Tensor]) -> Tensor:
        return base.finite(self.rate(x_t, x_0, t, captions, cond), self.name, captions)


def _read(path: str, processor: str) -> tuple[Any, Any, Any]:
    """CLIPModel, tokenizer and image processor."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    from ...models.pretrained import local

    disable_progress_bar()
    try:
        clip = CLIPModel.from_pretrained(local(path), dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(local(processor))
        images = CLIPImageProcessor.from_pretrained(local(processor))
    except (OSError, ValueError, RuntimeError) as error:
        raise missing(
            f"the CLIP of a step-aware scorer from {path}",
            error,
            "scorer.clip is a folder, or a hub id fetched once with `hf download`, with a transformers CLIPModel, its "
            "tokenizer and its image processor (or scorer.processor holds these two)",
        ) from None
    if clip.config.model_type != "clip":
        raise DiffpoError(f"{path} is a {clip.config.model_type} model, but a step-aware scorer needs a CLIP")
    return clip, tokenizer, images


def _projected(output: Any) -> Tensor:
    """transformers 4 returns the projected features (n, d), transformers 5 wraps them as ``pooler_output``."""
    return output if isinstance(output, Tensor) else output.pooler_output
