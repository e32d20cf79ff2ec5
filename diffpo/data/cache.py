"""Rows of named tensors on disk: safetensors shards with a hash of all inputs in their folder's name and header."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..common.errors import DiffpoError
from ..common.files import write_atomic, writing
from ..common.worker import ALONE, Worker
from .keys import content_key

SHARD = 256  # rows per file
ABANDONED = 3600  # seconds after which an unfinished file counts as left by a killed process
INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "architectures"}  # config keys that change no output


def module_key(module: torch.nn.Module) -> str:
    """A hash of an encoder's config and of every byte of its weights (by CRC-32, which takes 2 s for a T5-XXL)."""
    config: Any = module.config
    config = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    settings = {name: str(value) for name, value in config.items() if name[0] != "_" and name not in INCIDENTAL}
    weights = [
        (name, str(value.dtype), value.shape, zlib.crc32(value.detach().reshape(-1).view(torch.uint8).cpu().numpy()))
        for name, value in module.state_dict().items()
    ]
    return content_key(sorted(settings.items()), sorted(weights))


class Cache:
    """``rows`` rows of named tensors in the folder ``root``/``kind``-<key>.

    `build` computes the missing shards and `read` returns any rows. The files depend neither on the number of
    processes, nor on interruptions, nor on other runs that fill the same folder. A shard that is damaged, or that was
    made from another model or other data, raises DiffpoError: it is neither used nor overwritten.
    """

    def __init__(self, root: str | Path, kind: str, key: str, rows: int) -> None:
        self.folder = Path(root).expanduser() / f"{kind}-{key[:16]}"
        self.kind, self.key, self.rows = kind, key, rows
        self._open: dict[int, Any] = {}  # safetensors handles by shard

    @property
    def shards(self) -> int:
        return -(-self.rows // SHARD)

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that do not exist. Those that exist are checked."""
        absent = []
        for shard in range(self.shards):
            try:
                there = self.path(shard).exists()
            except OSError as error:  # a folder that this user may not read
                raise DiffpoError(
                    f"cannot use the cache {self.folder}: {error.strerror}. Choose another folder with "
                    "data.cache=FOLDER"
                ) from None
            if there:
                self._handle(shard)
            else:
                absent.append(shard)
        return absent

    def build(
        self,
        compute: Callable[[Sequence[int]], dict[str, torch.Tensor]],
        batch: int,
        worker: Worker = ALONE,
        quiet: bool = True,
    ) -> None:
        """Compute the missing shards of the process ``worker``. ``compute(rows) -> {name: (n, ...) tensor}`` is called
        for ``batch`` rows at a time."""
        from tqdm.auto import tqdm

        self._tidy()
        first = sum(self.key.encode())  # so that not all of many small caches (one per bucket) fall to process 0
        todo = [shard for shard in self.missing() if (first + shard) % worker.count == worker.index]
        for shard in tqdm(todo, desc=f"caching {self.kind}", unit="shard", delay=1, disable=quiet):
            if self.path(shard).exists():  # written by another run meanwhile
                continue
            rows = range(shard * SHARD, min(self.rows, (shard + 1) * SHARD))
            parts = [compute(rows[i : i + batch]) for i in range(0, len(rows), batch)]
            tensors = {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}
            if not all(value.isfinite().all() for value in tensors.values()):
                raise DiffpoError(
                    f"the {self.kind} for {self.folder} are NaN or infinite: the model's encoder is damaged or "
                    "overflows in this precision. Check its weights, model.vae and train.precision"
                )
            self._write(shard, tensors)

    def read(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The tensors of ``rows``, in that order: {name: (len(rows), ...)}, on the CPU."""
        found = []
        for row in rows:
            handle = self._handle(row // SHARD)
            found.append({name: handle.get_slice(name)[row % SHARD] for name in handle.keys()})
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}

    def _write(self, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.path(shard)
        # one entry of metadata: safetensors writes several in a random order, and equal shards are equal files
        content = save(tensors, {"made_from": self._made_from(shard)})
        with writing(f"the cache {path}", "data.cache=FOLDER"):
            try:  # of two runs, perhaps on two machines, the second to end replaces equals by equals
                write_atomic(path, content, shared=True)
            except FileNotFoundError:
                raise self._gone(path) from None

    def _gone(self, path: Path) -> DiffpoError:
        return DiffpoError(
            f"the cached {self.kind} in {path} were deleted while they were in use. Run the same command again to "
            "compute them again"
        )

    def _made_from(self, shard: int) -> str:
        return f"{self.key} shard {shard}"

    def _tidy(self) -> None:
        """Delete unfinished files of killed processes, but not those that another run is writing now."""
        with contextlib.suppress(OSError):
            for part in self.folder.glob(".*.safetensors.*"):
                if part.stat().st_mtime < time.time() - ABANDONED:
                    part.unlink()

    def _handle(self, shard: int) -> Any:
        if shard not in self._open:
            path = self.path(shard)
            try:
                handle = safe_open(path, "pt")
                about = handle.metadata() or {}
                rows = {handle.get_slice(name).get_shape()[0] for name in handle.keys()}
            except FileNotFoundError:
                raise self._gone(path) from None
            except (OSError, SafetensorError, IndexError) as error:  # IndexError: a tensor without rows
                raise DiffpoError(
                    f"the cached {self.kind} in {path} cannot be read ({error}): the file is truncated or damaged. "
                    f"Delete it, and the next run computes it again"
                ) from error
            expected = min(SHARD, self.rows - shard * SHARD)
            if about.get("made_from") != self._made_from(shard) or rows != {expected}:
                raise DiffpoError(
                    f"the cached {self.kind} in {path} are stale: they were made from another model, other data or "
                    f"other settings. Delete the folder {self.folder}, and the next run computes them again"
                )
            self._open[shard] = handle
        return self._open[shard]
