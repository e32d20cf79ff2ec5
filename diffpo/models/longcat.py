"""LongCat-Image: an MMDiT with rectified flow on packed latents, text by Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .packed import PackedLatents, pack, positions, unpack
from .sd3 import JOINT_ATTENTION

TOKENS = 512  # of the text; its padding is not masked, and the picture's places begin behind it


class LongCatImage(PackedLatents):
    """Its pipeline lets the text encoder rewrite prompts first. Here the texts are taken as they are."""

    pipelines = ("LongCatImagePipeline",)
    network_class = "LongCatImageTransformer2DModel"
    lora_targets = JOINT_ATTENTION
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock")
    feature_blocks = "transformer_blocks"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        text = cond["prompt_embeds"].to(self.dtype)
        order = torch.arange(text.shape[1], device=x_t.device).float()
        places = positions(height // 2, width // 2, x_t.device)
        output = network(
            pack(x_t.to(self.dtype)),
            timestep=self.network_time(t) / self.train_timesteps,
            encoder_hidden_states=text,
            txt_ids=torch.stack([torch.zeros_like(order), order, order], 1),
            img_ids=places + places.new_tensor([1, TOKENS, TOKENS]),
        ).sample
        return unpack(output, height, width)

    def guided(self, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
        """No token becomes longer than it is without guidance."""
        height, width = cond.shape[-2:]
        plain, found = pack(cond), pack(super().guided(cond, uncond, guidance))
        scale = plain.norm(dim=-1, keepdim=True) / (found.norm(dim=-1, keepdim=True) + 1e-8)
        return unpack(found * scale.clamp(max=1.0), height, width)

    def patch(self) -> int | None:
        return 2  # that of `pack`; the network's own is 1

    @staticmethod
    def latent_channels(config: Any) -> int:
        return config.in_channels // 4

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        return {"prompt_embeds": self.pipe.encode_prompt(texts)[0]}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        return network.config.joint_attention_dim

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.empty(n, TOKENS, network.config.joint_attention_dim, device="meta")}

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        super().cut(network, middle)
        network.single_transformer_blocks = torch.nn.ModuleList()

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        found = super().painting(pipe, prompts, negative or "", noise, guidance)
        return {**found, "negative_prompt": [negative or ""] * len(prompts), "enable_prompt_rewrite": False}
