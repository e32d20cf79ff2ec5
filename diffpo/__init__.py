"""Align image diffusion models with preferences. Each folder is a room; `tests/test_rooms.py` lists their order.

`evaluate`, `score` and `distance` are `diffpo eval`, `diffpo score` and `diffpo distance` for other programs. What they
need is imported when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .commands.score import Scores
    from .evaluation.compare import Evaluation
    from .evaluation.distributions import Distances


def evaluate(*arguments: Any, **options: Any) -> Evaluation:
    """Compare pictures of several models, LoRAs, samplers or folders; see `diffpo.evaluation.library.evaluate`."""
    from .evaluation.library import evaluate as run

    return run(*arguments, **options)


def score(source: str, out: str, **options: Any) -> Scores:
    """Score pictures from anywhere, as `diffpo score` does. Options are the fields of `commands.score.ScoreRun`."""
    from pathlib import Path

    from .commands.score import ScoreRun, run

    return run(ScoreRun(str(source), Path(out), **options))


def distance(pictures: str, reference: str, features: Sequence[str], **options: Any) -> list[Distances]:
    """Distances of two sets of pictures, as `diffpo distance` has them, one result for each of ``features``. Options
    are the other arguments of `evaluate.distributions.run`."""
    from .evaluation.distributions import run

    return run(pictures, reference, features, **options)
