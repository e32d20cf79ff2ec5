"""Align image diffusion models with preferences. Each folder is a room; `tests/test_rooms.py` lists their order.

`evaluate(arms, prompts, out=...)` is `diffpo eval` for other programs. What it needs is imported when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation.compare import Evaluation


def evaluate(*arguments: Any, **options: Any) -> Evaluation:
    """Compare pictures of several models, LoRAs, samplers or folders; see `diffpo.evaluation.library.evaluate`."""
    from .evaluation.library import evaluate as run

    return run(*arguments, **options)
