"""A LoRA of the text encoders beside the network's: they become a part of the network, and compute in each step.

So what switches, counts and saves the adapter of the network does so for theirs too. Conditions hold tokens in place of
embeddings (`Family.tokens`), and `Family.embedded` makes embeddings of them. With the adapter off the encoders are the
base's, which is what the reference sees.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..config import Lora
from .lora import ADAPTER, adapter_parameters
from .text_names import NAME, TARGETS


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
