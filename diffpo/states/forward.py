"""The forward process as the source: x_t = alpha_t x_0 + sigma_t eps, one noise and one timestep per pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..rng import generator
from . import Regression

if TYPE_CHECKING:
    from ..data.batches import PairBatch


def shared_noise(family: Any, batch: PairBatch) -> Regression:
    """Both images of a pair get the same noise and the same t, uniform over 0..T-1 (or within ``batch.timesteps``).

    Sharing takes the variance of the draw out of the difference of the two errors (Diffusion-DPO's code does it too).
    """
    n = len(batch.positions)
    shape = batch.x_0.shape[1:]
    noises, timesteps = [], []
    for i, position in enumerate(batch.positions):
        draw = generator(batch.seed, f"{batch.purpose} noise", position)
        low, high = batch.timesteps[i] if batch.timesteps else (0, family.train_timesteps)
        timesteps.append(int(torch.randint(low, high, (), generator=draw)))
        noises.append(torch.randn(shape, generator=draw))
    device = batch.x_0.device
    noise = torch.stack(noises).to(device).repeat(2, 1, 1, 1)
    t = torch.tensor(timesteps, device=device).repeat(2)
    assert len(t) == 2 * n == len(batch.x_0)
    return Regression(
        x_t=family.add_noise(batch.x_0, noise, t),
        t=t,
        target=family.target(batch.x_0, noise, t),
        cond=batch.cond,
        preference=batch.preference,
    )
