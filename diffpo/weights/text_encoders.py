"""A LoRA of the text encoders beside the network's: they become a part of the network, and compute in each step.

So what switches, counts and saves the adapter of the network does so for theirs too. Conditions hold tokens in place of
embeddings (`Family.tokens`), and `Family.embedded` makes embeddings of them. With the adapter off the encoders are the
base's, which is what the reference sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import Lora
from .lora import ADAPTER, adapter_parameters

NAME = "text_encoders"  # of the module in the network
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of CLIP's attention


def attach(
    network: torch.nn.Module, encoders: Mapping[str, torch.nn.Module], lora: Lora, seed: int
) -> list[torch.nn.Parameter]:
    """Make the frozen ``encoders``, by their names in the pipeline, a part of the network, with a fresh adapter each;
    the adapters' parameters, float32."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.whole_alpha, target_modules=list(TARGETS))
    config.init_lora_weights = "gaussian"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for encoder in encoders.values():
            inject_adapter_in_model(config, encoder, ADAPTER)
    setattr(network, NAME, torch.nn.ModuleDict(encoders))
    own = [value for name, value in adapter_parameters(network).items() if name.startswith(f"{NAME}.")]
    for parameter in own:
        parameter.data = parameter.data.float()
    return own


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
    about = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(TARGETS)}
    return {f"{part}.{key}": value for part in of(network) for key, value in about.items()}
