"""The part of a model family that batches need; models.family.Family is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor


def source_condition(latents: Sequence[Tensor]) -> Tensor:
    """The condition ``source`` of pictures to edit, (n, C, h, w) each: one as it is, several (n, k, C, h, w)."""
    return latents[0] if len(latents) == 1 else torch.stack(list(latents), 1)


def sources_in(cond: dict[str, Tensor]) -> list[Tensor]:
    """The latents of the pictures to edit, (n, C, h, w) each, in their order; none for texts alone."""
    source = cond.get("source")
    if source is None:
        return []
    return [source] if source.ndim == 4 else list(source.unbind(1))


class Encoders(Protocol):
    """The text encoders and the VAE of a family. They are only needed while caches are built.

    Attributes:
        train_timesteps: of the model.
        edits: whether the model edits a picture, whose latents are the condition ``source``.
        several: whether it takes several pictures for one caption.
        reads_source: whether its text encoder sees them too.
        needs_source: whether every caption needs one.
    """

    train_timesteps: int
    edits: bool
    several: bool
    reads_source: bool
    needs_source: bool

    def require_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """DiffpoError unless the network supports images of these sizes (width, height)."""

    def text_hash(self) -> str:
        """A hash of everything that text embeddings depend on."""

    def vae_hash(self) -> str:
        """The same for latents."""

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        """Embeddings of n captions, None for the empty one: {name: (n, ...)}."""

    def encode_edits(
        self, captions: Sequence[str | None], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """The same of captions with the pictures that each is about, if it ``reads_source``."""

    def encode_image(self, pixels: Tensor) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` (n, C, h, w) of images (n, 3, H, W) in [-1, 1]."""

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Latents as the network uses them."""

    def condition(self, text: dict[str, Tensor], micro_conditioning: Tensor) -> dict[str, Tensor]:
        """The network's conditions, from embeddings and sizes (n, 6)."""
