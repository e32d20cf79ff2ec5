"""The conditions of a list of prompts, which on-policy objectives sample for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.worker import ALONE, Worker
from ..config import Data
from ..data.cache import Cache, content_key
from ..data.encoders import Encoders
from ..problems.regression import Conditioning


class PromptConditions:
    """Prompts with a text cache, which is filled when this is made. The text encoders must be there then.

    ``conditions(indices, guidance)`` is the conditioning of the prompts with these indices.
    """

    def __init__(self, prompts: Sequence[str], data: Data, family: Encoders, worker: Worker = ALONE) -> None:
        self.prompts, self.family, self.device = list(prompts), family, worker.device
        self.resolution = data.resolution
        self.captions = sorted(set(self.prompts))
        self._row = {caption: row for row, caption in enumerate(self.captions)}
        self._sizes = torch.tensor([data.resolution, data.resolution, 0, 0, data.resolution, data.resolution])
        self.text = Cache(data.cache, "text", content_key(family.text_hash(), self.captions), len(self.captions) + 1)
        self.text.build(self._encode, 16, worker)

    def __call__(self, indices: Sequence[int], guidance: float = 1.0) -> Conditioning:
        cond = self._read([self._row[self.prompts[index]] for index in indices])
        uncond = None if guidance == 1 else self._read([len(self.captions)] * len(indices))
        return Conditioning(cond, uncond, guidance)

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.family.encode_text([self.captions[row] if row < len(self.captions) else None for row in rows])

    def _read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        text = {name: value.to(self.device) for name, value in self.text.read(rows).items()}
        return self.family.condition(text, self._sizes.to(self.device, torch.float32).repeat(len(rows), 1))
