"""The order in which groups are drawn: a new permutation in each epoch, from (seed, epoch) alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..common.rng import generator


def order(seed: int, size: int, position: int, purpose: str = "order") -> int:
    """Which of ``size`` items is drawn at ``position``: all of them in each epoch, in an order that depends on (seed,
    purpose, epoch) alone."""
    epoch, place = divmod(position, size)
    return permutation(seed, size, purpose, epoch)[place]


@functools.lru_cache(maxsize=4)  # an update may span two epochs, of two orders
def permutation(seed: int, size: int, purpose: str, epoch: int) -> Sequence[int]:
    """0, 1, ..., size - 1 in a random order that depends on the arguments alone."""
    return torch.randperm(size, generator=generator(seed, purpose, epoch)).tolist()
