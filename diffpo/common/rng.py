"""Stateless random numbers: every draw has an address, so results do not depend on resuming, accumulation or the number
of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator that depends on its three arguments alone.

    ``position`` counts the pairs drawn since the start of training, step * pairs per update + place in the update.
    """
    digest = blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Draws:
    """The addresses of what is drawn for n groups: one position each. ``timesteps`` are the [low, high) that each
    group's timestep is drawn from; None: all of the model's."""

    seed: int
    purpose: str
    positions: Sequence[int]
    timesteps: Sequence[tuple[int, int]] | None = None

    def generators(self, what: str) -> list[torch.Generator]:
        """One for each group; other names of ``what`` give independent draws."""
        return [generator(self.seed, f"{self.purpose} {what}", position) for position in self.positions]


def normal(generators: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise on the CPU, (n, *shape): one sample from each generator."""
    return torch.stack([torch.randn(tuple(shape), generator=each) for each in generators])
