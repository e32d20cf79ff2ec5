"""Class-conditional DiT (Peebles & Xie 2022, arXiv 2212.09748). A caption is a class: its number or its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..data.cache import content_key
from .family import Family, no_users


class DiT(Family):
    pipelines = ("DiTPipeline",)
    network_class = "DiTTransformer2DModel"
    repeated_blocks = ("BasicTransformerBlock",)
    feature_blocks = "transformer_blocks"
    fsdp2 = False  # it uses a part of its first block from outside of it, where the block is not gathered

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        output = network(x_t.to(self.dtype), timestep=self.network_time(t), class_labels=cond["class_labels"]).sample
        return output[:, : x_t.shape[1]]  # the rest is a learnt variance

    @property
    def classes(self) -> int:
        """How many there are; the number after the last one means none."""
        return self._config("transformer").get("num_embeds_ada_norm", 1000)

    def require_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().require_sizes(sizes)
        if any(width != height for width, height in sizes):
            raise DiffpoError(f"{self.settings.path} takes square pictures only: set data.buckets to false")

    def text_hash(self) -> str:
        return content_key(sorted(self.pipe.labels.items()), self.classes)

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        found = [self.classes if text is None else class_of(self.pipe, text, self.classes) for text in captions]
        return {"class_labels": torch.tensor(found)}

    def text_features(self, cond: dict[str, Tensor]) -> list[Tensor]:
        return [torch.nn.functional.one_hot(cond["class_labels"], self.classes + 1).float()]

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {"class_labels": torch.zeros(n, dtype=torch.long, device="meta")}

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        raise no_users(network)

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        if negative:
            raise DiffpoError("a class-conditional DiT takes no negative prompt: leave it out")
        config = pipe.transformer.config
        if noise.shape[-1] != config.sample_size or noise.shape[-2] != config.sample_size:
            raise DiffpoError("this pipeline makes images of its own size only: leave --height and --width out")
        labels = [class_of(pipe, prompt, config.num_embeds_ada_norm) for prompt in prompts]
        # it takes no latents, but draws the same ones from the generators
        return {"class_labels": labels, "guidance_scale": guidance}


def class_of(pipe: Any, caption: str, classes: int) -> int:
    """DiffpoError if the caption is neither a class's number nor one of its names."""
    text = caption.strip()
    number = pipe.labels.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= number < classes:
        raise DiffpoError(
            f"{caption!r} is not one of the {classes} classes that this model takes in place of texts: give a number "
            f"from 0 to {classes - 1}, or a name from id2label in its model_index.json"
        )
    return number
