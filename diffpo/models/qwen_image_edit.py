"""Qwen-Image-Edit: Qwen-Image with pictures that the caption says how to edit, which its text encoder sees too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..common.errors import DiffpoError
from ..config import Model
from ..data.keys import content_key
from . import texts
from .editing import dimensions, lacks_picture
from .qwen_image import NOTHING, TOKENS, QwenImage

CELL = 28 * 28  # pixels of a token of Qwen2.5-VL
SPARE = 64  # tokens of the templates, and of a picture smaller than its encoder takes
SEEN = 384 * 384  # pixels of the picture that the text encoder of Plus sees


class QwenImageEdit(QwenImage):
    """The first release (Qwen/Qwen-Image-Edit): the text encoder sees the picture at the size of the latents."""

    pipelines = ("QwenImageEditPipeline",)
    edits = reads_source = needs_source = True

    def __init__(self, settings: Model, precision: str = "no", resolution: int = 1024) -> None:
        super().__init__(settings, precision, resolution)
        self.resolution = resolution

    def room(self, pictures: int = 1) -> int:
        """Tokens of a row: a caption, templates, and pictures whose rounded sides make them up to an eighth larger."""
        return TOKENS + pictures * (SPARE + math.ceil(1.125 * self.seen() / CELL))

    def seen(self) -> int:
        """Pixels of a picture that the text encoder sees."""
        return self.resolution**2

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        raise lacks_picture(self.settings.path)

    @torch.no_grad()
    def encode_edits(
        self, captions: Sequence[str | None], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        rows, room = [], self.room(len(pictures[0]))
        for caption, own in zip(captions, pictures, strict=True):
            text = NOTHING if caption is None else self._cut(caption)
            shown = [self._shown(picture) for picture in own]
            given = shown if self.several else shown[0]
            embeds, _ = self.pipe.encode_prompt([text], image=given, device=self.pipe.vae.device)
            if embeds.shape[1] > room:
                size = "x".join(map(str, own[0].size))
                raise DiffpoError(
                    f"{self.settings.path}: a caption with its pictures of {size} px has {embeds.shape[1]} tokens, and "
                    f"a row has room for {room}; choose pictures nearer to a square, or shorter captions"
                )
            rows.append(embeds[0])
        return texts.padded(rows, room)

    def _cut(self, caption: str) -> str:
        """At most `TOKENS` tokens of it."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(caption, add_special_tokens=False).input_ids
        return caption if len(ids) <= TOKENS else tokenizer.decode(ids[:TOKENS])

    def _shown(self, picture: Image.Image) -> Image.Image:
        return picture

    def text_hash(self) -> str:
        return content_key(super().text_hash(), self.pipe.processor.image_processor.to_json_string())

    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return self.meta_edits(network, n, 1)

    def meta_edits(self, network: torch.nn.Module, n: int, sources: int) -> dict[str, Tensor]:
        return texts.widest(n, self.room(sources), network.config.joint_attention_dim)

    @classmethod
    @contextlib.contextmanager
    def editing(cls, pipe: Any, pictures: Sequence[Image.Image]) -> Iterator[dict[str, Any]]:
        with dimensions(pipe, lambda own, area, ratio: cls._dimensions(own, area, ratio, pictures[0].size)):
            yield {"image": list(pictures) if cls.several else pictures[0]}

    @classmethod
    def _dimensions(cls, own: Any, area: int, ratio: float, size: tuple[int, int]) -> tuple[int | None, ...]:
        return (*size, None)


class QwenImageEditPlus(QwenImageEdit):
    """The later releases (2509, 2511): one picture or several, which the text encoder sees smaller."""

    pipelines = ("QwenImageEditPlusPipeline",)
    several = True

    def seen(self) -> int:
        return SEEN

    def _shown(self, picture: Image.Image) -> Image.Image:
        return self.pipe.image_processor.resize(picture, *self._sides(picture.width / picture.height)[::-1])

    @staticmethod
    def _sides(ratio: float) -> tuple[int, int]:
        """Width and height of the picture that the text encoder sees, multiples of 32."""
        width = math.sqrt(SEEN * ratio)
        return round(width / 32) * 32, round(width / ratio / 32) * 32

    @classmethod
    def _dimensions(cls, own: Any, area: int, ratio: float, size: tuple[int, int]) -> tuple[int | None, ...]:
        return own(area, ratio) if area == SEEN else size
