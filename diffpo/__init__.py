"""Align image diffusion models with preferences. Each folder is a room; `tests/test_rooms.py` lists their order.

`score(source, out, scorers=("hps",))` is `diffpo score`; see `diffpo.commands.score.Scoring` for its arguments.
`distance(pictures, reference, features=["inception"])` is `diffpo distance`; see `diffpo.evaluate.distributions.run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.score import Scores
    from .evaluate.distributions import Distances


def score(source: str, out: str, **options: Any) -> Scores:
    """Score pictures from anywhere, as `diffpo score` does. Options are the fields of `commands.score.Scoring`."""
    from pathlib import Path

    from .commands.score import Scoring, run

    return run(Scoring(str(source), Path(out), **options))


def distance(pictures: str, reference: str, features: Sequence[str], **options: Any) -> list[Distances]:
    """Distances of two sets of pictures, as `diffpo distance` has them, one result for each of ``features``. Options
    are the other arguments of `evaluate.distributions.run`."""
    from .evaluate.distributions import run

    return run(pictures, reference, features, **options)
