"""The reference policy: what the policy is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def adapter_off(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The policy's own module with its adapter switched off, without gradients: the base model, and no second copy of
    it.

    ``unet`` is the bare module, not its DDP wrapper: a forward pass of the wrapper would wait for a backward pass.
    """
    unet.disable_adapters()
    try:
        with torch.no_grad():
            yield unet
    finally:
        unet.enable_adapters()
