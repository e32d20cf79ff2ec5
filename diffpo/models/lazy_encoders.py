"""A family's encoders, loaded only when a cache needs them: a run whose caches are full starts without them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.files import write_atomic
from ..data.keys import content_key
from .pipeline import listed
from .pretrained import local

if TYPE_CHECKING:
    from PIL import Image

    from .family import Family

SETTLED = 2.0  # seconds: clocks of files are coarse, so a younger file could change again and keep its time


class LazyEncoders:
    """`data.encoders.Encoders` of a family, which loads them before it encodes.

    Hashes of their weights and the VAE's config are kept in a small file in ``cache``. Its key holds the size, inode
    and times of each of the model's files, so after any change they are computed again.

    Args:
        cache: the folder of the caches, `data.cache`.
        write: whether this process keeps what it computed.
    """

    def __init__(self, family: Family, device: Any, cache: str | Path, write: bool = True) -> None:
        self.family, self.device, self.write, self.loaded = family, device, write, False
        self.train_timesteps, self.edits = family.train_timesteps, family.edits
        self.several, self.reads_source = family.several, family.reads_source
        self.needs_source = family.needs_source
        self._key = key_of(family)
        self._file = Path(cache).expanduser() / f"encoders-{(self._key or '')[:16]}.json"
        self._known: dict[str, Any] = {}
        if self._key:
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(self._file.read_bytes())
                self._known = known if isinstance(known, dict) and known.get("made_from") == self._key else {}

    def load(self) -> None:
        if not self.loaded:
            self.family.load_encoders(self.device)
            self.loaded = True

    def free(self, keep_vae: bool = False) -> None:
        """Free what is loaded; the VAE is there afterwards if it is to be kept. To be called once."""
        if keep_vae:
            self.load()
        self._configure()
        if self.loaded:
            self.family.free_encoders(keep_vae)

    def _configure(self) -> None:
        """Give the family the config of its VAE, which outlives the VAE."""
        self.family.vae_config = self.remember("vae_config", lambda: self.family.vae_config)

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` finds in the loaded encoders: JSON, from the file if it has been asked before."""
        if name not in self._known:
            self.load()
            self._known[name] = compute()
            if self._key and self.write:
                content = json.dumps({**self._known, "made_from": self._key}, default=str)
                with contextlib.suppress(OSError):  # the caches, which come next, say what is wrong with the folder
                    write_atomic(self._file, content.encode(), shared=True)
        return self._known[name]

    def require_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.family.require_sizes(sizes)

    def text_hash(self) -> str:
        found = self.remember("text", self.family.text_hash)
        return content_key(found, "tokens") if self.family.text_in_step else found

    def vae_hash(self) -> str:
        return self.remember("vae", self.family.vae_hash)

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, torch.Tensor]:
        self.load()
        return (self.family.tokens if self.family.text_in_step else self.family.encode_text)(captions)

    def encode_edits(
        self, captions: Sequence[str | None], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, torch.Tensor]:
        self.load()
        return self.family.encode_edits(captions, pictures)

    def encode_image(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.load()
        return self.family.encode_image(pixels)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        self._configure()
        return self.family.scale_latents(latents)

    def condition(self, text: dict[str, torch.Tensor], micro_conditioning: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.family.condition(text, micro_conditioning)


def key_of(family: Family) -> str | None:
    """A key that changes with any of the model's files; None if none is here, or one is too young to trust its time."""
    files = family.source.files()
    if not files:
        return None
    if vae := family.settings.vae:
        if not os.path.exists(path := Path(local(vae)).expanduser()):
            return None  # of the hub
        files += [path] if path.is_file() else listed(path)
    stamps, newest = [], 0.0
    for path in sorted(files):
        state = path.stat()  # of a link's target
        newest = max(newest, state.st_mtime, state.st_ctime)
        stamps.append((str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    if newest > time.time() - SETTLED:
        return None
    kind = f"{type(family).__module__}.{type(family).__qualname__}"
    return content_key(stamps, kind, str(family.dtype), family.settings.model_dump_json(), *versions())


def versions() -> list[str]:
    """Of the libraries that make an encoder of files."""
    import diffusers
    import transformers

    return [torch.__version__, diffusers.__version__, transformers.__version__]
