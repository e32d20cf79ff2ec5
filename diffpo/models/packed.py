"""Families whose networks and pipelines have latents as tokens of 2 x 2 of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family


class PackedLatents(Family):
    """A family whose pipeline takes and returns what `pack` makes of latents."""

    def patch(self) -> int | None:
        return 2  # that of `pack`; the network's own may be 1

    @staticmethod
    def latent_channels(config: Any) -> int:
        return config.in_channels // 4

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        return pipe.default_sample_size

    @classmethod
    def unpacked(cls, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        return {**super().painting(pipe, prompts, negative, noise, guidance), "latents": pack(noise)}


def pack(x: Tensor) -> Tensor:
    """(n, C, h, w) -> (n, h w / 4, 4 C), patches of 2 x 2."""
    n, channels, height, width = x.shape
    return (
        x.view(n, channels, height // 2, 2, width // 2, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(n, height * width // 4, 4 * channels)
    )


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    n, _, channels = tokens.shape
    return (
        tokens.view(n, height // 2, width // 2, channels // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(n, channels // 4, height, width)
    )


def positions(height: int, width: int, device: Any) -> Tensor:
    """(0, row, column) of each patch, (height width, 3)."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
