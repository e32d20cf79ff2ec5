"""Chroma: an MMDiT made of FLUX.1's, whose modulations are a small network's and whose texts are masked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import flux_names
from .family import no_users
from .original import Piece
from .packed import PackedLatents, pack, positions, unpack
from .sd3 import JOINT_ATTENTION

TOKENS = 512  # of T5


class Chroma(PackedLatents):
    pipelines = ("ChromaPipeline",)
    network_class = "ChromaTransformer2DModel"
    comfyui = "transformer."
    lora_targets = JOINT_ATTENTION
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        tokens, text = pack(x_t.to(self.dtype)), cond["prompt_embeds"].to(self.dtype)
        mask = cond["text_mask"].to(self.dtype)
        found = network(
            tokens,
            timestep=self.network_time(t) / self.train_timesteps,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            img_ids=positions(height // 2, width // 2, x_t.device),
            attention_mask=torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1),
        ).sample
        return unpack(found, height, width)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        """The mask is 1 up to the first token of padding. diffusers adds it to the scores, so that the others count
        too, and none can be left out."""
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            texts, device=self.pipe.vae.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"prompt_embeds": embeds, "text_mask": mask}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {
            "prompt_embeds": torch.empty(n, TOKENS, network.config.joint_attention_dim, device="meta"),
            "text_mask": torch.empty(n, TOKENS, device="meta"),
        }

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        return flux_names.in_loras(layers, config)
