"""Lumina-Image 2.0: a unified Next-DiT with rectified flow, text by Gemma 2 (arXiv 2503.21758)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import recent_names, texts
from .family import Family, no_users
from .original import Piece

TOKENS = 256  # of Gemma, with the system's prompt


class Lumina2(Family):
    pipelines = ("Lumina2Pipeline",)
    network_class = "Lumina2Transformer2DModel"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("Lumina2TransformerBlock",)
    feature_blocks = "layers"

    def meta_network(self) -> torch.nn.Module:
        """Texts without padding: their lengths cannot be read from a mask on the meta device."""
        network = super().meta_network()
        embedder: Any = network.rope_embedder
        embedder.register_forward_pre_hook(lambda _, given: (given[0], torch.ones(given[1].shape, device="cpu").long()))
        return network

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -network(  # it predicts x_0 - noise
            x_t.to(self.dtype),
            timestep=1 - self.network_time(t) / self.train_timesteps,  # its time is 0 at noise
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            encoder_attention_mask=cond["prompt_attention_mask"],
        ).sample

    def guided(self, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
        """Each line of latents keeps the norm that it has without guidance."""
        found = super().guided(cond, uncond, guidance)
        return found * (cond.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        # the system's prompt comes before captions, and not before the unconditional one
        prompts = [caption or "" for caption in captions]
        found = self.pipe.encode_prompt(prompts, device=self.pipe.vae.device, max_sequence_length=TOKENS)
        return texts.chosen(captions, found)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return texts.widest(n, TOKENS, network.config.cap_feat_dim)

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        return recent_names.lumina2(layers)

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def as_read(cls, pipe: Any, prompts: Sequence[str]) -> list[str]:
        return [f"{pipe.system_prompt} <Prompt Start> {text}" for text in prompts]
