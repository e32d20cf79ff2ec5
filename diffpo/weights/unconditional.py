"""Weights of their own for the unconditional half of guidance (Diffusion-NPO, Wang et al. 2025, arXiv 2505.11245).

Guidance is uncond + s (cond - uncond). The unconditional half says what to move away from, so a model of what people
reject serves better there than the base. As in the released code that model is base + positive + negative change: the
LoRA of the conditional half is in both, so that their difference is the negative LoRA's alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DiffpoError
from . import lora_change
from .full import WholeNetwork
from .lora import network_of
from .lora_apply import check_lora
from .lora_file import lora_file


def prepared(
    pipe: Any, negative: str | Path, strength: float, positive: str | Path | None, positive_strength: float
) -> torch.nn.Module:
    """A copy of the base network of ``pipe`` with both changes in its weights. To be called before ``positive`` (a LoRA
    or a whole network, None: nothing) is loaded into ``pipe``.

    DiffpoError if the negative change is no LoRA of this base, or adapts more than the network.
    """
    network = network_of(pipe)
    found = copy.deepcopy(network)
    if positive is not None and WholeNetwork.find(positive) is not None:
        raise DiffpoError(f"--negative-lora goes with a LoRA, but {positive} is a whole network: train a LoRA")
    path = lora_file(negative)
    for file, weight in ((positive and lora_file(positive), positive_strength), (path, strength)):
        if file is None:
            continue
        changes = check_lora(pipe, file)
        own = next(name for name in ("unet", "transformer") if getattr(pipe, name, None) is network)
        if file == path and changes.keys() - {own}:
            raise DiffpoError(
                f"the negative LoRA {path} also adapts {', '.join(sorted(changes.keys() - {own}))}, which both halves "
                f"of guidance share: train it without text encoders"
            )
        lora_change.merge(found, changes.get(own, []), weight)
    return found


def attach(network: torch.nn.Module, other: torch.nn.Module) -> Callable[[], None]:
    """From now on the first half of every batch that ``network`` gets is computed by ``other``; diffusers' pipelines
    put the unconditional rows there. Returns a function that ends it."""
    own = network.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) % 2:
            raise ValueError(f"{len(x)} rows are no two halves of guidance")
        halves = [_half((x, args, kwargs), len(x), part) for part in (0, 1)]
        outputs = [
            call(own_x, *own_args, **own_kwargs)
            for call, (own_x, own_args, own_kwargs) in zip((other, own), halves, strict=True)
        ]
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(each) for each in zip(*outputs, strict=True))
        return type(outputs[1])(sample=torch.cat([each.sample for each in outputs]))

    network.forward = forward

    def detach() -> None:
        network.forward = own

    return detach


def _half(value: Any, rows: int, part: int) -> Any:
    """The rows of half ``part`` of all tensors with ``rows`` rows in a nested value."""
    if isinstance(value, torch.Tensor):
        return value.chunk(2)[part] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _half(each, rows, part) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_half(each, rows, part) for each in value)
    return value
