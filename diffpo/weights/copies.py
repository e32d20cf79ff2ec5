"""What the policy is compared with, on the same network: the base model, and a second copy that a reference moves.

Of a LoRA, the base is the network with its adapter switched off, and the second copy is a second adapter (adapter.py).
Of a network that is trained as a whole, both are frozen copies of it (full.py).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from . import trained
from .lora import REFERENCE

if TYPE_CHECKING:
    import torch

NAME = REFERENCE  # of the second copy


def switched(network: torch.nn.Module, adapter: str | None) -> contextlib.AbstractContextManager[torch.nn.Module]:
    """A context whose value is ``network`` with ``adapter`` alone active (None: the base model), without gradients."""
    return trained.of(network).switched(adapter)


def adapter_off(network: torch.nn.Module) -> contextlib.AbstractContextManager[torch.nn.Module]:
    """The base model: the policy's own module with its adapter switched off, and no second copy of it unless the whole
    network is trained."""
    return switched(network, None)


def add_adapter(network: torch.nn.Module) -> None:
    """Begin the second copy, equal to the policy."""
    trained.of(network).add_copy()


def weights(network: torch.nn.Module, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of the policy (`lora.ADAPTER`) or of the second copy (`NAME`), by the same names."""
    return trained.of(network).parameters(adapter)
