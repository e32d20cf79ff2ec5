"""Several processes of one command, as `accelerate launch` starts them: each one's share, and waiting for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from . import lock
from .worker import ALONE, Worker

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; the first, of ``rank`` 0, is the main one."""

    rank: int
    count: int

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``count``-th of ``items``: those of this process."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            _state().wait_for_everyone()

    def worker(self) -> Worker:
        """With its device, for what works in shares."""
        return ALONE if self.count == 1 else Worker(_state().device, self.rank, self.count)

    @contextmanager
    def lock(self, folder: Path) -> Iterator[None]:
        """`lock.held` by the main process, for all of them."""
        if not self.main:
            yield
            return
        with lock.held(folder):
            yield


def _state() -> Any:
    """accelerate's state of the processes. Shares end at different times, so they wait for each other for a day at
    most; accelerate's own limits are 10 and 30 minutes."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(hours=24))


def here() -> Processes:
    """From the environment that `accelerate launch` sets; one process without it."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
