"""HiDream-I1: a sparse MMDiT with rectified flow, two CLIPs, T5 and all layers of Llama 3 (arXiv 2505.22705)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .family import Family, no_users
from .source import vae_factor

TOKENS = 128  # of each text encoder


class HiDream(Family):
    pipelines = ("HiDreamImagePipeline",)
    network_class = "HiDreamImageTransformer2DModel"
    comfyui = "transformer."
    lora_targets = tuple(f"to_{name}" for name in ("q", "k", "v", "out", "q_t", "k_t", "v_t", "out_t"))
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
    repeated_blocks = ("HiDreamBlock",)
    feature_blocks = "double_stream_blocks"

    def load_network(self, device: Any = "cpu") -> torch.nn.Module:
        """Its experts stay in training mode, whose numbers are the same: the other mode has no gradients."""
        network = super().load_network(device)
        for module in _experts(network):
            module.training = True
        return network

    def meta_network(self) -> torch.nn.Module:
        """Every token goes through the first experts, as many as through those that a router chooses; the size of the
        (square) picture cannot be read from a tensor on the meta device."""
        network: Any = super().meta_network().eval()  # in training mode its output has another shape
        for module in _experts(network):
            module.forward = _unrouted(module)
        network.unpatchify = lambda tokens, _sizes, _training: _square(tokens, network.config.patch_size)
        return network

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -network(  # it predicts x_0 - noise
            x_t.to(self.dtype),
            timesteps=self.network_time(t),
            encoder_hidden_states_t5=cond["prompt_embeds"].to(self.dtype),
            encoder_hidden_states_llama3=cond["prompt_embeds_llama3"].to(self.dtype).transpose(0, 1),
            pooled_embeds=cond["pooled_prompt_embeds"].to(self.dtype),
        ).sample

    def mu(self, config: dict[str, Any], tokens: int) -> float:
        """That of the largest picture, whatever the size."""
        network = self._config("transformer")
        height, width = network.get("max_resolution", (128, 128))
        return super().mu({}, height * width // network["patch_size"] ** 2)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        texts = [caption or "" for caption in captions]  # unconditional is the empty caption
        t5, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=self.pipe.vae.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"prompt_embeds": t5, "prompt_embeds_llama3": llama.transpose(0, 1), "pooled_prompt_embeds": pooled}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        t5, llama = network.config.caption_channels
        layers = max(network.config.llama_layers) + 1
        return {
            "prompt_embeds": torch.empty(n, TOKENS, t5, device="meta"),
            "prompt_embeds_llama3": torch.empty(n, layers, TOKENS, llama, device="meta"),
            "pooled_prompt_embeds": torch.empty(n, network.config.text_emb_dim, device="meta"),
        }

    @staticmethod
    def hidden(output: Any) -> Tensor:
        return output[0].transpose(1, 2)  # the picture's stream comes first

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        super().cut(network, middle)
        network.single_stream_blocks = torch.nn.ModuleList()

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        return 1024 // vae_factor(pipe)

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        # it resizes what is asked for to the area of its default size, and rounds down
        pipe.default_sample_size = (noise.shape[-1] * noise.shape[-2]) ** 0.5 * (1 + 1e-9)
        return super().painting(pipe, prompts, negative, noise, guidance)


def _experts(network: torch.nn.Module) -> list[Any]:
    return [module for module in network.modules() if type(module).__name__ == "MOEFeedForwardSwiGLU"]


def _square(tokens: Tensor, patch: int) -> Tensor:
    """(n, side^2, patch^2 C) -> (n, C, patch side, patch side), empty."""
    n, count, width = tokens.shape
    side = patch * math.isqrt(count)
    return tokens.new_empty(n, width // patch**2, side, side)


def _unrouted(module: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return sum((expert(x) for expert in module.experts[: module.num_activated_experts]), module.shared_experts(x))

    return forward
