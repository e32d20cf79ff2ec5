"""Several processes of one command, as `accelerate launch` starts them: each one's share, and waiting for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import lock

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
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    @contextmanager
    def lock(self, folder: Path) -> Iterator[None]:
        """`lock.held` by the main process, for all of them."""
        if not self.main:
            yield
            return
        with lock.held(folder):
            yield


def here() -> Processes:
    """From the environment that `accelerate launch` sets; one process without it."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
