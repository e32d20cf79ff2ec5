"""DDIM inversion as the source: the noisy latents from which the reference would have sampled the image itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samplers.prediction import convert

from .. import config
from ..common.errors import DiffpoError
from ..common.rng import generator
from ..common.worker import ALONE, Worker
from ..data.cache import Cache, content_key
from ..models.identity import base_identity
from .policy import Policy
from .regression import Conditioning, Regression

if TYPE_CHECKING:
    from ..data.batches import Batch, Batches
    from ..data.rows import Group

IMAGES = 8  # that are inverted at once for the cache


class Inversion:
    """Images of the data, inverted by the reference: InPO (Lu et al. 2025, arXiv 2503.18454), SmPO (arXiv 2506.02698).

    x_0 climbs a grid of ``steps`` noise levels by DDIM's step read backwards (Song et al. 2020, arXiv 2010.02502,
    eq. 13), without guidance, and stops at a level t that is drawn for its group. The target is the noise in x_t,
    eps* = (x_t - alpha_t x_0) / sigma_t, as the network would have to predict it. This is InPO's reward, which takes
    the network for a one-step generator of x_0 from x_t.

    With ``average`` a step takes the mean of the predictions at its start and at its end (ReNoise, arXiv 2403.14602;
    Heun's method for the probability-flow ODE), at twice the cost. With ``eta`` it replaces a share of the predicted
    noise by fresh noise, with eta^2 times the variance of the transition back (DDPM's).

    The released code departs from this in three ways. It draws t anywhere in 0..T-1 and stops on a grid of 10, so that
    latents lie up to 99 timesteps off the t that the network gets. It inverts with the policy. It adds eta's noise on
    top, which raises the level. Here every latent is on the level that the network gets. The only exception is the
    first call: the clean image is passed as t = 0, the lowest timestep.
    """

    def __init__(
        self,
        settings: config.InversionSettings,
        policy: Policy,
        reference: Callable[[], AbstractContextManager[Policy]],
    ) -> None:
        """``reference()``: a context whose value is the reference's policy (`Reference.on`)."""
        self.settings, self.policy, self.reference = settings, policy, reference
        self.family = family = policy.family
        steps, total = settings.steps, family.train_timesteps
        if steps > total:
            raise DiffpoError(f"objective.inversion.steps={steps} must be at most {total}, the model's timesteps")
        # the last is T-1: the whole range of noise is trained on, in equal parts
        self.grid = torch.tensor([(2 * (k + 1) * total + steps) // (2 * steps) - 1 for k in range(steps)])
        alpha, sigma = (level.flatten().tolist() for level in family.alpha_sigma(self.grid))
        low = [level.item() for level in family.alpha_sigma(torch.tensor([0]))]
        # where the state is, and what the network gets for it; level 0 is the clean image
        self.levels = [(1.0, 0.0), *zip(alpha, sigma, strict=True)]
        self.inputs = [(0, *low), *zip(self.grid.tolist(), alpha, sigma, strict=True)]
        self.kept: Cache | None = None  # filled by `prepare`

    def __call__(self, batch: Batch) -> Regression:
        draws = batch.draws.generators("inversion")
        climbs = [1 + int(torch.randint(self.settings.steps, (), generator=draw)) for draw in draws]
        if self.kept is None:
            x_0 = batch.x_0
            x_t = self.invert(x_0, batch.cond, climbs, draws)[-1]
        else:
            x_0 = self.batches.means(batch.indices)
            x_t = self._read(self.kept, batch.indices, climbs).to(x_0)
        t = self.grid[torch.tensor(climbs) - 1].repeat(batch.judgement.members).to(x_0.device)
        alpha, sigma = self.family.alpha_sigma(t)
        target = self.family.target(x_0, (x_t - alpha * x_0) / sigma, t)
        return Regression(x_t, t, target, Conditioning(batch.cond), batch.judgement, mask=batch.mask)

    @torch.no_grad()
    def invert(
        self, x_0: Tensor, cond: dict[str, Tensor], climbs: Sequence[int], draws: Sequence[torch.Generator]
    ) -> list[Tensor]:
        """The states after each step, max(climbs) times (m * n, C, h, w): group i climbs ``climbs[i]`` steps and stays
        there; ``draws[i]`` gives its noise. Rows as in `Regression`; what is computed for a row depends on no other.
        """
        members = len(x_0) // len(climbs)
        height = torch.tensor(climbs, device=x_0.device).repeat(members)
        path, x, noise = [], x_0, None
        with self.reference() as base:
            for step in range(max(climbs)):
                rising = (height > step).nonzero().flatten()
                if self.settings.eta:
                    fresh = [torch.randn(members, *x_0.shape[1:], generator=draw) for draw in draws]
                    noise = torch.stack(fresh, 1).flatten(0, 1).to(x_0)[rising]
                here = {name: value[rising] for name, value in cond.items()}
                x = x.index_copy(0, rising, self._rise(base, x[rising], here, step, noise))
                path.append(x)
        return path

    def _rise(self, base: Policy, x: Tensor, cond: dict[str, Tensor], step: int, noise: Tensor | None) -> Tensor:
        """From level ``step`` to the next one."""
        (alpha, sigma), (alpha_to, sigma_to) = self.levels[step : step + 2]
        # DDPM's posterior variance (Ho et al. 2020, eq. 7); 0 out of the clean image
        variance = (sigma / sigma_to) ** 2 * (1 - (alpha_to / alpha) ** 2)
        spread = self.settings.eta * variance**0.5

        def move(eps: Tensor, spread: float = 0.0) -> Tensor:
            return alpha_to / alpha * (x - sigma * eps) + (sigma_to**2 - spread**2) ** 0.5 * eps

        eps = self._eps(base, x, cond, step)
        if self.settings.average:
            eps = (eps + self._eps(base, move(eps), cond, step + 1)) / 2
        return move(eps) if noise is None else move(eps, spread) + spread * noise

    def _eps(self, base: Policy, x: Tensor, cond: dict[str, Tensor], step: int) -> Tensor:
        t, alpha, sigma = self.inputs[step]
        # not `Policy.output`: without autocast, as caches of earlier runs were made
        output = self.family.predict(base.network, x, torch.full((len(x),), t, device=x.device), cond).to(x.dtype)
        return convert(x, output, self.family.prediction, "epsilon", alpha, sigma)

    # ---- all levels of all images, once

    def prepare(self, batches: Batches, root: str, worker: Worker = ALONE) -> None:
        """Invert every image of ``batches`` to every level, a part on each process, and keep that under ``root``.
        From then on it is read from there.

        The mean of an image's posterior is inverted, with its caption. Noise of ``eta`` is drawn once for each image,
        the same in all runs. An image takes 2 * steps * C * h * w bytes (SDXL, 10 steps: 1.3 MB) and ``steps`` calls of
        the network. A training step without cache takes (steps + 1) / 2 on average. float16 loses nothing here,
        because eps* is computed from the latents as they are kept.

        Raises DiffpoError where an image or its caption changes from step to step.
        """
        otherwise = "or invert in each step with objective.inversion.cache=false"
        if not batches.cached:
            raise DiffpoError(
                f"objective.inversion.cache needs cached latents: set data.cache_latents=true, data.crop=center and "
                f"data.flip=false, {otherwise}"
            )
        if batches.data.caption_dropout:
            raise DiffpoError(
                f"objective.inversion.cache inverts with the captions, and data.caption_dropout drops some: set it to "
                f"0, {otherwise}"
            )
        places: dict[
            tuple[str, str], tuple[int, int]
        ] = {}  # every different (image, caption): one place where it is found
        for index, group in enumerate(batches.groups.groups):
            for member, key in enumerate(_images(group)):
                places.setdefault(key, (index, member))
        self._row = {key: row for row, key in enumerate(places)}
        found, settings, family = list(places.values()), self.settings, self.family

        def compute(rows: Sequence[int]) -> dict[str, Tensor]:
            """``x_t`` (n, steps, C, h, w)."""
            indices = [found[row][0] for row in rows]
            batch = batches.batch(indices, list(rows), purpose="inversion")  # for its conditions
            picked = torch.tensor([found[row][1] * len(rows) + i for i, row in enumerate(rows)])
            picked = picked.to(batch.x_0.device)
            cond = {name: value[picked] for name, value in batch.cond.items()}
            draws = [generator(0, "inversion noise", row) for row in rows]
            path = self.invert(batches.means(indices)[picked], cond, [settings.steps] * len(rows), draws)
            return {"x_t": torch.stack(path, 1).half()}

        data = [batches.latents.key, batches.text.key, list(places)]
        base = [base_identity(self.policy.network)["hash"], family.settings.base_weights]
        model = [*base, str(family.dtype), family.prediction, self.levels, self.inputs]
        kept = Cache(root, "inversions", content_key(*data, *model, settings.eta, settings.average), len(places))
        kept.build(compute, IMAGES, worker)
        self.batches, self.kept = batches, kept

    def _read(self, kept: Cache, indices: Sequence[int], climbs: Sequence[int]) -> Tensor:
        """The latents in ``kept`` of groups ``indices``, each at the level that its group climbs to: (m n, C, h, w)."""
        members = zip(*(_images(self.batches.groups.groups[index]) for index in indices), strict=True)
        paths = kept.read([self._row[key] for images in members for key in images])["x_t"]
        return paths[torch.arange(len(paths)), torch.tensor(climbs).repeat(len(paths) // len(climbs)) - 1]


def _images(group: Group) -> list[tuple[str, str]]:
    """(picture, caption) of each member."""
    captions = group.captions * (1 if len(group.captions) > 1 else len(group.hashes))
    return list(zip(group.hashes, captions, strict=True))
