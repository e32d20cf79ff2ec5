"""What the adapters of a network's own text encoders (text_encoders.py) are called, in the network and in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAME = "text_encoders"  # of the module in the network
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of CLIP's attention


def of(network: torch.nn.Module) -> Any:
    """The network's text encoders by name; empty if it has none."""
    return getattr(network, NAME, {})


def in_file(component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' weights by the names of the LoRA file: with the part before them, and CLIP's as they are since
    ever, with the level that transformers 5 left out."""
    found = {}
    for name, value in state.items():
        if name.startswith(f"{NAME}."):
            _, part, rest = name.split(".", 2)
            name = f"{part}.{rest if rest.startswith('text_model.') else f'text_model.{rest}'}"
        else:
            name = f"{component}.{name}"
        found[name] = value
    return found


def from_file(network: torch.nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `in_file`."""
    found = {}
    for name, value in state.items():
        part, rest = name.split(".", 1)
        if part in of(network):
            inner = hasattr(of(network)[part], "text_model")
            rest = f"{NAME}.{part}.{rest if inner else rest.removeprefix('text_model.')}"
        found[rest] = value
    return found


def settings(network: torch.nn.Module, lora: Any) -> dict[str, Any]:
    """peft's settings of the encoders' adapters for the header; ``lora``: those of the network's."""
    if not of(network):
        return {}
    about = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(TARGETS)}
    return {f"{part}.{key}": value for part in of(network) for key, value in about.items()}
