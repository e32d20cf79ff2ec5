"""Sharded tensors (FSDP2): gathered whole, and cut as another one is."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(value: Any) -> Any:
    """``value`` (a tensor, or dicts and lists with tensors in them) with sharded tensors gathered: to be called by all
    processes alike."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda each: each.full_tensor() if hasattr(each, "full_tensor") else each, value)


def like(value: Tensor, here: Any) -> Tensor:
    """The whole tensor ``value``, sharded as the tensor ``here`` is; to be called by all processes alike."""
    if not hasattr(here, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(here.to_local().device, here.dtype), here.device_mesh, here.placements)
