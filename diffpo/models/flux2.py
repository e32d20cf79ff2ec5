"""FLUX.2: klein reads texts with Qwen3 and is guided twice or distilled, dev with Mistral and takes guidance as input.

Its latents are 2 x 2 of the VAE's in one (autoencoders.py), so that a latent is a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..config import Model
from ..data.encoders import sources_in
from . import recent_names, texts
from .family import Family
from .original import Piece
from .sd3 import JOINT_ATTENTION

TOKENS = 512  # of the text, none of which is masked
LAYERS = 3  # of the text encoder, side by side
STEPS = 50  # the pipelines' default, on which their shift depends


class Flux2Klein(Family):
    pipelines = ("Flux2KleinPipeline",)
    network_class = "Flux2Transformer2DModel"
    comfyui = "transformer."
    lora_targets = (*JOINT_ATTENTION, "to_qkv_mlp_proj")  # the last one: of the single stream's blocks
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    repeated_blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    feature_blocks = "transformer_blocks"
    edits = several = True

    def __init__(self, settings: Model, precision: str = "no", resolution: int = 1024) -> None:
        super().__init__(settings, precision, resolution)
        if self.source.index().get("is_distilled"):  # its pipeline calls the network once, whatever the scale
            self.guidance_is_input = True

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        n, _, height, width = x_t.shape
        text = cond["prompt_embeds"].to(self.dtype)
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full((n,), self.settings.guidance, device=x_t.device)
        tokens, spots = flat(x_t.to(self.dtype)), places((1, height, width, 1), n, x_t.device)
        for k, source in enumerate(sources_in(cond), 1):  # their tokens come after those of x_t
            beside = places((1, *source.shape[-2:], 1), n, x_t.device)
            spots = torch.cat([spots, beside + beside.new_tensor([10 * k, 0, 0, 0])], 1)
            tokens = torch.cat([tokens, flat(source.to(self.dtype))], 1)
        found = network(
            tokens,
            timestep=self.network_time(t) / self.train_timesteps,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=places((1, 1, 1, text.shape[1]), n, x_t.device),
            img_ids=spots,
            **self._user(cond),
        ).sample
        return self.unpacked(found[:, : height * width], height, width)

    def mu(self, config: dict[str, Any], tokens: int) -> float:
        """Fitted by its authors to the number of tokens and of steps (flux2's sampling.py, compute_empirical_mu)."""
        many = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return many
        few = 8.73809524e-05 * tokens + 1.89833333
        return many + (few - many) * (200 - STEPS) / 190

    def patch(self) -> int | None:
        return 1

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        prompts = [caption or "" for caption in captions]  # unconditional is the empty caption
        embeds, _ = self.pipe.encode_prompt(prompts, self.pipe.vae.device, max_sequence_length=TOKENS)
        return {"prompt_embeds": embeds}

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        return recent_names.flux2(layers)

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        return network.config.joint_attention_dim

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.empty(n, TOKENS, network.config.joint_attention_dim, device="meta")}

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        super().cut(network, middle)
        network.single_transformer_blocks = torch.nn.ModuleList()

    @classmethod
    def as_read(cls, pipe: Any, prompts: Sequence[str]) -> list[str]:
        return texts.chats(pipe.tokenizer, prompts, thinking=False)

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        return pipe.default_sample_size // 2

    @classmethod
    def unpacked(cls, latents: Tensor, height: int, width: int) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (height, width))

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        found = super().painting(pipe, prompts, None, noise, guidance)
        del found["negative_prompt"]
        if negative:
            found["negative_prompt_embeds"] = pipe.encode_prompt([negative] * len(prompts))[0]
        return found


class Flux2(Flux2Klein):
    pipelines = ("Flux2Pipeline",)
    guidance_is_input = True

    @classmethod
    def as_read(cls, pipe: Any, prompts: Sequence[str]) -> list[str]:
        return [pipe.system_message + text for text in prompts]

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        if negative:
            raise DiffpoError("FLUX.2 takes no negative prompt (guidance is an input of its network): leave it out")
        return super().painting(pipe, prompts, None, noise, guidance)


def flat(x: Tensor) -> Tensor:
    """(n, C, h, w) -> (n, h w, C)."""
    return x.flatten(2).transpose(1, 2)


def places(size: tuple[int, int, int, int], n: int, device: Any) -> Tensor:
    """(picture, row, column, place in the text) of each token, (n, tokens, 4)."""
    axes = [torch.arange(each, device=device) for each in size]
    return torch.cartesian_prod(*axes)[None].expand(n, -1, -1)
