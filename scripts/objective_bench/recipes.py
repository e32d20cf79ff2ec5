"""Recipes: methods tuned by results/tried.jsonl (seed 100, a quarter of the calls), run with four times the budget.

A recipe's settings are those of its lines with the highest win rate. Diffusion-DPO is the control, tuned in the same
way. The grids are learning rate x beta (or the clip) x a knob of the method's own, eight settings each. Lines beyond
the grid are experiments on what holds a method back; the page lists all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import store
from .methods import LISTS, Method, offline, sampled

BUDGET = 51_200  # four times that of the comparison


@dataclass(frozen=True)
class Recipe(Method):
    """A method whose overrides after the first ``common`` ones were chosen."""

    common: int = 0


def recipe(method: Method, regime: str = "own", model: str = "tiny-sdxl") -> Recipe:
    """``method`` with the settings that were chosen for it in ``regime``."""
    settings = store.chosen(method.preset, regime, model, store.tried()) or ()
    note = "; ".join(settings)
    overrides = (*method.overrides, *settings)
    return Recipe(f"{method.preset}_tuned", method.preset, overrides, note, False, None, BUDGET, len(method.overrides))


TOTAL = "objective.rollout.scorers=[shapes.total]"
JUDGED = "objective.rollout.step_scorer=shapes.total"
ROUND = ("objective.rollout.prompts=16", "objective.rollout.updates=6")
STARTS = [
    offline("diffusion_dpo"),
    offline("inpo"),
    sampled("d3po", TOTAL, "objective.rollout.samples=4", *ROUND),
    sampled("spo", JUDGED, "objective.rollout.start=4", "objective.rollout.threshold=0.01", *ROUND),
    sampled("dance_grpo", TOTAL),
    sampled("awm", TOTAL),
    sampled("diffusion_nft", TOTAL),
    offline("rankdpo", *LISTS),
    offline("curriculum_dpo", "data.curriculum=4", "data.curriculum_updates=50"),
]
RATES = ("train.lr=5e-4", "train.lr=1.5e-3")
# the three axes of each grid, by preset
KNOBS = {
    "diffusion_dpo": [
        RATES,
        ("objective.beta=$BETA", "objective.beta=2000"),
        ("train.batch_size=16", "train.batch_size=32"),
    ],
}
RECIPES = [recipe(method) for method in STARTS]
