"""The verb `loop`: sample from the current LoRA, label, train on from it, compare; again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import DiffpoError

if TYPE_CHECKING:
    from ..config import Config
    from ..evaluation.compare import Evaluation
    from ..evaluation.generation import Generation
    from ..labelling.label import Labelling
    from ..labelling.rows import Form


FORMS: dict[str, Form] = {"pair": "pairs", "list": "rankings", "single": "likes"}  # by the kind that a link compares


@dataclass(frozen=True)
class Cycle:
    """What the rounds share. ``judges``: scorers for the comparison; ``n``: prompts of a round."""

    config: Path
    overrides: tuple[str, ...]
    rounds: int
    n: int
    heldout: str
    labelling: Labelling
    judges: tuple[str, ...]

    def settings(self, number: int, start: str | None) -> Config:
        """The config of a round's training."""
        from ..config import load_config

        first = load_config(self.config, [*self.overrides, "data.train=labels.parquet"])
        home = first.output / f"round-{number}"
        places = {"data.train": home / "labels" / "labels.parquet", "output": home / "run"}
        own = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
        own += [f"lora.start={json.dumps(start)}"] if start else []
        return load_config(self.config, [*self.overrides, *own])


def run(cycle: Cycle, pictures: Generation) -> Evaluation:
    """All rounds; ``pictures``: how they are sampled, without a LoRA. Returns the comparison of all rounds with the
    model at the start, and prints how each round compares with the one before."""
    from .. import links
    from ..common import processes
    from ..data.prompts import load_prompts
    from ..evaluation import evaluate
    from ..evaluation.scoring import Scoring
    from ..labelling import label
    from ..train.loop import train

    first = cycle.settings(1, None)
    if first.objective.on_policy or first.data.prompts is None:
        raise DiffpoError("loop labels pictures of data.prompts for an objective that trains on data: set data.prompts")
    prompts = load_prompts(first.data.prompts)
    start = first.lora.start if first.lora else None
    arms = {"start": replace(pictures, lora=start, images_per_prompt=1)}
    choice = replace(cycle.labelling.choice, form=FORMS[links.kind(first.objective.link)])
    found: Evaluation | None = None
    for number in range(1, cycle.rounds + 1):
        home = cycle.settings(number, start).output.parent
        own = [prompts[k % len(prompts)] for k in range((number - 1) * cycle.n, number * cycle.n)]
        seed = pictures.seed + (number - 1) * pictures.images_per_prompt
        sampled = {"current": replace(pictures, lora=start, seed=seed)}
        made = label.run(home / "labels", sampled, replace(cycle.labelling, choice=choice), list(dict.fromkeys(own)))
        if processes.here().main:
            label.show(made)
        settings = cycle.settings(number, start)
        train(settings)
        start = str(settings.output)
        arms[f"round-{number}"] = replace(pictures, lora=start, images_per_prompt=1)
        found = evaluate.run(home.parent / "eval", arms, cycle.heldout, None, Scoring(cycle.judges))
    assert found is not None  # noqa: S101 (there is at least one round)
    if processes.here().main:
        show(found, cycle.labelling.scorers[0])
    return found


def show(found: Evaluation, score: str) -> None:
    """Print how each round compares with the start, and with the round before, by ``score`` (or the deciding one)."""
    import numpy as np

    from ..common.tables import Table, console
    from ..evaluation.statistics import win_rate

    name = score if score in found.scores else found.primary
    scores, ids = found.scores[name], np.array([item.index for item in found.items])
    table = Table(["round", "mean", "wins over the start [95 %]", "over the round before [95 %]"], title=name)
    arms = list(scores)
    for before, arm in pairwise(arms):
        cells = [arm, f"{np.nanmean(scores[arm]):.4f}"]
        for other in (arms[0], before):
            there = ~np.isnan(scores[other]) & ~np.isnan(scores[arm])
            rate = win_rate(scores[other][there], scores[arm][there], ids[there])
            cells.append(f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]")
        table.rows.append(cells)
    console().print(table.terminal())
