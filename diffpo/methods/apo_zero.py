"""APO-zero: the chosen image's reward goes up and the rejected one's down, each by itself."""

from . import Preset

PRESET = Preset(
    title="Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    paper="D'Oosterlinck et al. 2024, arXiv 2408.06266",
    settings={"beta": 5000, "link": "apo_zero"},
    equation="1 - sigma(r_chosen) + sigma(r_rejected)",
    published={
        "language models": (
            "for data better than the model; beta 0.1 on summed log-probabilities, lr 2e-7, 64 pairs (TRL's paper "
            "index)"
        ),
    },
    notes=(
        "The loss is bounded, so pairs that are ranked very wrongly have little weight. beta is Diffusion-DPO's, "
        "because none is published for a diffusion model."
    ),
)
