"""BCO: a classifier of liked and disliked images whose logit is the reward."""

from . import Preset

PRESET = Preset(
    title="Binary Classifier Optimization for Large Language Model Alignment",
    paper="Jung et al. 2024, arXiv 2404.04656",
    settings={"beta": 5000, "link": "bco"},
    equation="-log sigma(r - delta) of liked, -log sigma(delta - r) of disliked images, delta = mean r",
    published={
        "language models": (
            "beta 0.01 on summed log-probabilities, lr 5e-7, 128 pairs (TRL's paper index); delta a running mean of "
            "the rewards"
        ),
    },
    notes=(
        "Takes images with likes, or pairs as one liked and one disliked image. delta is the mean reward of the "
        "previous update. Left out: the density-ratio weights for likes and dislikes of different prompts. beta is "
        "Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
