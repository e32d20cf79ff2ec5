"""FLUX.1: an MMDiT with rectified flow on packed latents, CLIP and T5, and guidance as an input."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from . import flux_names
from .original import Piece
from .packed import PackedLatents, pack, positions, unpack
from .sd3 import JOINT_ATTENTION

if TYPE_CHECKING:
    from PIL import Image

TOKENS = 512  # of T5


class Flux(PackedLatents):
    pipelines = ("FluxPipeline",)
    network_class = "FluxTransformer2DModel"
    lora_targets = JOINT_ATTENTION
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    clips = ("text_encoder",)
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    feature_blocks = "transformer_blocks"
    fsdp2 = True
    kohya = flux_names.KOHYA
    comfyui = "transformer."
    guidance_is_input = True

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        height, width = x_t.shape[-2:]
        text = cond["prompt_embeds"].to(self.dtype)
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full((len(x_t),), self.settings.guidance, device=x_t.device)
        tokens, places = pack(x_t.to(self.dtype)), positions(height // 2, width // 2, x_t.device)
        if "source" in cond:  # its tokens come after those of x_t, and their first coordinate is 1
            rows, columns = cond["source"].shape[-2:]
            beside = positions(rows // 2, columns // 2, x_t.device)
            places = torch.cat([places, beside + beside.new_tensor([1, 0, 0])])
            tokens = torch.cat([tokens, pack(cond["source"].to(self.dtype))], 1)
        output = network(
            tokens,
            timestep=self.network_time(t) / self.train_timesteps,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_prompt_embeds"].to(self.dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            img_ids=places,
            **self._user(cond),
        ).sample
        return unpack(output[:, : height * width // 4], height, width)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        embeds, pooled, _ = self.pipe.encode_prompt(texts, device=self.pipe.vae.device)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def embed(self, encoders: Any, ids: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled_prompt_embeds": encoders["text_encoder"](ids["text_encoder"]).pooler_output}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        return network.config.joint_attention_dim

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        return flux_names.in_loras(layers, config)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {
            "prompt_embeds": torch.empty(n, TOKENS, network.config.joint_attention_dim, device="meta"),
            "pooled_prompt_embeds": torch.empty(n, network.config.pooled_projection_dim, device="meta"),
        }

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        super().cut(network, middle)
        network.single_transformer_blocks = torch.nn.ModuleList()

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        if negative:
            raise DiffpoError("FLUX takes no negative prompt (guidance is an input of its network): leave it out")
        return super().painting(pipe, prompts, None, noise, guidance)


class FluxKontext(Flux):
    """FLUX.1 Kontext: the same with a picture that the caption says how to edit (arXiv 2506.15742)."""

    pipelines = ("FluxKontextPipeline",)
    edits = True

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        """Without a picture to edit. Its pipeline would else resize what is asked for to 1024 px."""
        found = super().painting(pipe, prompts, negative, noise, guidance)
        return found | {"max_area": found["height"] * found["width"]}

    @classmethod
    def editing(cls, pipe: Any, pictures: Sequence[Image.Image]) -> AbstractContextManager[dict[str, Any]]:
        (picture,) = pictures
        return nullcontext({"image": picture, "_auto_resize": False})
