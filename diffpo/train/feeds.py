"""What an update trains on. A feed turns the positions of an update's groups into one `Regression`.

A position counts groups since the start of training, so that what is at it depends neither on the batch size nor on the
number of processes, nor on where a run was interrupted. `Offline` reads data; `rollout.OnPolicy` samples for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import Data
from ..data.cache import Cache, content_key
from ..problems.regression import Regression

if TYPE_CHECKING:
    from ..data.batches import Batches


class Feed(Protocol):
    def begin(self, step: int) -> dict[str, float]:
        """Before update ``step``, on all processes together; returns metrics."""

    def regression(self, positions: Sequence[int]) -> Regression | None:
        """The groups at ``positions``; None (on all processes alike) if there is nothing to learn from."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""

    def load(self, state: dict[str, Any]) -> None: ...


class Offline:
    """Groups of the training data, epoch after epoch, through a source of regression problems.

    ``index(position)`` says which group is drawn at a position.
    """

    def __init__(self, batches: Batches, source: Callable[[Any], Regression], index: Callable[[int], int]) -> None:
        self.batches, self.source, self.index = batches, source, index

    def begin(self, step: int) -> dict[str, float]:
        return {}

    def regression(self, positions: Sequence[int]) -> Regression:
        return self.source(self.batches.batch([self.index(position) for position in positions], positions))

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class PromptConditions:
    """The conditions of a list of prompts, from a text cache that is filled when this is made (with the text encoders
    loaded): ``conditions(indices)`` gives those of the prompts and those of the empty prompt, a row for each index."""

    def __init__(
        self, prompts: Sequence[str], data: Data, family: Any, device: Any, process: int = 0, processes: int = 1
    ) -> None:
        self.prompts, self.family, self.device = list(prompts), family, device
        self.resolution = data.resolution
        self.captions = sorted(set(self.prompts))
        self._row = {caption: row for row, caption in enumerate(self.captions)}
        self._sizes = torch.tensor([data.resolution, data.resolution, 0, 0, data.resolution, data.resolution])
        self.text = Cache(data.cache, "text", content_key(family.text_hash(), self.captions), len(self.captions) + 1)
        self.text.build(self._encode, 16, process=process, processes=processes, quiet=process > 0)

    def __call__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        prompted = self._read([self._row[self.prompts[index]] for index in indices])
        return prompted, self._read([len(self.captions)] * len(indices))

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.family.encode_text([self.captions[row] if row < len(self.captions) else None for row in rows])

    def _read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        text = {name: value.to(self.device) for name, value in self.text.read(rows).items()}
        return self.family.condition(text, self._sizes.to(self.device, torch.float32).repeat(len(rows), 1))
