"""Stable Diffusion XL: two text encoders, a pooled embedding, and sizes and crops as conditions (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import unet_names
from .sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    pipelines = ("StableDiffusionXLPipeline",)
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    clips = ("text_encoder", "text_encoder_2")
    without: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    kohya = unet_names.SDXL_KOHYA

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        added = {"text_embeds": cond["pooled_prompt_embeds"].to(self.dtype), "time_ids": cond["time_ids"]}
        prompt_embeds = cond["prompt_embeds"].to(self.dtype)
        conditions = {"encoder_hidden_states": prompt_embeds, "added_cond_kwargs": added, **self._user(cond)}
        return network(x_t.to(self.dtype), t, **conditions).sample

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        # negative_prompt=None: zeros if the pipeline has force_zeros_for_empty_prompt, else the empty caption
        embeds, no_embeds, pooled, no_pooled = self.pipe.encode_prompt(
            [caption or "" for caption in captions],
            device=self.pipe.vae.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        absent = torch.tensor([caption is None for caption in captions], device=embeds.device)
        return {
            "prompt_embeds": torch.where(absent[:, None, None], no_embeds, embeds),
            "pooled_prompt_embeds": torch.where(absent[:, None], no_pooled, pooled),
        }

    def embed(self, encoders: Any, ids: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = [encoders[name](ids[name], output_hidden_states=True) for name in self.clips]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": outputs[1][0]}

    def condition(self, text: dict[str, Tensor], micro_conditioning: Tensor) -> dict[str, Tensor]:
        return {**text, "time_ids": micro_conditioning}

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
        return {
            **super().meta_cond(network, n),
            "pooled_prompt_embeds": torch.empty(n, pooled, device="meta"),
            "time_ids": torch.zeros(n, 6, device="meta"),
        }
