"""APO-down: the rewards of both images go down, the rejected one's further."""

from . import Preset

PRESET = Preset(
    title="Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266",
    settings={"beta": 5000, "link": "apo_down"},
    equation="sigma(r_chosen) + 1 - sigma(u)",
    published={
        "language models": (
            "for data worse than the model; beta 0.1 on summed log-probabilities, lr 2e-7, 64 pairs (TRL's paper index)"
        ),
    },
    notes=(
        "For pairs whose better image is still worse than what the model draws. beta is Diffusion-DPO's, because none "
        "is published for a diffusion model."
    ),
)
