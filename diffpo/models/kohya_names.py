"""What a family defines for kohya's format, the LoRA files of sd-scripts: the layers' names, and the header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..common.errors import DiffpoError


class Kohya(NamedTuple):
    """The format for one family.

    Attributes:
        name: a layer of diffusers' network and the network's config -> its name there, and all layers that are stacked
            in it. DiffpoError if it has no name.
        header: the network's config -> the header by which A1111 finds the models that the LoRA is for.
    """

    name: Callable[[str, Any], tuple[str, tuple[str, ...]]]
    header: Callable[[Any], dict[str, str]]


def nameless(layer: str) -> DiffpoError:
    return DiffpoError(
        f"the LoRA changes {layer}, which has no name in kohya's format; use --to diffusers or --to merged"
    )
