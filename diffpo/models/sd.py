"""Stable Diffusion 1.x and 2.x (UNet2DConditionModel, one CLIP text encoder, epsilon or v-prediction)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import unet_names
from .family import Family, no_users
from .kohya_names import Kohya
from .original import Piece


class StableDiffusion(Family):
    pipelines = ("StableDiffusionPipeline",)
    network_class = "UNet2DConditionModel"
    component = "unet"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    clips: ClassVar[tuple[str, ...]] = ("text_encoder",)
    without: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    repeated_blocks = ("BasicTransformerBlock",)
    fsdp2 = False  # a UNet fits on one GPU anyway
    kohya: ClassVar[Kohya | None] = unet_names.SD_KOHYA
    comfyui = "lora_unet_"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        prompt_embeds = cond["prompt_embeds"].to(self.dtype)
        return network(x_t.to(self.dtype), t, encoder_hidden_states=prompt_embeds, **self._user(cond)).sample

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]
        embeds, unconditional = self.pipe.encode_prompt(
            texts, self.pipe.vae.device, 1, do_classifier_free_guidance=True
        )
        rows = [u if caption is None else e for caption, e, u in zip(captions, embeds, unconditional, strict=True)]
        return {"prompt_embeds": torch.stack(rows)}

    def embed(self, encoders: Any, ids: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": encoders["text_encoder"](ids["text_encoder"])[0]}

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.empty(n, 77, network.config.cross_attention_dim, device="meta")}

    def patch(self) -> int | None:
        return None  # the UNet pads what it halves

    @classmethod
    def checkpointed_blocks(cls) -> tuple[str, ...]:
        return ("ResnetBlock2D", *cls.repeated_blocks)

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        if not network.config.cross_attention_dim:
            raise no_users(network)
        return network.config.cross_attention_dim

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        return unet_names.in_loras(layers, config)

    # ---- the UNet's first half is its encoder

    @classmethod
    def stages(cls, network: torch.nn.Module) -> list[torch.nn.Module]:
        return [*network.down_blocks, network.mid_block]

    @staticmethod
    def hidden(output: Any) -> Tensor:
        return (output[0] if isinstance(output, tuple) else output).flatten(2)

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        """Nothing is left after the last down block (or the middle block), so that `predict` returns what it gives."""
        network.up_blocks, network.mid_block = torch.nn.ModuleList(), network.mid_block if middle else None
        network.conv_norm_out, network.conv_out = None, torch.nn.Identity()

    def features(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.predict(network, x_t, t, cond)
