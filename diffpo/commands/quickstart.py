"""Align an embedded model with its preferences in minutes on a small machine, and measure the change."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import carried, lock
from ..common.errors import DiffpoError

if TYPE_CHECKING:
    from ..evaluation.compare import Evaluation


STEPS_BY_VOTES = 50  # updates on 100 votes: scripts/bench_votes.py
RECIPES = {"tiny-sdxl": "quickstart.yaml", "tiny-dit": "quickstart_dit.yaml"}  # by the model in assets/


def run(
    out: Path, seed: int = 0, n: int = 512, overrides: tuple[str, ...] = (), model: str = "tiny-sdxl", votes: int = 0
) -> Evaluation:
    """``check``, ``train`` and ``eval`` of ``model``'s recipe into ``out``; prints what to try next.

    ``seed`` is the training's; the ``n`` held-out prompts and their noise are always the same. ``overrides`` are
    settings as on the command line of ``diffpo train``. ``votes``: people vote first, on so many pairs of the model's
    pictures, and their votes in ``out``-votes take the place of the oracle's pairs.
    """
    with lock.held(out):
        own: tuple[str, ...] = ()
        if votes:
            table = _vote(out.with_name(f"{out.name}-votes"), votes, model)
            own = (f"data.train={json.dumps(str(table))}", f"train.steps={STEPS_BY_VOTES}")
        return _run(out, seed, n, (*own, *overrides), model)


def _vote(folder: Path, count: int, model: str) -> Path:
    """The votes of people on ``count`` pairs, as a table that training reads. Serves the page until Ctrl-C."""
    from rich.console import Console
    from rich.rule import Rule

    from ..annotate.assign import Plan
    from ..annotate.export import Export
    from ..annotate.export import run as write
    from . import annotate

    console = Console(markup=False, emoji=False)
    console.print(Rule(f"vote: {count} pairs of the model's own pictures"))
    console.print("Choose the better picture of each pair in a browser, and press Ctrl-C here when you are done.")
    making = {"model": str(carried.HOME / "assets" / model), "steps": 10, "guidance": 3.0, "batch_size": 64}
    shown = annotate.Shown(making=making, prompts=f"shapes:train:{count}")
    annotate.run(folder, shown, Plan(repeat=0.0), annotate.Address())
    table = folder / "votes.parquet"
    counts = write(folder, table, Export())
    console.print(f"{counts['rows']} pairs of {counts['votes']} votes; {counts['ties']} ties")
    return table


def _run(out: Path, seed: int, n: int, overrides: tuple[str, ...], model: str) -> Evaluation:
    from rich.console import Console
    from rich.rule import Rule

    from ..config import load_config

    config, started = carried.HOME / "configs" / RECIPES[model], time.time()
    if not config.exists():
        raise DiffpoError(f"{config} is missing from this installation of diffpo: install its wheel or a clone again")
    console = Console(markup=False, emoji=False)
    # relative paths as in the recipe where possible, so that `diffpo train` with the recipe continues this run
    assets = (Path() if Path.cwd() == carried.HOME else carried.HOME) / "assets"
    places = {
        "model.path": assets / model,
        "data.train": assets / "shapes-preferences" / "train.parquet",
        "data.validation": assets / "shapes-preferences" / "validation.parquet",
        "output": out,
    }
    # in quotes: YAML reads the name [1] as a list
    named = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
    settings = load_config(config, [*named, f"train.seed={seed}", *overrides])

    from .check import check

    console.print(Rule("check: the config and the data"))
    check(settings)

    from ..train.loop import train

    console.print(Rule("train: Diffusion-DPO, a LoRA on the attention layers"))
    train(settings)

    from ..evaluation import evaluate, table
    from ..evaluation.generation import Generation

    console.print(Rule(f"eval: {n} held-out prompts, before and after, same noise"))
    pictures = Generation(settings.model.path, lora=str(out), steps=10, guidance=3.0, batch_size=64)
    scoring = evaluate.Scoring(train_scorer="shapes.total")
    evaluation = evaluate.run(out / "eval", pictures, "shapes:heldout", n, scoring)
    table.show(evaluation)
    console.print(Rule(f"done in {time.time() - started:.0f} s"))
    lora = out / "pytorch_lora_weights.safetensors"
    command = "diffpo" if shutil.which("diffpo") else sys.argv[0]
    console.print(
        f"Open {evaluation.files['report.html']} in a browser to see all numbers and pictures.\n"
        f'The LoRA: pipe.load_lora_weights("{lora}")\n\n'
        "Next, train longer on the same data:\n"
        f"  {command} train configs/{config.name} train.steps=400 output={out}-long\n"
        "or align your own SDXL with your own pairs:\n"
        f"  {command} check configs/sdxl_diffusion_dpo.yaml data.train=path/to/your/pairs",
        highlight=False,
        soft_wrap=True,
    )
    return evaluation
