"""The conditions of a list of prompts, which on-policy objectives sample for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..common.instruction import Instruction, key_of
from ..common.worker import ALONE, Worker
from ..config import Data
from ..data.batches import portion
from ..data.cache import Cache, content_key
from ..data.captions import Captions, require_numbers, require_pictures
from ..data.encoders import Encoders, source_condition
from ..data.transforms import pixels, shown, view
from ..problems.regression import Conditioning


class PromptConditions:
    """Prompts with a text cache, which is filled when this is made. The text encoders must be there then, and the VAE
    if the prompts are instructions about pictures: their latents are a condition too.

    ``conditions(indices, guidance)`` is the conditioning of the prompts with these indices. DiffpoError for
    instructions if the model does not edit pictures, and for other prompts if it does nothing else.
    """

    def __init__(self, prompts: Sequence[str], data: Data, family: Encoders, worker: Worker = ALONE) -> None:
        self.prompts, self.family, self.device = list(prompts), family, worker.device
        self.resolution = data.resolution
        self.captions = sorted(set(map(str, self.prompts)))
        self._about = {prompt.key: prompt for prompt in self.prompts if isinstance(prompt, Instruction)}
        column = data.columns.source or "source" if self._about else None
        require_pictures(family, column, where := str(data.prompts or "the prompts"))
        numbers = (len(each.keys) if isinstance(each, Instruction) else 0 for each in self.prompts)
        require_numbers(family, ((f"prompt {k}", number) for k, number in enumerate(numbers)), where)
        self._sizes = torch.tensor([data.resolution, data.resolution, 0, 0, data.resolution, data.resolution])
        places = [(str(prompt), key_of(prompt)) for prompt in self.prompts]
        self._texts = Captions(data.cache, family, places, self._shown, [data.resolution])
        self._texts.build(worker)
        self.text = self._texts.cache
        # each picture once: the prompt that has it, and its place there
        found = {key: (about, k) for about, prompt in self._about.items() for k, key in enumerate(prompt.keys)}
        self._keys, self._places = sorted(found), [found[key] for key in sorted(found)]
        self._sources: Cache | None = None
        if self._keys:
            key = content_key(family.vae_hash(), "sources", data.resolution, self._keys)
            self._sources = Cache(data.cache, "latents", key, len(self._keys))
            self._sources.build(self._encode, portion(data.resolution, data.resolution), worker)

    def __call__(self, indices: Sequence[int], guidance: float = 1.0) -> Conditioning:
        prompts = [self.prompts[index] for index in indices]
        cond = self._read(prompts, [str(prompt) for prompt in prompts])
        uncond = None if guidance == 1 else self._read(prompts, [None] * len(prompts))
        return Conditioning(cond, uncond, guidance)

    def _read(self, prompts: Sequence[str], captions: Sequence[str | None]) -> dict[str, Tensor]:
        rows = [self._texts.row(caption, key_of(prompt)) for caption, prompt in zip(captions, prompts, strict=True)]
        text = {name: value.to(self.device) for name, value in self._texts.read(rows).items()}
        cond = self.family.condition(text, self._sizes.to(self.device, torch.float32).repeat(len(rows), 1))
        if self._sources is not None:
            keys = zip(*(self._about[key_of(prompt) or ""].keys for prompt in prompts), strict=True)
            means = [self._sources.read([self._keys.index(key) for key in each])["mean"] for each in keys]
            cond["source"] = source_condition([self.family.scale_latents(each.to(self.device)) for each in means])
        return cond

    def _shown(self, key: str) -> list[Image.Image]:
        """The pictures of that key, as the network sees them."""
        found = self._about[key].pictures()
        return [shown(each, view(each.size, self.resolution, "center", False, torch.Generator())) for each in found]

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        pictures = [self._about[about].pictures()[k] for about, k in (self._places[row] for row in rows)]
        seen = [view(each.size, self.resolution, "center", False, torch.Generator()) for each in pictures]
        return self.family.encode_image(torch.stack([pixels(*both) for both in zip(pictures, seen, strict=True)]))
