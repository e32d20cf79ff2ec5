"""Z-Image: one stream of pictures and texts of any length, text by Qwen3 (arXiv 2511.22699)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import recent_names, texts
from .family import Family, no_users
from .original import Piece
from .source import vae_factor

TOKENS = 512  # of Qwen3, with the chat's own


class ZImage(Family):
    pipelines = ("ZImagePipeline",)
    network_class = "ZImageTransformer2DModel"
    comfyui = "transformer."
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("ZImageTransformerBlock",)
    feature_blocks = "layers"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        found = network(
            list(x_t.to(self.dtype)[:, :, None].unbind()),
            1 - self.network_time(t) / self.train_timesteps,  # its time is 0 at noise
            texts.unpadded(cond["prompt_embeds"].to(self.dtype), cond["prompt_attention_mask"]),
        ).sample
        return -torch.stack(list(found))[:, :, 0]  # it predicts x_0 - noise

    def patch(self) -> int | None:
        return self._config("transformer").get("all_patch_size", (2,))[0]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        prompts = [caption or "" for caption in captions]  # unconditional is the empty caption
        found, _ = self.pipe.encode_prompt(prompts, self.pipe.vae.device, do_classifier_free_guidance=False)
        return texts.padded(found, TOKENS)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return texts.widest(n, TOKENS, network.config.cap_feat_dim)

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        return recent_names.z_image(layers)

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def as_read(cls, pipe: Any, prompts: Sequence[str]) -> list[str]:
        return texts.chats(pipe.tokenizer, prompts, thinking=True)

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        return 1024 // vae_factor(pipe)

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        """Its scale counts from 0: cond + scale (cond - uncond)."""
        return super().painting(pipe, prompts, negative, noise.float(), guidance - 1)
