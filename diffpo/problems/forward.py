"""The forward process as the source: x_t = alpha_t x_0 + sigma_t eps, one noise and one timestep per group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import config
from ..common.errors import DiffpoError
from ..common.rng import Draws
from .regression import Conditioning, Regression

if TYPE_CHECKING:
    from ..data.batches import Batch
    from ..data.judgement import Judgement
    from ..models.family import Family


@dataclass(frozen=True)
class Forward:
    """Images with noise added: a source of `Regression`.

    All members of a group get the same noise and the same t. It is uniform over 0..T-1, over ``settings.timesteps``, or
    within the draws' own ranges. Sharing takes the variance of the draw out of the difference of the errors
    (Diffusion-DPO's code does it too). With ``shared_noise`` false every member draws its own.
    """

    family: Family
    settings: config.ForwardSettings = field(default_factory=config.ForwardSettings)

    def __post_init__(self) -> None:
        last = self.family.train_timesteps - 1
        for t in self.settings.timesteps or ():
            if not 0 <= t <= last:
                raise DiffpoError(f"objective.forward.timesteps: {t} is not a timestep of this model; use 0 to {last}")

    def __call__(self, batch: Batch) -> Regression:
        return replace(self.noised(batch.x_0, batch.cond, batch.judgement, batch.draws), mask=batch.mask)

    def noised(self, x_0: Tensor, cond: dict[str, Tensor], judgement: Judgement, draws: Draws) -> Regression:
        """The problems of any images x_0 (N, C, h, w) with N rows of conditions, n groups of them."""
        different = 1 if self.settings.shared_noise else judgement.members
        noise: list[list[Tensor]] = [[] for _ in range(different)]
        timesteps: list[list[int]] = [[] for _ in range(different)]
        for i, draw in enumerate(draws.generators("noise")):
            for member in range(different):
                timesteps[member].append(self._timestep(draws, i, draw))
                noise[member].append(torch.randn(x_0.shape[1:], generator=draw))
        copies = judgement.members // different
        eps = torch.cat([torch.stack(each) for each in noise]).to(x_0.device).repeat(copies, 1, 1, 1)
        t = torch.tensor(timesteps, device=x_0.device).flatten().repeat(copies)
        x_t, target = self.family.add_noise(x_0, eps, t), self.family.target(x_0, eps, t)
        return Regression(x_t, t, target, Conditioning(cond), judgement)

    def _timestep(self, draws: Draws, i: int, draw: torch.Generator) -> int:
        if draws.timesteps:
            return int(torch.randint(*draws.timesteps[i], (), generator=draw))
        if self.settings.timesteps:
            return self.settings.timesteps[int(torch.randint(len(self.settings.timesteps), (), generator=draw))]
        return int(torch.randint(self.family.train_timesteps, (), generator=draw))
