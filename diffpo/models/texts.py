"""Texts of several lengths as rows of equal length, which caches and batches need, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def padded(texts: Sequence[Tensor], tokens: int) -> dict[str, Tensor]:
    """Embeddings (length, d) -> ``prompt_embeds`` (n, tokens, d), padded with zeros, and their mask (n, tokens)."""
    embeds = texts[0].new_zeros(len(texts), tokens, texts[0].shape[-1])
    mask = torch.zeros(len(texts), tokens, dtype=torch.long, device=embeds.device)
    for row, text in enumerate(texts):
        embeds[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def unpadded(embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """The inverse of `padded`: what the mask leaves of each row."""
    if embeds.is_meta:
        return list(embeds.unbind())
    return [row[: int(length)] for row, length in zip(embeds, mask.sum(1), strict=True)]


def trimmed(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both without the columns that are padding in all rows, which the network would mask. None if nothing is masked
    then."""
    if embeds.is_meta:
        return embeds, None
    longest = max(1, int(mask.sum(1).max()))
    embeds, mask = embeds[:, :longest], mask[:, :longest]
    return embeds, None if bool(mask.all()) else mask


def widest(n: int, tokens: int, width: int) -> dict[str, Tensor]:
    """The shapes of n rows without padding, on the meta device."""
    return {
        "prompt_embeds": torch.empty(n, tokens, width, device="meta"),
        "prompt_attention_mask": torch.ones(n, tokens, dtype=torch.long, device="meta"),
    }


def chats(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[str]:
    """Prompts as Qwen3 reads them in the pipelines."""
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    return [tokenizer.apply_chat_template([{"role": "user", "content": text}], **options) for text in prompts]


def chosen(captions: Sequence[str | None], found: Sequence[Tensor]) -> dict[str, Tensor]:
    """``found``: embeddings, mask, and the same of no caption, as pipelines give them. Rows by the captions."""
    embeds, mask, no_embeds, no_mask = found
    absent = torch.tensor([caption is None for caption in captions], device=embeds.device)
    return {
        "prompt_embeds": torch.where(absent[:, None, None], no_embeds, embeds),
        "prompt_attention_mask": torch.where(absent[:, None], no_mask, mask),
    }
