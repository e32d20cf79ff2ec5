"""Curriculum DPO: Diffusion-DPO that begins with the pairs of large score difference."""

from . import Preset

PRESET = Preset(
    title="Curriculum Direct Preference Optimization for Diffusion and Consistency Models",
    paper="Croitoru et al. 2024, arXiv 2405.13637",
    settings={"beta": 2000},
    equation="-log sigma(u)",
    published={
        "SD1.5": (
            "beta 2000 (fixed in the code, its option is ignored), pairs in groups by score gap, easiest first, one "
            "group more each 500 steps, LoRA rank 8"
        ),
    },
    results="better text alignment, aesthetics and human preference than Diffusion-DPO and DDPO (abstract)",
    notes=(
        "The method is an order of the data: set data.curriculum to the number of groups and "
        "data.curriculum_updates=500. beta is defined as here. Pairs need scores (data.columns.score_0, score_1)."
    ),
)
