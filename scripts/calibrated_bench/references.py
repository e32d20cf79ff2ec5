"""What a long solver makes of the noises, cached per 32 prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from samplers.calibrate import Batch, Problem, reference
from samplers.calibrate.problem import REFERENCE_CALLS

from .store import read_arrays, write_arrays
from .worlds import Mixture, World

BLOCK = 32  # prompts in a file


class References:
    """The references of one world in a folder.

    `select` and `heldout`: the solution at both ends of `Tiny.exact`, or the mixture's exact one. `fit`: what
    `samplers.calibrate.reference` makes of the noise, the target of a calibration; its number of calls is in the
    files' names.
    """

    def __init__(self, world: World, folder: Path, batch: int = BLOCK):
        self.world, self.folder = world, folder / world.key / "references"
        self.batch = max(1, batch // BLOCK) * BLOCK

    def missing(self, split: str, count: int) -> list[tuple[int, int]]:
        """(first, count) of each file that is not there, or holds fewer samples than are needed."""
        blocks = [(first, min(BLOCK, count - first)) for first in range(0, count, BLOCK)]
        return [(first, size) for first, size in blocks if self._held(split, first) < size]

    def calls(self, split: str) -> int:
        """Model calls of one sample's reference."""
        if split == "fit":
            return REFERENCE_CALLS
        return 0 if isinstance(self.world, Mixture) else self.world.options.reference_calls + 1

    def compute(self, split: str, count: int, progress=lambda text: None) -> None:
        """What is missing; several files in one run of the model if the batch is that large."""
        missing = self.missing(split, count)
        while missing:
            together = [missing.pop(0)]
            while missing and missing[0][0] == sum(together[-1]) and len(together) < self.batch // BLOCK:
                together.append(missing.pop(0))
            first, size = together[0][0], sum(each[1] for each in together)
            found = self._solve(split, first, size)
            for start, part in together:
                rows = slice(start - first, start - first + part)
                write_arrays(self._path(split, start), {name: x[rows].cpu().numpy() for name, x in found.items()})
            progress(f"{self.world.name} g={self.world.guidance:g}: references, {split} {first} to {first + size - 1}")

    def exact(self, split: str, first: int, count: int) -> dict[str, torch.Tensor]:
        """The cached solutions of these samples, by end; on the CPU."""
        files = [read_arrays(self._path(split, b)) for b in range(first // BLOCK * BLOCK, first + count, BLOCK)]
        rows = slice(first % BLOCK, first % BLOCK + count)
        return {name: torch.from_numpy(np.concatenate([f[name] for f in files])[rows]) for name in files[0]}

    def problem(self, count: int) -> Problem:
        """The first `count` samples of `fit`, in batches as `diffpo calibrate` makes them.

        The problem's own held-out samples are those of `select`: no method may see what is reported.
        """
        size = min(BLOCK, max(1, -(-count // 4)))
        world, device = self.world, self.world.options.device

        def batch(split: str, first: int, number: int) -> Batch:
            part, target = world.part(split, first, number), self.exact(split, first, number)["zero"]
            return Batch(part.model, part.z, target.to(device, part.z.dtype))

        fitting = tuple(batch("fit", b, min(size, count - b)) for b in range(0, count, size))
        held = self._held("select", 0)
        return Problem(world.schedule, world.prediction, fitting, (batch("select", 0, held),), world.guidance)

    def _solve(self, split: str, first: int, count: int) -> dict[str, torch.Tensor]:
        part, world = self.world.part(split, first, count), self.world
        if split != "fit":
            return part.exact
        return {"zero": reference(part.model, part.z, world.schedule, world.prediction, guidance=world.guidance)}

    def _held(self, split: str, first: int) -> int:
        return len(read_arrays(self._path(split, first)).get("zero", ()))

    def _path(self, split: str, first: int) -> Path:
        calls = REFERENCE_CALLS if split == "fit" else ""  # those of the others are in the world's key
        return self.folder / f"{split}{calls}-{first:04d}.npz"
