"""The reference's errors of draws that come again (`objective.forward.draws`), which save its forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.errors import DiffpoError

if TYPE_CHECKING:
    from accelerate import Accelerator


class KeptErrors:
    """The errors of a reference that does not move, by the number of a draw: (draws, members) float32 on the CPU.

    What an update computes is there from the next update on, on every process. So a run does not depend on the
    division of updates over processes, and a checkpoint holds all of it.
    """

    def __init__(self, draws: int, members: int) -> None:
        self.errors = torch.full((draws, members), torch.nan)
        self._new: list[tuple[Tensor, Tensor]] = []

    def get(self, numbers: Sequence[int], device: torch.device) -> Tensor | None:
        """(members * n,) errors of the draws ``numbers``, laid out by member; None unless all of them are known."""
        found = self.errors[torch.tensor(numbers)].T.flatten()
        return None if found.isnan().any() else found.to(device)

    def note(self, numbers: Sequence[int], errors: Tensor) -> None:
        """That ``errors`` are theirs, laid out by member. To be called after `get` whatever it gave: all processes note
        equally many."""
        self._new.append((torch.tensor(numbers, device=errors.device), errors.unflatten(0, (-1, len(numbers))).T))

    def after_update(self, accelerator: Accelerator) -> None:
        """To be called after each update on all processes."""
        numbers, errors = (torch.cat(each) for each in zip(*self._new, strict=True))
        self._new.clear()
        numbers, errors = (accelerator.gather(each.contiguous()).cpu() for each in (numbers, errors))
        new = self.errors[numbers].isnan().any(1)
        self.errors[numbers[new]] = errors[new]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        known = (~self.errors.isnan().any(1)).nonzero().flatten()
        return {"numbers": known, "errors": self.errors[known]}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put `state()` back. DiffpoError if it is of other draws."""
        numbers, errors = state["numbers"], state["errors"]
        if errors.shape[1:] != self.errors.shape[1:] or (len(numbers) and int(numbers.max()) >= len(self.errors)):
            raise DiffpoError(
                "the checkpoint's reference errors are of other draws: set objective.forward.draws as it was at the "
                "start of the run"
            )
        self.errors.fill_(torch.nan)
        self.errors[numbers] = errors
