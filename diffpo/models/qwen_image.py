"""Qwen-Image: an MMDiT with rectified flow on packed latents, text by Qwen2.5-VL (arXiv 2508.02324)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.encoders import sources_in
from . import texts
from .family import no_users
from .packed import PackedLatents, pack, unpack
from .sd3 import JOINT_ATTENTION

TOKENS = 512  # of the caption: the pipeline cuts longer ones
NOTHING = " "  # the unconditional caption of the published examples


class QwenImage(PackedLatents):
    pipelines = ("QwenImagePipeline",)
    network_class = "QwenImageTransformer2DModel"
    comfyui = "transformer."
    lora_targets = JOINT_ATTENTION
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("QwenImageTransformerBlock",)
    feature_blocks = "transformer_blocks"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        embeds, mask = texts.trimmed(cond["prompt_embeds"].to(self.dtype), cond["prompt_attention_mask"])
        seen = [x_t, *sources_in(cond)]  # of Qwen-Image-Edit, behind the tokens of x_t
        found = network(
            torch.cat([pack(each.to(self.dtype)) for each in seen], 1),
            timestep=self.network_time(t) / self.train_timesteps,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in seen]] * len(x_t),
        ).sample
        return unpack(found[:, : height * width // 4], height, width)

    def guided(self, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
        """Each token keeps the norm that it has without guidance."""
        height, width = cond.shape[-2:]
        plain, found = pack(cond), pack(super().guided(cond, uncond, guidance))
        return unpack(found * (plain.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)), height, width)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        prompts = [NOTHING if caption is None else caption for caption in captions]
        embeds, mask = self.pipe.encode_prompt(prompts, self.pipe.vae.device, max_sequence_length=TOKENS)
        if mask is None:  # nothing is masked
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return texts.padded(texts.unpadded(embeds, mask), TOKENS)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return texts.widest(n, TOKENS, network.config.joint_attention_dim)

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        found = super().painting(pipe, prompts, None, noise, guidance)
        if guidance > 1:  # it takes this scale and a negative prompt, or warns
            found["negative_prompt"] = [NOTHING if negative is None else negative] * len(prompts)
        return {**found, "guidance_scale": None, "true_cfg_scale": guidance}
