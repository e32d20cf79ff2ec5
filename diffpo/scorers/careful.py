"""A scorer whose failures on single pictures do not end a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..common.errors import DiffpoError

HOPELESS = 32  # failures without a single number, after which the scorer is given up


class CannotScore(DiffpoError):
    """A scorer cannot judge one of the pictures or prompts of a batch; without it, it may judge the others."""


class Batch(NamedTuple):
    """``numbers``: {name: (n,) float64}, NaN for the pictures in ``failed``: {place in the batch: reason}."""

    numbers: dict[str, np.ndarray]
    failed: dict[int, str]


class Careful:
    """Scores batches by ``scorer``. If one raises `CannotScore`, its pictures are scored one by one.

    Raises what the scorer raises otherwise, and `CannotScore` if the first `HOPELESS` pictures all fail.
    """

    def __init__(self, scorer: Any) -> None:
        self.scorer, self.failures, self.scored = scorer, 0, 0

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Batch:
        try:
            found = self.scorer.score(list(images), list(prompts))
        except CannotScore as error:
            if len(images) > 1:
                return self._one_by_one(images, prompts)
            self.failures += 1
            if not self.scored and self.failures >= HOPELESS:
                raise
            return Batch({name: np.array([np.nan]) for name in self.scorer.names}, {0: str(error)})
        self.scored += len(images)
        return Batch({name: np.asarray(found[name], np.float64) for name in self.scorer.names}, {})

    def _one_by_one(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Batch:
        alone = [self.score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
        numbers = {name: np.concatenate([each.numbers[name] for each in alone]) for name in self.scorer.names}
        return Batch(numbers, {place: each.failed[0] for place, each in enumerate(alone) if each.failed})
