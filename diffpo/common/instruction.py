"""A prompt for models that edit pictures: a text that carries the picture that it is about."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import DiffpoError
from .images import ENCODED, BadRow, decode, read_file
from .text import plain, whole


class Instruction(str):
    """What to do with a picture. It is equal to another only if the pictures are the same too, and never to a text
    alone.

    Attributes:
        key: a hash of the picture's bytes.
    """

    key: str
    _picture: Path | bytes

    def __new__(cls, text: str, picture: Path | bytes, key: str | None = None) -> Instruction:
        """``picture``: its file, or its encoded bytes. DiffpoError if the file cannot be read."""
        self = super().__new__(cls, text)
        self._picture = picture
        self.key = key or blake2b(self._bytes(), digest_size=16).hexdigest()
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self._picture, self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instruction) and self.key == other.key and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str.__hash__(self), self.key))

    def open(self) -> Image.Image:
        """The picture, RGB. DiffpoError if it cannot be read."""
        try:
            return decode(self._bytes())
        except BadRow as problem:
            where = f" {self._picture}" if isinstance(self._picture, Path) else ""
            raise DiffpoError(f"cannot read the picture{where} of {plain(self, 100)!r}: {problem.detail}") from None

    def _bytes(self) -> bytes:
        if isinstance(self._picture, bytes):
            return self._picture
        try:
            return read_file(self._picture, ENCODED)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DiffpoError(f"cannot read the picture {self._picture} of {plain(self, 100)!r}: {reason}") from None

    def rewritten(self, change: Callable[[str], str]) -> Instruction:
        """The same about the picture, with another text."""
        return Instruction(change(str(self)), self._picture, self.key)


def key_of(prompt: str) -> str | None:
    """Of the picture that a prompt is about; None of a text alone."""
    return prompt.key if isinstance(prompt, Instruction) else None


def encodable(prompt: str) -> str:
    """The prompt with half characters replaced, still about its picture."""
    return prompt.rewritten(whole) if isinstance(prompt, Instruction) else whole(prompt)
