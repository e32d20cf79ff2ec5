"""In which order groups are drawn: a new permutation in each epoch, from (seed, epoch) alone."""

from __future__ import annotations

import functools


def order(seed: int, size: int, position: int) -> int:
    """Which group is drawn at ``position``: epoch after epoch, each in a new order that depends on (seed, epoch)
    alone."""
    epoch, place = divmod(position, size)
    return _permutation(seed, size, epoch)[place]


@functools.lru_cache(maxsize=2)  # an update may reach over the end of an epoch
def _permutation(seed: int, size: int, epoch: int) -> list[int]:
    return permutation(seed, size, "order", epoch)


def permutation(seed: int, size: int, purpose: str, epoch: int) -> list[int]:
    import torch  # here, so that `diffpo check` need not wait for it

    from ..common.rng import generator

    return torch.randperm(size, generator=generator(seed, purpose, epoch)).tolist()
