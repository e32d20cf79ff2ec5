"""`diffpo eval` for other programs: one call, one typed result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arms import Source, read_arms
from .compare import Evaluation
from .evaluate import run
from .scoring import Scoring


def evaluate(
    arms: Mapping[str, str | Path | Source],
    prompts: str | Path | Sequence[str] | None = None,
    *,
    out: str | Path,
    scorers: Sequence[str] = Scoring.scorers,
    n: int | None = None,
    **options: Any,
) -> Evaluation:
    """Compare the pictures of several arms with those of the first; what `diffpo eval` writes goes into ``out``.

    Args:
        arms: by name what ``--arm NAME=WHAT`` takes: "base", a LoRA, a folder of pictures, a plan, another model,
            "key=value,..."; or a `Generation`.
        prompts: as of `diffpo.data.prompts.load_prompts`. Needed to make pictures and for pictures without texts.
        scorers: as for `diffpo.scorers.load`.
        n: only the first prompts.
        options: ``train_scorer`` and ``features`` (`Scoring`), and fields of `Generation` for all arms, such as
            ``model``, ``steps`` and ``guidance``.

    Raises:
        DiffpoError: what the command line would print. Under `accelerate launch` all processes get the result.
    """
    scoring = Scoring(
        tuple(scorers), options.pop("train_scorer", None), options.pop("features", None), options.get("device")
    )
    named: dict[str, Source] = {}
    for name, what in arms.items():
        if isinstance(what, Path):
            what = str(what)
        named |= read_arms([f"{name}={what}"], options) if isinstance(what, str) else {name: what}
    return run(out, named, prompts, n, scoring)
