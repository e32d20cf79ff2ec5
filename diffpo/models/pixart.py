"""PixArt-alpha and -Sigma: a DiT with cross-attention to T5 (arXiv 2310.00426, 2403.04692)."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import original
from .family import Family, no_users

TOKENS = 300  # of T5: Sigma's; alpha reads 120

# layers of the original code in LoRA files, and the layers of diffusers' that are stacked in them
LORA_BLOCK = {
    "attn_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn_proj": ("attn1.to_out.0",),
    "cross_attn_q_linear": ("attn2.to_q",),
    "cross_attn_kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn_proj": ("attn2.to_out.0",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
}
LORA_OUTER = {
    "x_embedder_proj": ("pos_embed.proj",),
    "y_embedder_y_proj_fc1": ("caption_projection.linear_1",),
    "y_embedder_y_proj_fc2": ("caption_projection.linear_2",),
    "t_embedder_mlp_0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder_mlp_2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block_1": ("adaln_single.linear",),
    "final_layer_linear": ("proj_out",),
}


class PixArt(Family):
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    network_class = "PixArtTransformer2DModel"
    comfyui = "transformer."
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("BasicTransformerBlock",)
    feature_blocks = "transformer_blocks"
    fsdp2 = True

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        sizes = {"resolution": cond.get("resolution"), "aspect_ratio": cond.get("aspect_ratio")}
        output = network(
            x_t.to(self.dtype),
            timestep=self.network_time(t),
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            encoder_attention_mask=cond["prompt_attention_mask"],
            added_cond_kwargs={name: value if value is None else value.to(self.dtype) for name, value in sizes.items()},
            **self._user(cond),
        ).sample
        return output[:, : x_t.shape[1]]  # the rest is a learnt variance

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        embeds, mask, _, _ = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.pipe.vae.device
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def condition(self, text: dict[str, Tensor], micro_conditioning: Tensor) -> dict[str, Tensor]:
        """PixArt-alpha at 1024 px takes height, width and their ratio."""
        if not self._sizes(self._config("transformer")):
            return text
        height, width = micro_conditioning[:, 4], micro_conditioning[:, 5]
        return {**text, "resolution": torch.stack([height, width], 1), "aspect_ratio": (height / width)[:, None]}

    @staticmethod
    def _sizes(config: dict[str, Any]) -> bool:
        said = config.get("use_additional_conditions")
        return config.get("sample_size", 128) == 128 if said is None else said

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        cond = {
            "prompt_embeds": torch.empty(n, TOKENS, network.config.caption_channels, device="meta"),
            "prompt_attention_mask": torch.ones(n, TOKENS, dtype=torch.long, device="meta"),
        }
        return self.condition(cond, torch.zeros(n, 6, device="meta"))

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[original.Piece, ...]]]:
        yield from original.pieces(LORA_OUTER)
        for i in original.numbers(layers, "transformer_blocks"):
            yield from original.pieces(LORA_BLOCK, f"blocks_{i}_", f"transformer_blocks.{i}.")

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        found = super().painting(pipe, prompts, negative or "", noise, guidance)
        # as in training: the size that was asked for, and the caption as it stands
        found |= {"negative_prompt": negative or "", "use_resolution_binning": False, "clean_caption": False}
        return {**found, "max_sequence_length": _tokens(pipe, [*prompts, negative or ""])}


def _tokens(pipe: Any, texts: list[str]) -> int:
    """How many tokens to pad these texts to: no more than the pipeline reads, and a multiple of 16.

    Padding is masked, so that the pictures are the same. On small images most of the time would go into it.
    """
    longest = max(map(len, pipe.tokenizer([text.lower().strip() for text in texts]).input_ids))
    most = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
    return min(most, -(-longest // 16) * 16)
