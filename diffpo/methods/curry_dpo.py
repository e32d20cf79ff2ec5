"""Curry-DPO: stages of ever harder pairs, each with the model of the stage before as its reference."""

from . import Preset

PRESET = Preset(
    title="Enhancing Alignment using Curriculum Learning & Ranked Preferences",
    paper="Pattnaik et al. 2024, arXiv 2403.07230",
    settings={"beta": 5000, "reference": {"policy": "sync", "every": 500}},
    equation="-log sigma(u), reference <- policy at the start of each stage",
    published={
        "language models": (
            "three pairs of each prompt, the best answer against the worst, the third and the second; one stage for "
            "each kind, the reference replaced by the policy after a stage (beta 0.05 and 3 epochs not verified)"
        ),
    },
    results="MT-Bench 7.43; better than DPO on single pairs and than all pairs in random order (abstract)",
    notes=(
        "The order is a matter of the data: set data.curriculum to the number of stages, data.curriculum_keeps=false, "
        "and data.curriculum_updates and objective.reference.every to the updates of a stage. Pairs need scores, and "
        "their gaps make the stages; lists give their pairs. beta is Diffusion-DPO's, because none is published for a "
        "diffusion model."
    ),
)
