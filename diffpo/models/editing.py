"""What the families have in common that make pictures of other pictures alone (`Family.needs_source`)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ..common.errors import DiffpoError


def lacks_picture(path: str) -> DiffpoError:
    """Why captions alone cannot be encoded."""
    return DiffpoError(
        f"{path} reads the picture to edit with each caption: name the column of the pictures with "
        f"data.columns.source (training) or --source (generate, eval, label)"
    )


@contextlib.contextmanager
def dimensions(pipe: Any, instead: Callable[..., tuple[int | None, ...]]) -> Iterator[None]:
    """These pipelines bring every picture to 1024 x 1024 pixels, by a function of their module: within the context it
    is ``instead(own, area, ratio)``, where ``own`` is that function."""
    module: Any = sys.modules[type(pipe).__module__]
    own = module.calculate_dimensions
    module.calculate_dimensions = lambda area, ratio: instead(own, area, ratio)
    try:
        yield
    finally:
        module.calculate_dimensions = own
