"""The protocol of `diffpo serve-scorer`: its version, what a request may hold, and refusals."""

from __future__ import annotations

import re
from dataclasses import dataclass

PROTOCOL = 1
NAME = re.compile("[A-Za-z0-9_.-]{1,100}")  # of a number: it is part of a URL, of a table and of the names of metrics


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_images, max_bytes: of a request.
        max_pixels: of an image.
        deadline: s in which a request, headers included, must come.
        connections: of more, the one that sends least is dropped.
    """

    max_images: int = 32
    max_bytes: int = 2**26
    max_pixels: int = 2**23
    deadline: float = 120.0
    connections: int = 256


class Refused(Exception):
    """An answer other than numbers: a status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = "".join(c if c.isprintable() else " " for c in sentence[:1000])
