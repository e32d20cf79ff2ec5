"""Sana: a linear DiT on the latents of an autoencoder of 32 px, text by Gemma 2 (arXiv 2410.10629)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import texts
from .family import Family, no_users

TOKENS = 300  # of the caption, and of Gemma's first one


class Sana(Family):
    pipelines = ("SanaPipeline",)
    network_class = "SanaTransformer2DModel"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("SanaTransformerBlock",)
    feature_blocks = "transformer_blocks"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        found = network(
            x_t.to(self.dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            encoder_attention_mask=cond["prompt_attention_mask"],
            timestep=self.network_time(t) * network.config.timestep_scale,
        ).sample
        return found[:, : x_t.shape[1]]

    def patch(self) -> int | None:
        return self._config("transformer").get("patch_size", 1)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        # an instruction for Gemma comes before captions, and not before the unconditional one
        options = inspect.signature(type(self.pipe).__call__).parameters
        found = self.pipe.encode_prompt(
            [caption or "" for caption in captions],
            do_classifier_free_guidance=True,
            device=self.pipe.vae.device,
            max_sequence_length=TOKENS,
            complex_human_instruction=options["complex_human_instruction"].default,
        )
        return texts.chosen(captions, found)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return texts.widest(n, TOKENS, network.config.caption_channels)

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        found = super().painting(pipe, prompts, None, noise, guidance)
        # as in training: the size that was asked for
        return found | {"negative_prompt": [negative or ""] * len(prompts), "use_resolution_binning": False}
