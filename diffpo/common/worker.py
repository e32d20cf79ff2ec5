"""The process of a run: its device, its number, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


@dataclass(frozen=True)
class Worker:
    """One of the ``count`` processes of a run, numbered from 0. The default is a single process on the CPU."""

    device: torch.device | str = "cpu"
    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> Self:
        return cls(accelerator.device, accelerator.process_index, accelerator.num_processes)

    @property
    def quiet(self) -> bool:
        """Only the first process reports its progress."""
        return self.index > 0

    def gather(self, items: list) -> list:
        """The items of all processes, in the order of the processes. Collective: every process calls it."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)


ALONE = Worker()
