"""The policy: a network, how it is called, and the precision that it runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..weights import trained
from .regression import Conditioning, Regression

if TYPE_CHECKING:
    from ..models.family import Family


@dataclass(frozen=True)
class Policy:
    """``network``, called as ``family`` calls it, under ``autocast`` (the run's; by default none).

    The network is the bare module or its DDP wrapper. Only the bare one can be `switched`.
    """

    family: Family
    network: torch.nn.Module
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def predict(self, problem: Regression) -> Tensor:
        """The network's output for every row of ``problem``, (N, C, h, w)."""
        return self.output(problem.x_t, problem.t, problem.conditioning)

    def output(self, x_t: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        """The network's output at x_t (n, C, h, w) and timesteps t (n,), with guidance where ``given`` includes it."""
        with self.autocast():
            if given.uncond is None:
                return self.family.predict(self.network, x_t, t, self._embedded(given.cond))
            both = {name: torch.cat([given.uncond[name], value]) for name, value in given.cond.items()}
            both = self._embedded(both)
            uncond, cond = self.family.predict(self.network, x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return self.family.guided(cond, uncond, given.guidance)

    def _embedded(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """``cond`` with embeddings in place of tokens, where text encoders are trained."""
        tokens = any(name.startswith("ids_") for name in cond)
        return self.family.embedded(self.network, cond) if tokens else cond

    @contextlib.contextmanager
    def switched(self, adapter: str | None) -> Iterator[Policy]:
        """The same with ``adapter`` alone active, without gradients; None: all adapters off, which is the base model.
        (A network that is trained as a whole has frozen copies in place of adapters.)"""
        with trained.of(self.network).switched(adapter) as network:
            yield replace(self, network=network)
