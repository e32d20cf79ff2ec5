"""LongCat-Image: an MMDiT with rectified flow on packed latents, text by Qwen2.5-VL."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..common.errors import DiffpoError
from ..config import Model
from ..data.encoders import sources_in
from . import texts
from .editing import dimensions, lacks_picture
from .packed import PackedLatents, pack, positions, unpack
from .sd3 import JOINT_ATTENTION

TOKENS = 512  # of the caption; its padding is not masked, and the picture's places begin behind it
CELL = 28 * 28  # pixels of a token of Qwen2.5-VL


class LongCatImage(PackedLatents):
    """Its pipeline lets the text encoder rewrite prompts first. Here the texts are taken as they are."""

    pipelines = ("LongCatImagePipeline",)
    network_class = "LongCatImageTransformer2DModel"
    lora_targets = JOINT_ATTENTION
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock")
    feature_blocks = "transformer_blocks"

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        text = self._text(cond).to(self.dtype)
        order = torch.arange(length := text.shape[1], device=x_t.device).float()
        seen = [x_t, *sources_in(cond)]
        places = positions(height // 2, width // 2, x_t.device)
        output = network(
            torch.cat([pack(each.to(self.dtype)) for each in seen], 1),
            timestep=self.network_time(t) / self.train_timesteps,
            encoder_hidden_states=text,
            txt_ids=torch.stack([torch.zeros_like(order), order, order], 1),
            img_ids=torch.cat([places + places.new_tensor([k, length, length]) for k in range(1, len(seen) + 1)]),
        ).sample
        return unpack(output[:, : height * width // 4], height, width)

    def _text(self, cond: dict[str, Tensor]) -> Tensor:
        return cond["prompt_embeds"]

    def guided(self, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
        """No token becomes longer than it is without guidance."""
        height, width = cond.shape[-2:]
        plain, found = pack(cond), pack(super().guided(cond, uncond, guidance))
        scale = plain.norm(dim=-1, keepdim=True) / (found.norm(dim=-1, keepdim=True) + 1e-8)
        return unpack(found * scale.clamp(max=1.0), height, width)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        return {"prompt_embeds": self.pipe.encode_prompt(texts)[0]}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        return network.config.joint_attention_dim

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.empty(n, TOKENS, network.config.joint_attention_dim, device="meta")}

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        super().cut(network, middle)
        network.single_transformer_blocks = torch.nn.ModuleList()

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        found = super().painting(pipe, prompts, negative or "", noise, guidance)
        return {**found, "negative_prompt": [negative or ""] * len(prompts), "enable_prompt_rewrite": False}


class LongCatImageEdit(LongCatImage):
    """With a picture to edit, which the text encoder sees at half its sides. The network takes no mask, so that the
    pictures of a batch have one size, as their groups' images have."""

    pipelines = ("LongCatImageEditPipeline",)
    edits = reads_source = needs_source = True

    def __init__(self, settings: Model, precision: str = "no", resolution: int = 1024) -> None:
        super().__init__(settings, precision, resolution)
        self.room = TOKENS + 16 + math.ceil(1.125 * resolution**2 / 4 / CELL)

    def guided(self, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
        return PackedLatents.guided(self, cond, uncond, guidance)

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        raise lacks_picture(self.settings.path)

    @torch.no_grad()
    def encode_edits(
        self, captions: Sequence[str | None], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        rows = []
        for caption, (picture,) in zip(captions, pictures, strict=True):
            shown = self.pipe.image_processor.resize(picture, picture.height // 2, picture.width // 2)
            embeds = self.pipe.encode_prompt([caption or ""], image=shown)[0]
            if embeds.shape[1] > self.room:
                raise DiffpoError(
                    f"{self.settings.path}: a picture of {picture.width}x{picture.height} px has {embeds.shape[1]} "
                    f"tokens with its caption, and a row has room for {self.room}: choose one nearer to a square"
                )
            rows.append(embeds[0])
        return texts.padded(rows, self.room)

    def _text(self, cond: dict[str, Tensor]) -> Tensor:
        embeds, mask = cond["prompt_embeds"], cond["prompt_attention_mask"]
        return embeds if embeds.is_meta else embeds[:, : int(mask[0].sum())]

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return texts.widest(n, self.room, network.config.joint_attention_dim)

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        found = super().painting(pipe, prompts, negative, noise, guidance)
        return {key: value for key, value in found.items() if key not in ("height", "width", "enable_prompt_rewrite")}

    @classmethod
    @contextlib.contextmanager
    def editing(cls, pipe: Any, pictures: Sequence[Image.Image]) -> Iterator[dict[str, Any]]:
        (picture,) = pictures
        with dimensions(pipe, lambda own, area, ratio: picture.size):
            yield {"image": picture}
