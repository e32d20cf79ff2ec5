"""Text embeddings of captions in a cache; of captions with pictures where the text encoder sees these too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..common.errors import DiffpoError
from ..common.worker import Worker
from .cache import Cache
from .encoders import Encoders
from .keys import content_key

AT_ONCE = 16
Place = tuple[str, str | None]  # a caption, and the key of the pictures that it is about


def require_numbers(family: Encoders | type[Encoders], numbers: Iterable[tuple[str, int]], where: str) -> None:
    """DiffpoError unless the model takes so many pictures to edit, and each row has as many as the first one.
    ``numbers``: names of rows of ``where``, e.g. "row 3", and how many pictures they have."""
    first: tuple[str, int] | None = None
    for row, number in numbers:
        first = first or (row, number)
        if number > 1 and not family.several:
            raise DiffpoError(
                f"{where}: {row} has {number} pictures to edit, and this model takes one. Leave one in the row, or use "
                f"a model that takes several (docs/models.md)"
            )
        if number != first[1]:
            raise DiffpoError(
                f"{where}: {row} has {number} pictures to edit, and {first[0]} has {first[1]}. A batch needs one "
                f"number: divide them into two data sets"
            )


def require_pictures(family: Encoders | type[Encoders], column: str | None, where: str) -> None:
    """DiffpoError if pictures to edit, from the ``column`` of ``where``, are given to a model that takes none, or if
    a model lacks them that needs them."""
    if column and not family.edits:
        raise DiffpoError(
            f"{where}: data.columns.source={column} is for models that edit pictures, and this one makes them from "
            f"texts alone. Leave the setting out, or use a model that edits (docs/models.md)"
        )
    if not column and family.needs_source:
        raise DiffpoError(
            f"{where}: this model edits pictures, so each row needs one: name their column with "
            f"data.columns.source=COLUMN"
        )


class Captions:
    """The embeddings of some captions, and of the absent caption. A family whose text encoder sees the pictures that a
    caption is about (`reads_source`) has one for each caption and pictures, and an absent caption for each of these."""

    def __init__(
        self,
        root: str | Path,
        family: Encoders,
        places: Iterable[Place],
        pictures: Callable[[str], Sequence[Image.Image]],
        sizes: Sequence[Any],
    ) -> None:
        """``pictures`` gives those of a key, as the network sees them, of one of the ``sizes``. Nothing is encoded
        yet."""
        self.family, self.pictures = family, pictures
        seen = {self._place(caption, source) for caption, source in places}
        captions = sorted(seen, key=lambda place: (place[0], place[1] or ""))
        self.places: list[tuple[str | None, str | None]] = list(captions)
        self.places += [(None, source) for source in sorted({source for _, source in seen}, key=lambda key: key or "")]
        self._row = {place: row for row, place in enumerate(self.places)}
        named = [sizes, *captions] if family.reads_source else [caption for caption, _ in captions]
        self.cache = Cache(root, "text", content_key(family.text_hash(), named), len(self.places))

    def _place(self, caption: str, source: str | None) -> Place:
        return (str(caption), source if self.family.reads_source else None)

    def row(self, caption: str | None, source: str | None = None) -> int:
        """The cache's row of a caption; None is the absent one."""
        return self._row[caption, source if self.family.reads_source else None]

    def build(self, worker: Worker, rows: Collection[int] | None = None) -> None:
        """Encode ``rows`` (None: all) that are not there yet."""
        self.cache.build(self._encode, AT_ONCE, worker, rows)

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.cache.read(rows)

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        places = [self.places[row] for row in rows]
        captions = [caption for caption, _ in places]
        sources = [source for _, source in places if source is not None]  # all of the places have some, or none
        if not sources:
            return self.family.encode_text(captions)
        return self.family.encode_edits(captions, [self.pictures(source) for source in sources])
