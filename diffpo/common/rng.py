"""Stateless random numbers: every draw has an address, so results do not depend on resuming, accumulation or the number
of processes."""

from __future__ import annotations

from hashlib import blake2b

import torch


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator that depends on its three arguments alone.

    ``position`` counts the pairs drawn since the start of training, step * pairs per update + place in the update.
    """
    digest = blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
