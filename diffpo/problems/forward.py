"""The forward process as the source: x_t = alpha_t x_0 + sigma_t eps, one noise and one timestep per group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import config
from ..common.errors import DiffpoError
from ..common.rng import generator
from .regression import Regression

if TYPE_CHECKING:
    from ..data.batches import Batch


@dataclass(frozen=True)
class Forward:
    """Images of the data with noise added: a source of `Regression`.

    All members of a group get the same noise and the same t, uniform over 0..T-1 (or over ``settings.timesteps``, or
    within ``batch.timesteps``): sharing takes the variance of the draw out of the difference of the errors
    (Diffusion-DPO's code does it too). With ``shared_noise`` false every member draws its own.
    """

    family: Any
    settings: config.ForwardSettings = field(default_factory=config.ForwardSettings)

    def __post_init__(self) -> None:
        last = self.family.train_timesteps - 1
        for t in self.settings.timesteps or ():
            if not 0 <= t <= last:
                raise DiffpoError(f"objective.forward.timesteps: {t} is not a timestep of this model (0..{last})")

    def __call__(self, batch: Batch) -> Regression:
        draws = 1 if self.settings.shared_noise else batch.members
        noise = [[] for _ in range(draws)]
        timesteps = [[] for _ in range(draws)]
        for i, position in enumerate(batch.positions):
            draw = generator(batch.seed, f"{batch.purpose} noise", position)
            for member in range(draws):
                timesteps[member].append(self._timestep(batch, i, draw))
                noise[member].append(torch.randn(batch.x_0.shape[1:], generator=draw))
        copies = batch.members // draws
        eps = torch.cat([torch.stack(each) for each in noise]).to(batch.x_0.device).repeat(copies, 1, 1, 1)
        t = torch.tensor(timesteps, device=batch.x_0.device).flatten().repeat(copies)
        return Regression(
            x_t=self.family.add_noise(batch.x_0, eps, t),
            t=t,
            target=self.family.target(batch.x_0, eps, t),
            cond=batch.cond,
            preference=batch.preference,
            members=batch.members,
            scores=batch.scores,
        )

    def _timestep(self, batch: Batch, i: int, draw: torch.Generator) -> int:
        if batch.timesteps:
            return int(torch.randint(*batch.timesteps[i], (), generator=draw))
        if self.settings.timesteps:
            return self.settings.timesteps[int(torch.randint(len(self.settings.timesteps), (), generator=draw))]
        return int(torch.randint(self.family.train_timesteps, (), generator=draw))
