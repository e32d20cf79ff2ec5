"""Ovis-Image: an MMDiT with rectified flow on packed latents, text by Qwen3 (Ovis2.5's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import PackedLatents, pack, positions, unpack
from .sd3 import JOINT_ATTENTION

TOKENS = 256  # of the text; padding is zeros, and is not masked


class OvisImage(PackedLatents):
    pipelines = ("OvisImagePipeline",)
    network_class = "OvisImageTransformer2DModel"
    lora_targets = JOINT_ATTENTION
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock")
    feature_blocks = "transformer_blocks"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        text = cond["prompt_embeds"].to(self.dtype)
        places = torch.arange(text.shape[1], device=x_t.device).float()
        output = network(
            pack(x_t.to(self.dtype)),
            timestep=self.network_time(t) / self.train_timesteps,
            encoder_hidden_states=text,
            txt_ids=torch.stack([torch.zeros_like(places), places, places], 1),
            img_ids=positions(height // 2, width // 2, x_t.device),
        ).sample
        return unpack(output, height, width)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        device = self.pipe.vae.device
        options = {"do_classifier_free_guidance": False, "device": device, "max_sequence_length": TOKENS}
        return {"prompt_embeds": self.pipe.encode_prompt(texts, **options)[0]}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        return network.config.joint_attention_dim

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.empty(n, TOKENS, network.config.joint_attention_dim, device="meta")}

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        super().cut(network, middle)
        network.single_transformer_blocks = torch.nn.ModuleList()
