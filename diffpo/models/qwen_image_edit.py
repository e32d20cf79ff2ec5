"""Qwen-Image-Edit: Qwen-Image with a picture that the caption says how to edit, which its text encoder sees too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

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
    edits = reads_source = True
    several: ClassVar[bool] = False  # whether the pipeline takes a list of pictures for one caption

    def __init__(self, settings: Model, precision: str = "no", resolution: int = 1024) -> None:
        super().__init__(settings, precision, resolution)
        self.resolution = resolution

    @property
    def room(self) -> int:
        """Tokens of a row: a caption, a picture whose rounded sides make it up to an eighth larger, a template."""
        return TOKENS + SPARE + math.ceil(1.125 * self.seen() / CELL)

    def seen(self) -> int:
        """Pixels of the picture that the text encoder sees."""
        return self.resolution**2

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        raise lacks_picture(self.settings.path)

    @torch.no_grad()
    def encode_edits(self, captions: Sequence[str | None], pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        rows = []
        for caption, picture in zip(captions, pictures, strict=True):
            text = NOTHING if caption is None else self._cut(caption)
            shown = self._shown(picture)
            given = [shown] if self.several else shown
            embeds, _ = self.pipe.encode_prompt([text], image=given, device=self.pipe.vae.device)
            if embeds.shape[1] > self.room:
                size = "x".join(map(str, picture.size))
                raise DiffpoError(
                    f"{self.settings.path}: a caption with its picture of {size} px has {embeds.shape[1]} tokens, and "
                    f"a row has room for {self.room}; choose pictures nearer to a square, or shorter captions"
                )
            rows.append(embeds[0])
        return texts.padded(rows, self.room)

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
        return texts.widest(n, self.room, network.config.joint_attention_dim)

    @classmethod
    @contextlib.contextmanager
    def editing(cls, pipe: Any, picture: Image.Image) -> Iterator[dict[str, Any]]:
        with dimensions(pipe, lambda own, area, ratio: cls._dimensions(own, area, ratio, picture.size)):
            yield {"image": [picture] if cls.several else picture}

    @classmethod
    def _dimensions(cls, own: Any, area: int, ratio: float, size: tuple[int, int]) -> tuple[int | None, ...]:
        return (*size, None)


class QwenImageEditPlus(QwenImageEdit):
    """The later releases (2509, 2511): the text encoder sees the picture smaller, and others may be beside it. Here it
    is one picture."""

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
