"""Krea 2: one stream of pictures and texts with rectified flow on packed latents, text by layers of Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .family import no_users
from .packed import PackedLatents, pack, positions, unpack

TOKENS = 512  # of the text, with padding before the template's end
DISTILLED = 1.15  # the exponent of the shift of distilled models


class Krea2(PackedLatents):
    pipelines = ("Krea2Pipeline",)
    network_class = "Krea2Transformer2DModel"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("Krea2TransformerBlock",)
    feature_blocks = "transformer_blocks"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        text = cond["prompt_embeds"].to(self.dtype).unflatten(-1, (network.config.num_text_layers, -1))
        places = positions(height // 2, width // 2, x_t.device)
        found = network(
            pack(x_t.to(self.dtype)),
            timestep=self.network_time(t) / self.train_timesteps,
            encoder_hidden_states=text,
            encoder_attention_mask=cond["prompt_attention_mask"].bool(),
            position_ids=torch.cat([places.new_zeros(text.shape[1], 3), places]),
        ).sample
        return unpack(found, height, width)

    def mu(self, config: dict[str, Any], tokens: int) -> float:
        if self.source.index().get("is_distilled"):
            return DISTILLED
        return super().mu({"max_image_seq_len": 6400, **config}, tokens)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        prompts = [caption or "" for caption in captions]  # unconditional is the empty caption
        embeds, mask = self.pipe.encode_prompt(prompts, self.pipe.vae.device, max_sequence_length=TOKENS)
        return {"prompt_embeds": embeds.flatten(2), "prompt_attention_mask": mask.long()}

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        width = network.config.num_text_layers * network.config.text_hidden_dim
        return {
            "prompt_embeds": torch.empty(n, TOKENS, width, device="meta"),
            "prompt_attention_mask": torch.ones(n, TOKENS, dtype=torch.long, device="meta"),
        }

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        return 1024 // pipe.vae_scale_factor

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        """Its pipeline counts guidance from 0."""
        return super().painting(pipe, prompts, negative, noise, guidance - 1)
