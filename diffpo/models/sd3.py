"""Stable Diffusion 3 and 3.5: an MMDiT with rectified flow, two CLIP encoders and T5 (arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import sd3_names
from .family import Family
from .original import Piece

# both streams' attention; the names beginning with add_ are the text's
JOINT_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TOKENS = 77 + 256  # of CLIP and of T5, as the pipeline cuts


class StableDiffusion3(Family):
    pipelines = ("StableDiffusion3Pipeline",)
    network_class = "SD3Transformer2DModel"
    lora_targets = JOINT_ATTENTION
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    clips = ("text_encoder", "text_encoder_2")
    repeated_blocks = ("JointTransformerBlock",)
    feature_blocks = "transformer_blocks"
    fsdp2 = True
    comfyui = "transformer."

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return network(
            x_t.to(self.dtype),
            timestep=self.network_time(t),
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(self.dtype),
            **self._user(cond),
        ).sample

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, device=self.pipe.vae.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def embed(self, encoders: Any, ids: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = [encoders[name](ids[name], output_hidden_states=True) for name in self.clips]
        clips = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        before = frozen["prompt_embeds"]  # T5's behind CLIP's, which are padded to its width
        clips = torch.nn.functional.pad(clips, (0, before.shape[-1] - clips.shape[-1]))
        embeds = torch.cat([clips, before[:, clips.shape[1] :].to(clips.dtype)], 1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": torch.cat([output[0] for output in outputs], -1)}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        return network.config.joint_attention_dim

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        return sd3_names.in_loras(layers, config)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {
            "prompt_embeds": torch.empty(n, TOKENS, network.config.joint_attention_dim, device="meta"),
            "pooled_prompt_embeds": torch.empty(n, network.config.pooled_projection_dim, device="meta"),
        }
