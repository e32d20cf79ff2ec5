"""Rows of named tensors on disk: safetensors shards with a hash of all inputs in their folder's name and header."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
ROWS = "__rows__"  # a tensor: which rows an incomplete shard has
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


@dataclass(frozen=True)
class _Shard:
    """An open file. ``rows``: those that it has, in this order, counted within the shard."""

    handle: Any
    rows: Sequence[int]

    @functools.cached_property
    def place(self) -> dict[int, int]:
        return {row: place for place, row in enumerate(self.rows)}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: self.handle.get_tensor(name) for name in self.handle.keys() if name != ROWS}


class Cache:
    """``rows`` rows of named tensors in the folder ``root``/``kind``-<key>.

    `build` computes the rows that are missing of those that are asked for, and `read` returns any of them. A shard may
    have some of its rows, with their numbers; later builds add others. The files depend neither on the number of
    processes, nor on interruptions, nor on other runs that fill the same folder. A shard that is damaged, or that was
    made from another model or other data, raises DiffpoError: it is neither used nor overwritten.
    """

    def __init__(self, root: str | Path, kind: str, key: str, rows: int) -> None:
        self.folder = Path(root).expanduser() / f"{kind}-{key[:16]}"
        self.kind, self.key, self.rows = kind, key, rows
        self._open: dict[int, _Shard] = {}

    @property
    def shards(self) -> int:
        return -(-self.rows // SHARD)

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def missing(self, rows: Iterable[int] | None = None) -> dict[int, list[int]]:
        """By shard, those of ``rows`` (None: all) that its file lacks, in order. Files that exist are checked."""
        wanted: dict[int, list[int]] = {}
        for row in range(self.rows) if rows is None else sorted(set(rows)):
            wanted.setdefault(row // SHARD, []).append(row)
        lacking = {}
        for shard, asked in wanted.items():
            try:
                there = self.path(shard).exists()
            except OSError as error:  # a folder that this user may not read
                raise DiffpoError(
                    f"cannot use the cache {self.folder}: {error.strerror}. Choose another folder with "
                    "data.cache=FOLDER"
                ) from None
            place = self._shard(shard).place if there else {}
            if absent := [row for row in asked if row % SHARD not in place]:
                lacking[shard] = absent
        return lacking

    def build(
        self,
        compute: Callable[[Any], dict[str, torch.Tensor]],
        batch: int,
        worker: Worker = ALONE,
        rows: Iterable[int] | None = None,
        load: Callable[[Sequence[int]], Any] = lambda rows: rows,
    ) -> None:
        """Compute what is missing of ``rows`` (None: all) in the shards of the process ``worker``, the first of which
        shows its progress. ``compute(load(rows)) -> {name: (n, ...) tensor}`` is always called for ``batch`` rows, the
        last time with repetitions: what comes out of an encoder depends on the size of its batch by rounding. ``load``
        runs in a thread of its own, for the next rows while these are computed."""
        from tqdm.auto import tqdm

        self._tidy()
        first = sum(self.key.encode())  # so that not all of many small caches (one per bucket) fall to process 0
        lacking = self.missing(rows)
        todo = [shard for shard in lacking if (first + shard) % worker.count == worker.index]
        pending = [row for shard in todo for row in lacking[shard]]
        parts = deque(pending[start : start + batch] for start in range(0, len(pending), batch))
        ready: dict[int, dict[str, torch.Tensor]] = {}
        with ThreadPoolExecutor(1) as pool:

            def begin() -> tuple[list[int], Any]:
                part = parts.popleft() if parts else []
                return part, pool.submit(load, [*part, *part[-1:] * (batch - len(part))]) if part else None

            following = begin()
            for shard in tqdm(todo, desc=f"caching {self.kind}", unit="shard", delay=1, disable=worker.quiet):
                self._open.pop(shard, None)  # another run may have written it meanwhile
                own = self.missing(lacking[shard]).get(shard, [])
                written = set(lacking[shard]).difference(own)
                while not ready.keys() >= set(own):
                    (part, loaded), following = following, begin()
                    if set(part) <= written:
                        continue
                    found = {name: value.cpu() for name, value in compute(loaded.result()).items()}
                    ready |= {row: {name: value[k] for name, value in found.items()} for k, row in enumerate(part)}
                found_rows = [ready.pop(row) for row in own]
                for row in written:
                    ready.pop(row, None)
                if found_rows:
                    self._write(shard, [row % SHARD for row in own], found_rows)

    def read(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The tensors of ``rows``, in that order: {name: (len(rows), ...)}, on the CPU. KeyError for rows that were not
        built."""
        found = []
        for row in rows:
            shard = self._shard(row // SHARD)
            place = shard.place[row % SHARD]
            names = [name for name in shard.handle.keys() if name != ROWS]
            found.append({name: shard.handle.get_slice(name)[place] for name in names})
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}

    def _write(self, shard: int, rows: list[int], found: Sequence[dict[str, torch.Tensor]]) -> None:
        """Write ``rows`` of a shard, counted within it, with those that its file has already. ``found``: their
        tensors. DiffpoError if a number is not finite."""
        tensors = {name: torch.stack([each[name] for each in found]) for name in found[0]}
        if not all(value.isfinite().all() for value in tensors.values()):
            raise DiffpoError(
                f"the {self.kind} for {self.folder} are NaN or infinite: the model's encoder is damaged or "
                "overflows in this precision. Check its weights, model.vae and train.precision"
            )
        self._open.pop(shard, None)
        path = self.path(shard)
        if path.exists():
            before = self._shard(shard)
            added = [k for k, row in enumerate(rows) if row not in before.place]
            rows = [*before.rows, *(rows[k] for k in added)]
            order = sorted(range(len(rows)), key=rows.__getitem__)
            old = before.tensors()
            tensors = {name: torch.cat([old[name], value[added]])[order] for name, value in tensors.items()}
            rows = [rows[k] for k in order]
            self._open.pop(shard)
        if len(rows) < self._size(shard):
            tensors[ROWS] = torch.tensor(rows)
        # one entry of metadata: safetensors writes several in a random order, and equal shards are equal files
        content = save(tensors, {"made_from": self._made_from(shard)})
        with writing(f"the cache {path}", "data.cache=FOLDER"):
            try:  # of two runs, perhaps on two machines, the second to end replaces equals by equals
                write_atomic(path, content, shared=True)
            except FileNotFoundError:
                raise self._gone(path) from None

    def _size(self, shard: int) -> int:
        """The rows of a complete shard."""
        return min(SHARD, self.rows - shard * SHARD)

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

    def _shard(self, shard: int) -> _Shard:
        if shard not in self._open:
            path = self.path(shard)
            try:
                handle = safe_open(path, "pt")
                about = handle.metadata() or {}
                lengths = {handle.get_slice(name).get_shape()[0] for name in handle.keys()}
                rows: Sequence[int] = range(self._size(shard))
                if ROWS in handle.keys():
                    rows = [int(row) for row in handle.get_tensor(ROWS).flatten()]
            except FileNotFoundError:
                raise self._gone(path) from None
            except (OSError, SafetensorError, IndexError) as error:  # IndexError: a tensor without rows
                raise DiffpoError(
                    f"the cached {self.kind} in {path} cannot be read ({error}): the file is truncated or damaged. "
                    f"Delete it, and the next run computes it again"
                ) from error
            ordered = all(a < b for a, b in itertools.pairwise(rows))
            fits = ordered and lengths == {len(rows)} and len(rows) and 0 <= rows[0] <= rows[-1] < self._size(shard)
            if about.get("made_from") != self._made_from(shard) or not fits:
                raise DiffpoError(
                    f"the cached {self.kind} in {path} are stale: they were made from another model, other data or "
                    f"other settings. Delete the folder {self.folder}, and the next run computes them again"
                )
            self._open[shard] = _Shard(handle, rows)
        return self._open[shard]
