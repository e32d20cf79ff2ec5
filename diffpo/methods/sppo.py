"""SPPO: regression of each reward onto its win probability."""

from . import Preset

PRESET = Preset(
    title="Self-Play Preference Optimization for Language Model Alignment",
    paper="Wu et al. 2024, arXiv 2405.00675",
    settings={"beta": 5000, "link": "sppo"},
    equation="(r_chosen - 1/2)^2 + (r_rejected + 1/2)^2",
    published={
        "language models": "eta 1000, three rounds of the policy's own samples, lr 5e-7, 64 pairs",
    },
    notes=(
        "Hard labels, rescaled as IPO: beta has the role of 1/eta. The paper's rounds of self-play are source=samples "
        "with reference.policy=sync. beta is Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
