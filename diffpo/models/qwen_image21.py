"""Qwen-Image 2.1: one causal stream of texts and pictures with rectified flow, text and pictures read by Qwen3-VL.

A latent is a token. The pictures to edit stand in the text, where the text encoder has seen them; the picture that is
made follows behind, at a position that depends on how long the text is. So a row is never padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..common.errors import DiffpoError
from ..common.text import plain
from ..config import Model
from ..data.encoders import sources_in
from ..data.keys import content_key
from . import texts
from .family import Family, no_users
from .flux2 import flat

TOKENS = 512  # of the caption; the pipeline has no limit, and a longer one is refused
TEMPLATE, MARKS = 32, 16  # tokens around the caption, and around each picture
SLOT = 2  # latents in one token of the text encoder, each way
NOTHING = " "  # the unconditional caption: the pipeline reads an empty one so


class QwenImage21(Family):
    pipelines = ("QwenImage21Pipeline",)
    network_class = "QwenImage21Transformer2DModel"
    encoders = ("text_encoder",)
    tokenizers = ("processor",)
    repeated_blocks = ("QwenImage21TransformerBlock",)
    edits = several = reads_source = singly = True

    def __init__(self, settings: Model, precision: str = "no", resolution: int = 1024) -> None:
        super().__init__(settings, precision, resolution)
        self.resolution = resolution

    def patch(self) -> int:
        return SLOT

    def mu(self, config: dict[str, Any], tokens: int) -> float:
        return super().mu(config, SLOT**2 * tokens)  # each latent is a token

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """One call for the rows of each length of text: the network takes one layout."""
        if x_t.is_meta:
            return self._shapes(network, x_t, cond)
        lengths = cond["prompt_attention_mask"].sum(1).tolist()
        found: list[Tensor] = [x_t] * len(x_t)
        for length in sorted(set(lengths)):
            rows = [row for row, each in enumerate(lengths) if each == length]
            own = {name: value[rows] for name, value in cond.items()}
            for row, output in zip(rows, self._call(network, x_t[rows], t[rows], own, length), strict=True):
                found[row] = output
        return torch.stack(found)

    def _call(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], length: int) -> Tensor:
        height, width = x_t.shape[-2:]
        seen = [*sources_in(cond), x_t]
        slots = cond["picture_slots"][:, :length].bool()
        made = slots.new_ones(len(x_t), height * width // SLOT**2)
        output = network(
            torch.cat([flat(each.to(self.dtype)) for each in seen], 1),
            timestep=self.network_time(t) / self.train_timesteps,
            encoder_hidden_states=cond["prompt_embeds"][:, :length].to(self.dtype),
            img_shapes=[[(1, *each.shape[-2:]) for each in seen]] * len(x_t),
            img_mask=torch.cat([slots, made], 1),
        ).sample
        return self.unpacked(output[:, -height * width :], height, width)

    def _shapes(self, network: Any, x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """What the layers compute on the meta device, where a layout cannot be looked at: text, then pictures."""
        height, width = x_t.shape[-2:]
        seen = torch.cat([flat(each.to(self.dtype)) for each in (*sources_in(cond), x_t)], 1)
        text = network.txt_in(cond["prompt_embeds"].to(self.dtype))
        tokens = torch.cat([text, network.img_in(seen)], 1)
        times = network.time_text_embed(torch.zeros(len(x_t) + 1, device="meta"), tokens)
        target = torch.ones(tokens.shape[1], dtype=torch.bool, device="meta")
        prefix = tokens.shape[1] - height * width
        for block in network.transformer_blocks:
            tokens = block(tokens, network.modulation(times), target_token_mask=target, segments=[(0, prefix, True)])
        output = network.proj_out(network.norm_out(tokens, times, target))
        return self.unpacked(output[:, -height * width :], height, width)

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        return self.encode_edits(captions, [[]] * len(captions))

    @torch.no_grad()
    def encode_edits(
        self, captions: Sequence[str | None], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        room, rows, places = self.room(len(pictures[0])), [], []
        for caption, own in zip(captions, pictures, strict=True):
            text = NOTHING if caption is None else caption
            embeds, _, slots = self.pipe.encode_prompt([text], list(own) or None, self.pipe.vae.device)
            if embeds.shape[1] > room:
                raise DiffpoError(
                    f"{self.settings.path}: the caption {plain(text, 60)!r} has {embeds.shape[1]} tokens with its "
                    f"pictures, and a row has room for {room}: shorten it"
                )
            rows.append(embeds[0])
            places.append(torch.nn.functional.pad(slots[0].long(), (0, room - slots.shape[1])))
        return {**texts.padded(rows, room), "picture_slots": torch.stack(places)}

    def room(self, pictures: int) -> int:
        """Tokens of a row: of a caption with so many pictures, whose sides are rounded, and the template."""
        slots = math.ceil(1.125 * (self.resolution / self.vae_factor() / SLOT) ** 2)
        return TOKENS + TEMPLATE + pictures * (MARKS + slots)

    def text_hash(self) -> str:
        return content_key(super().text_hash(), self.pipe.processor.image_processor.to_json_string())

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return self.meta_edits(network, n, 0)

    def meta_edits(self, network: torch.nn.Module, n: int, sources: int) -> dict[str, Tensor]:
        found = texts.widest(n, self.room(sources), network.config.context_in_dim)
        return {**found, "picture_slots": torch.empty_like(found["prompt_attention_mask"])}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        return 1024 // pipe.vae_scale_factor

    @classmethod
    def unpacked(cls, latents: Tensor, height: int, width: int) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (height, width))

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        """Without the grid of its own that a distilled pipeline has: the solver's has as many calls as asked for."""
        if pipe.config.sample_sigmas is not None:
            pipe.register_to_config(sample_sigmas=None)
        found = super().painting(pipe, prompts, None, noise, guidance)
        del found["guidance_scale"]
        if guidance > 1:  # it takes this scale and a negative prompt, or warns
            found["negative_prompt"] = [NOTHING if negative is None else negative] * len(prompts)
        return {**found, "latents": flat(noise), "true_cfg_scale": guidance}

    @classmethod
    def editing(cls, pipe: Any, pictures: Sequence[Image.Image]) -> AbstractContextManager[dict[str, Any]]:
        """At the size of the pictures: the pipeline brings them to an area of this side, squared."""
        return nullcontext({"image": list(pictures), "output_resolution": math.sqrt(math.prod(pictures[0].size))})
