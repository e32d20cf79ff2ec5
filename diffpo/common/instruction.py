"""A prompt for models that edit pictures: a text that carries the pictures that it is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .errors import DiffpoError
from .images import ENCODED, BadRow, decode, read_file
from .text import plain, whole

if TYPE_CHECKING:
    Encoded = Path | bytes  # a picture: its file, or its encoded bytes


class Instruction(str):
    """What to do with a picture, or with several. It is equal to another only if the pictures are the same too, and
    never to a text alone.

    Attributes:
        key: a hash of the bytes of each picture, joined by "+".
        encoded: the pictures as they are stored.
    """

    key: str
    encoded: tuple[Encoded, ...]

    def __new__(cls, text: str, pictures: Encoded | Sequence[Encoded], key: str | None = None) -> Instruction:
        """DiffpoError if a file cannot be read."""
        self = super().__new__(cls, text)
        self.encoded = (pictures,) if isinstance(pictures, (Path, bytes)) else tuple(pictures)
        self.key = key or joined([blake2b(self._bytes(each), digest_size=16).hexdigest() for each in self.encoded])
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.encoded, self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instruction) and self.key == other.key and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str.__hash__(self), self.key))

    @property
    def keys(self) -> list[str]:
        """A hash of the bytes of each picture."""
        return self.key.split("+")

    def open(self) -> Image.Image:
        """The picture, RGB. DiffpoError if it cannot be read, or if there are several."""
        if len(self.encoded) != 1:
            raise DiffpoError(
                f"{plain(self, 100)!r} is about {len(self.encoded)} pictures, and one is expected here: "
                f"Instruction.pictures() gives all of them"
            )
        return self.pictures()[0]

    def pictures(self) -> list[Image.Image]:
        """All pictures in their order, RGB. DiffpoError if one cannot be read."""
        return [self._decoded(each) for each in self.encoded]

    def _decoded(self, picture: Encoded) -> Image.Image:
        try:
            return decode(self._bytes(picture))
        except BadRow as problem:
            where = f" {picture}" if isinstance(picture, Path) else ""
            raise DiffpoError(f"cannot read the picture{where} of {plain(self, 100)!r}: {problem.detail}") from None

    def _bytes(self, picture: Encoded) -> bytes:
        if isinstance(picture, bytes):
            return picture
        try:
            return read_file(picture, ENCODED)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DiffpoError(f"cannot read the picture {picture} of {plain(self, 100)!r}: {reason}") from None

    def rewritten(self, change: Callable[[str], str]) -> Instruction:
        """The same about the pictures, with another text."""
        return Instruction(change(str(self)), self.encoded, self.key)


def joined(keys: Sequence[str]) -> str:
    """The key of several pictures, from theirs."""
    return "+".join(keys)


def key_of(prompt: str) -> str | None:
    """Of the pictures that a prompt is about; None of a text alone."""
    return prompt.key if isinstance(prompt, Instruction) else None


def encodable(prompt: str) -> str:
    """The prompt with half characters replaced, still about its pictures."""
    return prompt.rewritten(whole) if isinstance(prompt, Instruction) else whole(prompt)
