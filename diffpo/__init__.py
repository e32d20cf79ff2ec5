"""Align image diffusion models with preferences. Each folder is a room; `tests/test_rooms.py` lists their order.

`score(source, out, scorers=("hps",))` is `diffpo score`; see `diffpo.commands.score.Scoring` for its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.score import Scores


def score(source: str, out: str, **options: Any) -> Scores:
    """Score pictures from anywhere, as `diffpo score` does. Options are the fields of `commands.score.Scoring`."""
    from pathlib import Path

    from .commands.score import Scoring, run

    return run(Scoring(str(source), Path(out), **options))
